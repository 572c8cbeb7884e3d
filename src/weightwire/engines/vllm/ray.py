"""A vLLM engine inside a Ray actor, as an engine of this process: what `connect(actor)` makes.

`Control` runs here, and its `Host` is in the actor: the same one that an engine in its own process has, so that what is
refused is refused there. The actor's class needs nothing for that. Ray gives every actor `__ray_call__`, which runs a
function there; ours is `answer`. Ray pickles its own calls, inside its cluster; what we hand it is that function's
name, strings and bytes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import itertools
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

import msgspec

from weightwire.engines.base import KeepCache, Pause
from weightwire.engines.control import AtOnce
from weightwire.engines.local import LocalEngine
from weightwire.engines.vllm.host import AsyncHost, SyncHost, kind_of
from weightwire.errors import DeadlineError, EngineError, EngineLost, UsageError, WeightwireError
from weightwire.revisions import Revision

__all__ = ["RayEngine", "answer"]

_PASSED_ON = (
    "commit_at_once", "stage_at_once", "call", "before_pause", "pause", "resume", "refuse", "label", "in_use",
)  # fmt: skip
_START_SECONDS = 600.0
_PATIENCE_SECONDS = 0.05


class RayEngine(LocalEngine):
    """The `LLM` or `AsyncLLM` that `actor` is, or has in an attribute.

    An actor that does not start within 600 seconds is a `DeadlineError`, a dead one an `EngineLost`.
    """

    def __init__(self, actor: Any) -> None:
        host = _RayHost(actor)
        super().__init__(host)
        self.host = host.address


class _RayHost:
    """The `Host` port, by calls of the actor. Deadlines are `Control`'s, which waits for them; a call that it gave up
    on is still carried out in its turn, as with an engine in this process."""

    def __init__(self, actor: Any) -> None:
        import ray

        self._actor = actor
        self.name = repr(actor)
        with self._asking():
            reply = ray.get(actor.__ray_call__.remote(answer, "", self.name, b""), timeout=_START_SECONDS)
            facts = self._checked(reply)["value"]
        self.model = str(facts["model"])
        # An actor with an `LLM` does one thing at a time.
        self.idle = facts["kind"] == "LLM"
        self.in_order = self.alone = False
        self.address = "" if facts["address"] == ray.util.get_node_ip_address() else str(facts["address"])

    async def call(self, op: str, arguments: bytes, body: bytes | None, timeout: float) -> list[bytes]:
        return list(await self._ask("call", op, arguments, body, timeout))

    async def before_pause(self) -> None:
        await self._ask("before_pause")

    async def pause(self, mode: Pause, keep_cache: KeepCache) -> None:
        await self._ask("pause", mode, keep_cache)

    async def commit_at_once(
        self, mode: Pause, keep_cache: KeepCache, arguments: bytes, sealing: tuple[str, bytes] | None = None
    ) -> AtOnce | None:
        found = await self._ask("commit_at_once", mode, keep_cache, arguments, sealing)
        return None if found is None else AtOnce(*found)

    async def stage_at_once(self, arguments: bytes) -> list[bytes] | None:
        found = await self._ask("stage_at_once", arguments)
        return None if found is None else list(found)

    async def resume(self) -> None:
        await self._ask("resume")

    async def refuse(self, reason: str) -> None:
        await self._ask("refuse", reason)

    async def label(self, version: int) -> None:
        await self._ask("label", version)

    async def in_use(self) -> dict[str, Any]:
        return dict(await self._ask("in_use"))

    async def list(self, revisions: Sequence[Revision]) -> None:
        await self._ask("list", [tuple(revision) for revision in revisions])

    async def _ask(self, method: str, *arguments: Any) -> Any:
        ticket: int | None = None
        try:
            reply = await self._call(method, msgspec.msgpack.encode(arguments))
            while (ticket := reply.get("ticket")) is not None:
                reply = await self._call("collect", msgspec.msgpack.encode([ticket]))
        except asyncio.CancelledError:
            if ticket is not None:
                self._actor.__ray_call__.remote(answer, "drop", self.name, msgspec.msgpack.encode([ticket]))
            raise
        return reply["value"]

    async def _call(self, method: str, arguments: bytes) -> dict[str, Any]:
        with self._asking():
            reply = self._actor.__ray_call__.remote(answer, method, self.name, arguments)
            return self._checked(await asyncio.wrap_future(reply.future()))

    def _checked(self, reply: bytes) -> dict[str, Any]:
        decoded: dict[str, Any] = msgspec.msgpack.decode(reply)
        if "error" in decoded:
            raise WeightwireError.from_wire(decoded["error"])
        return decoded

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        from ray.exceptions import GetTimeoutError, RayActorError, RayError

        try:
            yield
        except GetTimeoutError as error:
            raise DeadlineError(f"the actor did not start in {_START_SECONDS:.0f} s", engine=self.name) from error
        except RayActorError as error:
            raise EngineLost(
                f"the actor is gone: {_first_line(error)}",
                engine=self.name,
                next_step="Start a new actor, and look at Ray's log for why it died.",
            ) from error
        except RayError as error:
            raise EngineError(
                f"the actor could not answer: {_last_line(error)}",
                engine=self.name,
                next_step="The actor's environment needs vLLM and this version of weightwire.",
            ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300]


def _last_line(error: BaseException) -> str:
    return str(error).strip().rpartition("\n")[2][:300]


# -- in the actor ------------------------------------------------------------------------------------------------------


def answer(actor: Any, method: str, name: str, arguments: bytes) -> bytes:
    """One call of the host, in the actor. Both ways msgpack; back comes a `value`, an `error`, or, where that takes
    longer, a `ticket` by which to collect the value: in the meantime the actor can answer other calls."""
    try:
        place: _Place | None = vars(actor).get("_weightwire_place")
        if place is None:
            place = actor._weightwire_place = _Place(actor, name)
        reply = place.answer(method, msgspec.msgpack.decode(arguments) if arguments else [])
    except WeightwireError as error:
        reply = {"error": error.to_wire()}
    return msgspec.msgpack.encode(reply, enc_hook=str)


class _Place:
    """What an actor keeps for us: the host, and calls that are under way on the event loop of an `AsyncLLM`."""

    def __init__(self, actor: Any, name: str) -> None:
        engine = _engine_of(actor, name)
        self._kind = kind_of(engine)
        self._loop: asyncio.AbstractEventLoop | None = None
        if self._kind == "AsyncLLM":
            # Ray answers us on a thread beside that loop.
            self._loop = _loop_of(engine, name)
            self._host: AsyncHost | SyncHost = AsyncHost(engine, name)
        else:
            _refuse_concurrency(actor, name)
            self._host = SyncHost(engine, name)
        self._tickets = itertools.count(1)
        self._work: dict[int, concurrent.futures.Future[Any]] = {}

    def answer(self, method: str, arguments: Sequence[Any]) -> dict[str, Any]:
        match method:
            case "":
                return {"value": self._facts()}
            case "collect":
                return self._collect(*arguments)
            case "drop":
                self._work.pop(*arguments).cancel()
                return {"value": None}
            case "list":
                return self._start(self._host.list([Revision(*entry) for entry in arguments[0]]))
            case "commit_at_once" | "stage_at_once" if isinstance(self._host, SyncHost):
                return {"value": None}
            case _ if method in _PASSED_ON:
                return self._start(getattr(self._host, method)(*arguments))
        raise UsageError(f"unknown call {method!r}", next_step="Use the same version of weightwire on both sides.")

    def _facts(self) -> dict[str, Any]:
        import ray

        return {"model": self._host.model, "kind": self._kind, "address": ray.util.get_node_ip_address()}

    def _start(self, work: Coroutine[Any, Any, Any]) -> dict[str, Any]:
        if self._loop is None:
            return {"value": asyncio.run(work)}
        ticket = next(self._tickets)
        self._work[ticket] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return self._collect(ticket)

    def _collect(self, ticket: int) -> dict[str, Any]:
        done, _ = concurrent.futures.wait([self._work[ticket]], timeout=_PATIENCE_SECONDS)
        return {"value": self._work.pop(ticket).result()} if done else {"ticket": ticket}


def _engine_of(actor: Any, name: str) -> Any:
    """The one engine that an actor is, or has in an attribute."""
    found = {id(thing): thing for thing in (actor, *vars(actor).values()) if kind_of(thing) is not None}
    if len(found) != 1:
        raise UsageError(
            f"it has {len(found)} LLMs or AsyncLLMs among its attributes",
            engine=name,
            next_step="Keep exactly one in an attribute, or make the actor of a subclass of LLM.",
        )
    return next(iter(found.values()))


def _loop_of(engine: Any, name: str) -> asyncio.AbstractEventLoop:
    """The event loop that an `AsyncLLM` runs on: that of the task that handles its outputs."""
    handler = getattr(engine, "output_handler", None)
    if handler is None:
        raise UsageError(
            "its AsyncLLM was not made on an event loop",
            engine=name,
            next_step="Make one method of the actor's class async: Ray then makes the actor on its event loop.",
        )
    loop: asyncio.AbstractEventLoop = handler.get_loop()
    return loop


def _refuse_concurrency(actor: Any, name: str) -> None:
    """Ray calls us beside whatever an actor with async methods is doing, and an `LLM` takes one call at a time."""
    if inspect.getmembers(type(actor), inspect.iscoroutinefunction):
        raise UsageError(
            "it has an LLM, which takes one call at a time, and async methods, which run beside our calls",
            engine=name,
            next_step="Use an AsyncLLM there, or a class without async methods.",
        )
