"""The gate in front of generation: requests find the newest adapters, and a poisoned engine answers with a reason.

Of several API servers each has a table of adapters of its own, and only one of them hears of an update. So each asks
the workers before a request goes in: one question for all that wait.

A poisoned engine is paused, so no token can come out of it, whichever API server process a request went to. The gate
makes that an answer instead of a wait: it asks the workers whenever a response is slow to begin, and drops what was
begun before. It holds no truth of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from weightwire.engines.routes import PREFIX, error_response
from weightwire.engines.vllm.host import AsyncHost
from weightwire.errors import PoisonedError, WeightwireError

__all__ = ["Gate"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_ASK_SECONDS = 1.0
_ASK_TIMEOUT = 10.0


class Gate:
    """ASGI middleware around everything that is posted, except our own calls."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._asked_at = float("-inf")
        self._asking = asyncio.Lock()
        self._next: asyncio.Future[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["app"].state if "app" in scope else None
        control = getattr(state, "weightwire_control", None)
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or path.startswith(PREFIX) or control is None:
            await self._app(scope, receive, send)
            return
        if scope["method"] == "POST" or path.startswith("/v1/models"):
            await self._find_adapters(control)
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        host: AsyncHost = control.host
        if host.refusal is not None and (reason := await self._ask(control)) is not None:
            await _refuse(reason, scope, receive, send)
            return
        begun = False

        async def send_unless_poisoned(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                if host.refusal is not None:
                    raise _Refused
                begun = True
            await send(message)

        task = asyncio.ensure_future(self._app(scope, receive, send_unless_poisoned))
        try:
            while not (await asyncio.wait({task}, timeout=_ASK_SECONDS))[0]:
                if not begun and await self._ask(control) is not None:
                    task.cancel()
                    break
            await task
        except (_Refused, asyncio.CancelledError):
            if begun or host.refusal is None:
                raise
            await _refuse(host.refusal, scope, receive, send)
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def _find_adapters(self, control: Any) -> None:
        """Bring this process's table up to date, as of a moment after this call."""
        if not (control.stale or control.host.names.clients > 1) or not control.host.takes_adapters:
            return
        if self._next is None:
            # Those that come while a question is under way wait for the one after it, which is asked once.
            self._next = asyncio.ensure_future(self._ask_adapters(control))
        with contextlib.suppress(WeightwireError):
            await asyncio.shield(self._next)

    async def _ask_adapters(self, control: Any) -> None:
        async with self._asking:
            self._next = None
            await control.refresh(_ASK_TIMEOUT)

    async def _ask(self, control: Any) -> str | None:
        """Why the engine refuses, asked of the workers at most once a second for all requests that wait."""
        host: AsyncHost = control.host
        if host.refusal is None and time.monotonic() - self._asked_at < _ASK_SECONDS:
            return None
        self._asked_at = time.monotonic()
        with contextlib.suppress(WeightwireError):
            host.refusal = await control.poisoned(_ASK_TIMEOUT)
        return host.refusal


class _Refused(Exception):
    """A response was about to begin on a poisoned engine."""


async def _refuse(reason: str, scope: Scope, receive: Receive, send: Send) -> None:
    error = PoisonedError(reason, next_step="It serves again after the next complete update.")
    await error_response(error)(scope, receive, send)
