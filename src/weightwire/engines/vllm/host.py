"""The `Host` port over vLLM's own engine objects: an `AsyncLLM` (which its API server uses too) and an `LLM`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from weightwire.engines.base import KeepCache, Pause
from weightwire.engines.control import AtOnce
from weightwire.engines.local import in_thread
from weightwire.engines.vllm.compat import supports
from weightwire.engines.vllm.engine_core import COMMIT, STAGE
from weightwire.engines.vllm.names import Names, names_of
from weightwire.engines.vllm.spin import CALL
from weightwire.errors import EngineLost, PoisonedError, UnsupportedError
from weightwire.receiver import decode_reply, encode_call

__all__ = ["AsyncHost", "SyncHost", "kind_of"]

T = TypeVar("T")
_WATCH_SECONDS = 0.5


class AsyncHost:
    """An `AsyncLLM`, on the event loop that runs it. `refusal` is why it refuses to generate, or None."""

    in_order = True

    def __init__(self, engine: Any, name: str, names: Names | None = None) -> None:
        self._engine = engine
        self.name = name
        self.model = str(engine.model_config.model)
        self.refusal: str | None = None
        self.names = names or names_of(engine)
        self.in_use, self.list = self.names.in_use, self.names.list
        self._stays_paused = False

    @property
    def takes_adapters(self) -> bool:
        """Whether the engine was started with LoRA."""
        return self._engine.vllm_config.lora_config is not None

    @property
    def alone(self) -> bool:
        return bool(getattr(self._engine.engine_core, "client_count", 1) == 1)

    @property
    def idle(self) -> bool:
        # Of several API servers each knows only its own requests.
        return self.alone and self._engine.output_processor.get_num_unfinished_requests() == 0

    async def call(self, op: str, arguments: bytes, body: bytes | None, timeout: float) -> list[bytes]:
        if op == "begin":
            self._refuse_replicas()
        try:
            return list(await self._watched(self._engine.collective_rpc(CALL, args=(op, arguments, body))))
        except EngineLost:
            raise
        except Exception as error:
            raise _lost(error, self.name) from error

    async def commit_at_once(
        self, mode: Pause, keep_cache: KeepCache, arguments: bytes, sealing: tuple[str, bytes] | None = None
    ) -> AtOnce | None:
        if mode != "keep" or (found := await self._at_once(COMMIT, keep_cache, arguments, sealing)) is None:
            return None
        sealed, committed, stood, after = found
        if committed is None:
            return AtOnce(list(sealed), None, 0.0)
        self._accept_requests()
        return AtOnce(list(sealed), list(committed), float(stood), float(after))

    async def stage_at_once(self, arguments: bytes) -> list[bytes] | None:
        replies = await self._at_once(STAGE, arguments)
        return None if replies is None else list(replies)

    async def _at_once(self, call: str, *arguments: Any) -> Any:
        """What the engine core answers; None if it cannot."""
        core = self._engine.engine_core
        # With images there are caches that only `pause_generation` resets.
        if self._engine.model_config.is_multimodal_model or not supports(core, "call_utility_async"):
            return None
        try:
            return await self._watched(core.call_utility_async(call, *arguments))
        except Exception as error:
            if f"has no attribute '{call}'" in str(error):
                return None  # the plugin is in the workers alone
            self._raise_if_dead()
            raise

    async def before_pause(self) -> None:
        # With the weights awake and the KV cache not, as in the middle of `wake_up`, an update is welcome, but whoever
        # put the engine to sleep lets it generate again.
        self._stays_paused = any(map(decode_reply, await self.call("asleep", encode_call(), None, 0.0)))

    async def pause(self, mode: Pause, keep_cache: KeepCache) -> None:
        core = self._engine.engine_core
        if self._engine.model_config.is_multimodal_model or not supports(core, "pause_scheduler_async"):
            # With images there are caches that only this resets.
            await self._engine.pause_generation(mode=mode, clear_cache=keep_cache is not True)
        else:
            # What `pause_generation` does without its 20 ms of courtesy.
            await core.pause_scheduler_async(mode=mode, clear_cache=keep_cache is not True)

    async def resume(self) -> None:
        self._accept_requests()
        if not self._stays_paused:
            await self._engine.resume_generation()

    def _accept_requests(self) -> None:
        self.refusal = None
        self._engine.__dict__.pop("add_request", None)

    async def refuse(self, reason: str) -> None:
        async def add_request(*_: Any, **__: Any) -> None:
            raise _poisoned(reason, self.name)

        self.refusal = reason
        self._engine.add_request = add_request  # on this one object, until `resume` takes it away again
        if not self._engine.errored:
            await self._engine.pause_generation(mode="abort", clear_cache=True)

    async def label(self, version: int) -> None:
        if supports(self._engine, "update_weight_version"):
            await self._engine.update_weight_version(str(version))

    def _refuse_replicas(self) -> None:
        # Only here is it known: each replica of a model without experts believes that it is alone.
        size = self._engine.vllm_config.parallel_config.data_parallel_size
        if size > 1:
            raise UnsupportedError(
                f"data_parallel_size={size}, and an update would reach one of the replicas",
                engine=self.name,
                next_step="Run one server for each replica, and connect to the list.",
            )

    async def _watched(self, asking: Awaitable[T]) -> T:
        # No timeout for vLLM itself: it would give up on an answer that then lies in the queue as that to the next
        # question. Control keeps the deadline; here the processes are watched, which vLLM's own calls do not do.
        task = asyncio.ensure_future(asking)
        try:
            self._raise_if_dead()
            while not (await asyncio.wait({task}, timeout=_WATCH_SECONDS))[0]:
                self._raise_if_dead()
        except BaseException:
            task.cancel()
            raise
        return task.result()

    def _raise_if_dead(self) -> None:
        if self._engine.errored:
            raise _lost(self._engine.dead_error, self.name)


class SyncHost:
    """An `LLM` in this process. Nothing runs beside it, so there is nothing to pause: `generate` and a publish are
    calls of the same caller. Poisoned, it refuses new requests."""

    def __init__(self, llm: Any, name: str) -> None:
        self._llm = llm
        self._engine = llm.llm_engine
        self.name = name
        self.model = str(llm.model_config.model)
        self.idle, self.alone, self.in_order = True, True, False
        self._turn = threading.Lock()
        self.names = names_of(llm)
        self.in_use, self.list = self.names.in_use, self.names.list

    async def call(self, op: str, arguments: bytes, body: bytes | None, timeout: float) -> list[bytes]:
        try:
            return list(await self._in_turn(lambda: self._llm.collective_rpc(CALL, args=(op, arguments, body))))
        except Exception as error:
            raise _lost(error, self.name) from error

    async def before_pause(self) -> None:
        pass

    async def pause(self, mode: Pause, keep_cache: KeepCache) -> None:
        if keep_cache is not True:
            await self._in_turn(self._engine.reset_prefix_cache)

    async def resume(self) -> None:
        self._engine.__dict__.pop("add_request", None)

    async def refuse(self, reason: str) -> None:
        def add_request(*_: Any, **__: Any) -> None:
            raise _poisoned(reason, self.name)

        self._engine.add_request = add_request  # on this one object, until `resume` takes it away again

    async def label(self, version: int) -> None:
        if supports(self._engine, "set_weight_version"):
            await self._in_turn(lambda: self._engine.set_weight_version(str(version)))

    async def _in_turn(self, work: Callable[[], Any]) -> Any:
        """One at a time: an `LLM` puts what two threads ask of it at once into one broken message."""

        def in_turn() -> Any:
            with self._turn:
                return work()

        return await in_thread(in_turn)


def kind_of(engine: Any) -> str | None:
    """`"LLM"` or `"AsyncLLM"`, of subclasses too; None for anything else.

    >>> kind_of("http://127.0.0.1:8000") is None
    True
    """
    names = (cls.__name__ for cls in type(engine).__mro__ if cls.__module__.partition(".")[0] == "vllm")
    return next((name for name in names if name in ("LLM", "AsyncLLM")), None)


def _poisoned(reason: str, name: str) -> PoisonedError:
    return PoisonedError(reason, engine=name, next_step="Publish a complete update to heal it.")


def _lost(error: BaseException | None, name: str) -> Exception:
    text = str(error)
    if "__weightwire__" in text and "attribute" in text:
        return UnsupportedError(
            "the workers do not have the weightwire plugin",
            engine=name,
            next_step="Let VLLM_PLUGINS load it, or pass worker_extension_cls=weightwire.WORKER_EXTENSION.",
        )
    return EngineLost(
        f"its workers are gone: {type(error).__name__}: {text[:200]}",
        engine=name,
        next_step="Restart the engine, and look at its log for why it died.",
    )
