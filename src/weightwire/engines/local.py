"""An engine in this process: `Control` driven from a trainer's thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

from weightwire.engines.base import Begun, EngineStatus, KeepCache, Pause
from weightwire.engines.control import Control, Host
from weightwire.errors import DeadlineError, UsageError
from weightwire.updates.manifest import Manifest
from weightwire.updates.receipt import EngineReceipt

__all__ = ["LocalEngine", "background_loop", "in_thread"]

T = TypeVar("T")
_GRACE_SECONDS = 5.0


class LocalEngine:
    """The `Engine` port over a `Host` in this process. `loop` is where the host's coroutines must run."""

    over_http = False
    host = ""

    def __init__(self, host: Host, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.name = host.name
        self._control = Control(host)
        self._loop = loop or background_loop()

    def status(self, offers: Sequence[str] = (), *, timeout: float = 30.0) -> EngineStatus:
        return self._run(lambda: self._control.status(offers, timeout), timeout)

    def begin(
        self,
        manifest: Manifest,
        *,
        holder: str,
        lease: float,
        address: str | None = None,
        id: str | None = None,
        timeout: float,
    ) -> Begun:
        return self._run(lambda: self._control.begin(manifest, holder, lease, timeout, address, id), timeout)

    def stage(self, id: str, address: str, *, timeout: float) -> None:
        self._run(lambda: self._control.stage(id, address, timeout), timeout)

    def put(self, id: str, index: int, body: memoryview, *, timeout: float) -> None:
        self._run(lambda: self._control.put(id, index, bytes(body), timeout), timeout)

    def seal(self, id: str, digests: Sequence[str], *, timeout: float) -> None:
        self._run(lambda: self._control.seal(id, digests, timeout), timeout)

    def commit(
        self, id: str, *, digests: Sequence[str] | None = None, pause: Pause, keep_cache: KeepCache, timeout: float
    ) -> EngineReceipt:
        return self._run(lambda: self._control.commit(id, pause, keep_cache, timeout, digests), timeout)

    def abort(self, id: str, *, timeout: float) -> None:
        self._run(lambda: self._control.abort(id, timeout), timeout)

    def unload(self, name: str, *, timeout: float) -> None:
        self._run(lambda: self._control.unload(name, timeout), timeout)

    def close(self) -> None:
        pass

    def check_caller(self) -> None:
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            return
        if running is self._loop:
            raise UsageError(
                "called on the event loop that the engine itself needs",
                engine=self.name,
                next_step="Use `await asyncio.to_thread(publisher.publish, ...)`.",
            )

    def _run(self, work: Callable[[], Coroutine[Any, Any, T]], timeout: float) -> T:
        self.check_caller()
        future = asyncio.run_coroutine_threadsafe(work(), self._loop)
        try:
            return future.result(timeout + _GRACE_SECONDS)
        except FutureTimeout as error:
            future.cancel()
            raise DeadlineError(f"no answer within {timeout:.1f} s", engine=self.name) from error


_loop_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def background_loop() -> asyncio.AbstractEventLoop:
    """One event loop on a daemon thread, for every engine of this process that has none."""
    global _loop
    with _loop_lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="weightwire-control", daemon=True).start()
        return _loop


async def in_thread(work: Callable[[], T]) -> T:
    """Blocking work on a daemon thread: unlike an executor's, it holds up no exit when it never returns."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(setter: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            setter(value)

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            loop.call_soon_threadsafe(settle, future.set_exception, error)
        else:
            loop.call_soon_threadsafe(settle, future.set_result, result)

    threading.Thread(target=run, name="weightwire-call", daemon=True).start()
    return await future
