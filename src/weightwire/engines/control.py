"""Control: one update taken through all ranks of one engine.

It runs beside the engine, in its API server or in the trainer's own process, and keeps no state: what is true is in
the workers' receivers. Every step asks all ranks and takes the strictest answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import msgspec

from weightwire.engines.base import Begun, EngineStatus, KeepCache, Pause
from weightwire.errors import (
    DeadlineError,
    EngineLost,
    ManifestError,
    PoisonedError,
    ShapeMismatch,
    StateError,
    UpdateNotFound,
    UsageError,
    WeightwireError,
)
from weightwire.receiver import decode_reply, encode_call
from weightwire.revisions import Revision
from weightwire.updates.manifest import Manifest
from weightwire.updates.receipt import EngineReceipt, weakest

__all__ = ["AtOnce", "Control", "Host", "refuse_left_over"]

logger = logging.getLogger("vllm.weightwire.control")

T = TypeVar("T")
_CLEAN_UP_SECONDS = 20.0
_LINGER_SECONDS = 0.01  # a request that comes meanwhile waits for as long, or up to 0.05 once all of an update has come
_WATCH_SECONDS = 0.5  # how soon it is seen that a trainer has gone silent, for which the engine stands still
_unwaited: set[asyncio.Future[Any]] = set()


class Host(Protocol):
    """What an engine offers besides its workers' receivers."""

    name: str
    model: str

    @property
    def idle(self) -> bool:
        """Whether it is certain that nothing is being generated, so that workers may take their time to answer."""

    @property
    def alone(self) -> bool:
        """Whether all calls to the engine are known to come by way of this side: there is no other API server."""

    @property
    def in_order(self) -> bool:
        """Whether calls may be made before those before them were answered, and are carried out in that order."""

    async def call(self, op: str, arguments: bytes, body: bytes | None, timeout: float) -> list[bytes]:
        """`Receiver.handle` on every rank, in rank order. A rank that is gone is an `EngineLost`."""

    async def before_pause(self) -> None:
        """Find out what `resume` will have to know, while the engine still generates."""

    async def pause(self, mode: Pause, keep_cache: KeepCache) -> None:
        """Stand between two model steps, with in-flight requests and the cache dealt with as asked."""

    async def resume(self) -> None:
        """Generate again."""

    async def refuse(self, reason: str) -> None:
        """Paused for good: end what is in flight and refuse to generate, giving the reason."""

    async def label(self, version: int) -> None:
        """Put the version on outputs, where the engine can."""

    async def in_use(self) -> dict[str, Any]:
        """What this side may hand to requests or has in flight: the arguments of `Receiver.adapters`."""

    async def list(self, revisions: Sequence[Revision]) -> None:
        """From now on, new requests find these adapters, each name's newest last, and no others of ours."""


class AtOnce(NamedTuple):
    """Every rank's answer to the call that seals, none if nothing was to be sealed; to "commit", None if that was not
    called; how many seconds the engine stood still, and how many of them after these answers."""

    sealed: list[bytes]
    committed: list[bytes] | None
    stood: float
    after: float = 0.0


class _Applied(NamedTuple):
    """What each rank says of its commit, how many seconds the engine stood still, and how many of them after that."""

    parts: list[dict[str, Any]]
    stood: float
    after: float


@runtime_checkable
class CommitsAtOnce(Protocol):
    """A `Host` that can commit by one question."""

    async def commit_at_once(
        self, mode: Pause, keep_cache: KeepCache, arguments: bytes, sealing: tuple[str, bytes] | None = None
    ) -> AtOnce | None:
        """`before_pause`, `pause`, `call` "commit" with these arguments, and once all ranks have done it `label` and
        `resume`. If one has not, it stands still. With `sealing`, a call and its arguments, that is called first, and
        nothing more is done unless by its answers a whole model is sealed on every rank. None, and nothing was done,
        where that takes several questions."""

    async def stage_at_once(self, arguments: bytes) -> list[bytes] | None:
        """`pause` with what is in flight and in the cache kept, and `call` "stage" with these arguments. None, and
        nothing was done, where that takes several questions."""


class Control:
    """The steps of an update, for every rank of the engine that `host` is part of."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.stale = False
        """Whether new requests on this side may not find the adapters that the ranks have."""
        self._refreshing = asyncio.Lock()
        self._beginnings: dict[str, asyncio.Event] = {}  # updates that are being begun from here
        self._ended: set[str] = set()  # updates for which the engine stood still, that were committed from here
        self._standing: str | None = None  # the last update for which it was to stand still from its beginning
        self._lone_adapter: str | None = None  # the last that was begun from here, if there is one rank
        self._sealed: tuple[str, float] | None = None  # the last adapter that was sealed from here, and until when

    async def status(self, offers: Sequence[str], timeout: float) -> EngineStatus:
        ranks = await self._all("status", timeout)
        refusals = await self._all("try_offers", timeout, offers=list(offers)) if offers else []
        first = ranks[0]
        versions = {rank["version"] for rank in ranks}
        poisoned = next((rank["poisoned"] for rank in ranks if rank["poisoned"]), None)
        if len(versions) > 1 and poisoned is None:
            poisoned = f"ranks disagree on the version: {sorted(versions, key=str)}"
        return EngineStatus(
            engine=self.host.name,
            model=self.host.model,
            ranks=len(ranks),
            # Where they differ, what the last rank still holds: the engine has been no further as a whole.
            version=None if None in versions else min(versions),
            state="poisoned" if poisoned and not first["update"] else first["state"],
            poisoned=poisoned,
            update=first["update"],
            offers={offer: next((r[offer] for r in refusals if r[offer]), None) for offer in offers},
            adapters=first["adapters"],
            spent=first["spent"],
            adapter_dtype=first["adapter_dtype"],
            gpus=tuple(rank["gpu"] for rank in ranks),
            one_server=self.host.alone,
            receipt=first["receipt"] and msgspec.convert(first["receipt"], EngineReceipt),
        )

    async def poisoned(self, timeout: float) -> str | None:
        """Why the engine refuses to generate, or None."""
        return (await self.status((), timeout)).poisoned

    async def begin(
        self,
        manifest: Manifest,
        holder: str,
        lease: float,
        timeout: float,
        address: str | None = None,
        id: str | None = None,
    ) -> Begun:
        id, deadline = id or secrets.token_hex(16), time.monotonic() + timeout
        encoded = msgspec.json.encode(manifest)
        in_place = manifest.staging == "none"
        early = None if in_place else address
        self._beginnings[id] = begun = asyncio.Event()
        try:
            ranks = await self._all(
                "begin", timeout, id=id, manifest=encoded, holder=holder, lease=lease, address=early
            )
            refuse_left_over(manifest, ranks)
            if in_place:
                self._standing = id
                _leave(asyncio.ensure_future(self._watch_stopped(id)))
                await self._stage_standing(id, address, deadline)
        except UsageError:
            raise  # of an id that another update has: that one goes on
        except (WeightwireError, asyncio.CancelledError) as error:
            await self.give_up(id, error, "another rank refused it, or its trainer hung up")
            raise
        finally:
            del self._beginnings[id]
            begun.set()
        self._lone_adapter = id if manifest.adapter is not None and len(ranks) == 1 else None
        return Begun(id=id, ranks=len(ranks))

    async def _stage_standing(self, id: str, address: str | None, deadline: float) -> None:
        """Have the engine stand still, and then the ranks fetch."""
        if address is not None and isinstance(self.host, CommitsAtOnce):
            asking = self.host.stage_at_once(encode_call(id=id, address=address))
            if (replies := await self._in_time(asking, deadline - time.monotonic(), "begin")) is not None:
                self._answers(replies, "stage")
                return
        await self._look(deadline - time.monotonic())
        await self._in_time(self.host.pause("keep", True), deadline - time.monotonic(), "begin")
        if address is not None:
            await self._all("stage", deadline - time.monotonic(), id=id, address=address)

    async def stage(self, id: str, address: str, timeout: float) -> None:
        await self._work("stage", timeout, id=id, address=address)

    async def put(self, id: str, index: int, body: bytes, timeout: float) -> None:
        await self._work("put", timeout, body=body, id=id, index=index)

    async def seal(self, id: str, digests: Sequence[str], timeout: float) -> None:
        # As long as every rank has just promised to hold it (`_patience`), with time to spare.
        until = time.monotonic() + _CLEAN_UP_SECONDS / 2
        ranks = await self._work("seal", timeout, id=id, digests=list(digests))
        self._sealed = (id, until) if ranks[0]["kind"] == "adapter" else None

    async def commit(
        self, id: str, pause: Pause, keep_cache: KeepCache, timeout: float, digests: Sequence[str] | None = None
    ) -> EngineReceipt:
        """Make it live; with `digests`, seal it first. It may be asked for while the update is still being begun. That
        the caller is gone breaks it off as long as it is being sealed, and what is one question with that is undone;
        from then on not: it either happened or it did not."""
        deadline = time.monotonic() + timeout
        if (begun := self._beginnings.get(id)) is not None:
            await self._in_time(begun.wait(), timeout, "begin")
            timeout = deadline - time.monotonic()
        if digests is None:
            return await asyncio.shield(self._commit(id, pause, keep_cache, deadline))
        if id == self._lone_adapter and await self._is_only_client(timeout):
            return await self._commit_adapter(id, deadline, digests)
        gone = asyncio.Event()
        work = asyncio.ensure_future(self._seal_and_commit(id, pause, keep_cache, deadline, digests, gone))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            gone.set()
            _leave(work)
            raise

    async def _seal_and_commit(
        self,
        id: str,
        pause: Pause,
        keep_cache: KeepCache,
        deadline: float,
        digests: Sequence[str],
        gone: asyncio.Event,
    ) -> EngineReceipt:
        timeout = deadline - time.monotonic()
        hold = timeout + _CLEAN_UP_SECONDS
        host, committed, unanswered = self.host, None, False

        async def ask(op: str, timeout: float, *, phase: str = "seal", **arguments: Any) -> list[Any]:
            nonlocal committed, unanswered
            if isinstance(host, CommitsAtOnce):
                asking = host.commit_at_once(pause, keep_cache, encode_call(id=id), (op, encode_call(**arguments)))
                unanswered = timeout > 0  # else it is not even asked
                # If no answer comes, nobody knows whether it is live: that is not the phase in which nothing changes.
                answer = await self._in_time(asking, timeout, "commit" if unanswered else phase)
                unanswered = False
                if answer is not None:
                    ranks = self._answers(answer.sealed, phase)
                    if answer.committed is None:
                        return ranks
                    committed = answer
                    # One that is committed has nothing more to do, whatever it was about to end as it answered.
                    return [{**rank, "busy": False} for rank in ranks]
            return await self._all(op, timeout, phase=phase, **arguments)

        try:
            ranks = await self._work("seal", timeout, hold=hold, ask=ask, gone=gone, id=id, digests=list(digests))
        except BaseException:
            if not unanswered:
                raise
            async with self._or_poisoned(id):  # nobody knows how far it came
                raise
        return await self._commit(id, pause, keep_cache, deadline, str(ranks[0]["kind"]), committed)

    async def _commit(
        self,
        id: str,
        pause: Pause,
        keep_cache: KeepCache,
        deadline: float,
        kind: str | None = None,
        found: AtOnce | None = None,
    ) -> EngineReceipt:
        """`kind`: of what was sealed just now. `found`: what was answered, where that was one question."""
        timeout = deadline - time.monotonic()
        # Asked before anything is paused: a commit that cannot succeed must not cost a pause. An adapter's costs none.
        if kind is None and self._is_sealed_adapter(id):
            kind = "adapter"
        if kind != "adapter" and found is None:
            kind, _ = await asyncio.gather(self._hold(id, timeout), self._look(timeout))
        if kind == "adapter":
            return await self._commit_adapter(id, deadline)
        async with self._or_poisoned(id):
            applied = await self._apply_at_once(id, pause, keep_cache, deadline, found)
            if applied is None:
                applied = await self._apply_step_by_step(id, pause, keep_cache, deadline)
            resumed = time.monotonic()
            proofs = await self._prove(id, deadline)
        receipt = self._receipt(applied, time.monotonic() - resumed, proofs)
        await self._record(id, receipt)
        return receipt

    @contextlib.asynccontextmanager
    async def _or_poisoned(self, id: str) -> AsyncIterator[None]:
        """After a commit that failed in here, engine and caller agree on what is served."""
        try:
            yield
        except BaseException as error:
            poisoned = await self._after_failed_commit(id)
            if poisoned is None or not isinstance(error, Exception) or isinstance(error, (PoisonedError, EngineLost)):
                raise
            raise PoisonedError(
                poisoned,
                engine=self.host.name,
                phase="commit",
                next_step="The engine refuses to generate. Publish a complete update to heal it.",
            ) from error

    async def _is_only_client(self, timeout: float) -> bool:
        """Whether no other API server has to find out about adapters: each of its requests waits while they change."""
        return bool((await self._in_time(self.host.in_use(), timeout, "seal")).get("clients", 1) == 1)

    def _is_sealed_adapter(self, id: str) -> bool:
        """Whether it was sealed from here a moment ago, so that every rank still holds it."""
        return self._sealed is not None and self._sealed[0] == id and time.monotonic() < self._sealed[1]

    async def _look(self, timeout: float) -> None:
        await self._in_time(self.host.before_pause(), timeout, "pause")

    async def _hold(self, id: str, timeout: float) -> str:
        """Make sure that every rank has sealed this update, and of which kind it is. From here on the lease cannot
        end, since a pause may have to wait for long requests."""
        hold = timeout + _CLEAN_UP_SECONDS
        ranks = await self._all("poll", timeout, phase="commit", id=id, hold=hold)
        if any(rank["state"] != "sealed" for rank in ranks):
            raise StateError("this update is not sealed", engine=self.host.name, next_step="Seal it first.")
        return str(ranks[0]["kind"])

    async def _commit_adapter(self, id: str, deadline: float, digests: Sequence[str] | None = None) -> EngineReceipt:
        """All ranks have the revision in the engine. They keep it together, and only then do new requests find it. With
        `digests` it is one rank, which seals it first, by the same question."""
        async with self._refreshing:
            phase = "commit" if digests is None else "seal"
            client = await self._in_time(self.host.in_use(), deadline - time.monotonic(), phase)
            parts: list[Any] = [None]
            try:
                if digests is not None:
                    left, linger = deadline - time.monotonic(), 4 * self._linger  # else the commit is another question
                    ranks = await self._work("seal", left, id=id, digests=list(digests), client=client, linger=linger)
                    parts = [rank.get("committed") for rank in ranks]
            finally:
                self.stale = True  # not before: while the rest is being fetched, requests need not wait
            try:
                if None in parts:
                    parts = await self._all("commit", deadline - time.monotonic(), id=id, client=client)
            except BaseException:
                await self._clean_up("abort", id=id, reason="another rank could not keep it")
                raise
            await self._list([part["adapters"] for part in parts])
        receipt = self._receipt(_Applied(parts, 0.0, 0.0), 0.0, [part["proof"] for part in parts])
        await self._record(id, receipt)
        return receipt

    async def refresh(self, timeout: float) -> None:
        """Let new requests on this side find the adapters that all ranks have. One at a time: what is reported as in
        use must be what the answer to the report before has listed."""
        async with self._refreshing:
            in_use = await self._in_time(self.host.in_use(), timeout, "adapters")
            await self._list(await self._all("adapters", timeout, **in_use))

    async def _list(self, ranks: Sequence[Any]) -> None:
        common = set.intersection(*({Revision(*revision) for revision in rank} for rank in ranks))
        listed = [revision for entry in ranks[0] if (revision := Revision(*entry)) in common]
        await self._in_time(self.host.list(listed), _CLEAN_UP_SECONDS, "adapters")
        self.stale = False

    async def unload(self, name: str, timeout: float) -> None:
        """Serve an adapter no more; requests in flight finish."""
        await self._all("unload", timeout, name=name)
        await self.refresh(timeout)

    async def _apply_at_once(
        self, id: str, pause: Pause, keep_cache: KeepCache, deadline: float, found: AtOnce | None
    ) -> _Applied | None:
        """None where that takes several questions. `found`: if they were asked already."""
        if not isinstance(self.host, CommitsAtOnce):
            return None
        self._ended.add(id)  # if the engine stands still for this update since it began, it will not any more
        if found is None:
            asking = self.host.commit_at_once(pause, keep_cache, encode_call(id=id))
            try:
                found = await self._in_time(asking, deadline - time.monotonic(), "commit")
            except BaseException:
                # Nobody knows how far it came. What is not live yet must not become so any more.
                self._ended.discard(id)
                await self._clean_up("abort", id=id, reason="its commit was not answered")
                raise
        if found is None or found.committed is None:
            self._ended.discard(id)
            return None
        try:
            parts = self._answers(found.committed, "commit")
        except BaseException as error:
            self._ended.discard(id)
            await self._take_back(id, error)
            raise
        if not any(part["stood"] for part in parts):
            self._ended.discard(id)
        return _Applied(parts, found.stood, found.after)

    async def _apply_step_by_step(self, id: str, pause: Pause, keep_cache: KeepCache, deadline: float) -> _Applied:
        started = time.monotonic()
        await self._in_time(self.host.pause(pause, keep_cache), deadline - time.monotonic(), "pause")
        parts, committed = await self._apply(id, deadline)
        if any(part["stood"] for part in parts):
            self._ended.add(id)
        await self._in_time(self.host.resume(), max(deadline - time.monotonic(), _CLEAN_UP_SECONDS), "commit")
        resumed = time.monotonic()
        return _Applied(parts, resumed - started, resumed - committed)

    async def _take_back(self, id: str, error: BaseException) -> None:
        """Some ranks may hold the new version, or outputs would bear the wrong one."""
        await self._clean_up("take_back", id=id, reason=f"a commit failed: {error}")

    async def _apply(self, id: str, deadline: float) -> tuple[list[dict[str, Any]], float]:
        """What each rank says, and when they had said it."""
        try:
            parts = await self._all("commit", deadline - time.monotonic(), id=id)
            committed = time.monotonic()
            # It is live: what is left to do gets its time, so that the engine stays neither paused nor mislabelled.
            left = max(deadline - time.monotonic(), _CLEAN_UP_SECONDS)
            await self._in_time(self.host.label(parts[0]["version"]), left, "commit")
        except BaseException as error:
            await self._take_back(id, error)
            raise
        return parts, committed

    async def _after_failed_commit(self, id: str) -> str | None:
        """Refuse to generate, and say why, or go on with what was served before. Only the workers know which."""
        try:
            poisoned = await self.poisoned(_CLEAN_UP_SECONDS)
            await self._look(_CLEAN_UP_SECONDS)
        except WeightwireError as lost:
            poisoned = f"its workers do not answer: {lost.message}"
        else:
            # A rank that the commit did not reach holds the update still, and for long.
            await self._clean_up("abort", id=id, reason="its commit failed")
        try:
            await self._in_time(
                self.host.refuse(poisoned) if poisoned else self.host.resume(), _CLEAN_UP_SECONDS, "commit"
            )
        except DeadlineError as late:
            logger.warning("weightwire: after a failed commit: %s", late)
        return poisoned

    async def _prove(self, id: str, deadline: float) -> list[dict[str, Any]]:
        pauses = self._pauses()
        # It is live and generating; a deadline that ends now must not hide that.
        deadline = max(deadline, time.monotonic() + _CLEAN_UP_SECONDS)
        while None in (
            ranks := await self._all("proof", deadline - time.monotonic(), phase="commit", id=id, linger=self._linger)
        ):
            await asyncio.sleep(next(pauses))
        return ranks

    async def _record(self, id: str, receipt: EngineReceipt) -> None:
        recorded = asyncio.ensure_future(self._clean_up("record", id=id, receipt=msgspec.to_builtins(receipt)))
        if self.host.in_order:
            # Whoever asks for it, asks later.
            await asyncio.sleep(0)
            _leave(recorded)
        else:
            # An `LLM` of this process takes one call at a time, and the next may be the trainer's own.
            await recorded

    def _receipt(self, applied: _Applied, verifying: float, proofs: list[dict[str, Any]]) -> EngineReceipt:
        parts = applied.parts
        # A phase takes as long as its slowest rank. While the last copy is on its way the engine counts as standing.
        seconds = {phase: max(part["seconds"][phase] for part in parts) for phase in parts[0]["seconds"]}
        late = max(proof["late"] for proof in proofs)
        left = max(late - applied.after, 0.0)
        stood = max(applied.stood, *(part["stood"] for part in parts)) + left
        seconds["commit"] += late
        seconds["verify"] = max(verifying - left, 0.0)
        return msgspec.convert(
            {**parts[0], "engine": self.host.name, "ranks": len(parts), "seconds": seconds, "pause": stood,
             "proven": weakest(proof["proven"] for proof in proofs),
             "computed": sorted({name for proof in proofs for name in proof["computed"]}),
             "held": [proof["held"] for proof in proofs if proof["held"] is not None]}, EngineReceipt,
        )  # fmt: skip

    async def abort(self, id: str, timeout: float) -> None:
        standing = self._standing
        was = await self._all("abort", timeout, id=id)
        if "reverted" in was:
            await self.refresh(timeout)
        if "stopped" in was:
            await self._go_on_or_refuse(timeout, standing)

    async def _watch_stopped(self, id: str) -> None:
        """An engine that stands still for an update must not do so for ever: if its trainer goes silent, nobody else
        hears of it."""
        while True:
            try:
                if ((await self.status((), _CLEAN_UP_SECONDS)).update or {}).get("id") != id:
                    break
            except EngineLost:
                return
            except WeightwireError as error:
                logger.warning("weightwire: whether the engine still stands still for an update: %s", error)
            await asyncio.sleep(_WATCH_SECONDS)
        if id not in self._ended:
            await self._go_on_or_refuse(_CLEAN_UP_SECONDS, id)
        self._ended.discard(id)

    async def _go_on_or_refuse(self, timeout: float, standing: str | None) -> None:
        """Unless by now the engine stands still for another update than `standing`: that one's watch takes care."""
        poisoned = await self.poisoned(timeout)
        await self._look(timeout)
        if self._standing == standing:
            await (self.host.refuse(poisoned) if poisoned else self.host.resume())

    async def give_up(self, id: str, error: BaseException, reason: str) -> None:
        """Abort, on the way out of a failure: what goes wrong in here is logged and no more."""
        task = asyncio.ensure_future(self._clean_up("abort", id=id, reason=reason))
        if isinstance(error, DeadlineError):
            # The trainer's time is over; workers that did not answer it are not waited for again.
            _leave(task)
        else:
            await task

    # -- asking every rank -----------------------------------------------------------------------------------------

    async def _work(
        self,
        op: str,
        timeout: float,
        *,
        body: bytes | None = None,
        hold: float = 0.0,
        ask: Callable[..., Awaitable[list[Any]]] | None = None,
        gone: asyncio.Event | None = None,
        **arguments: Any,
    ) -> list[Any]:
        """Start long work on every rank and wait for it: what each says at its end. What cannot be mended by calling
        again aborts the update, and so does `gone`. Its lease then lasts for another `hold` seconds at least. `ask`, if
        given, asks instead of `_all`."""
        id, deadline = arguments["id"], time.monotonic() + timeout
        ask = ask or self._all
        first = {**self._patience(op, hold), **arguments, **({} if body is None else {"body": body})}
        try:
            ranks, pauses = await ask(op, timeout, **first), self._pauses()
            while any(rank["busy"] for rank in ranks):
                if gone is not None and gone.is_set():
                    raise asyncio.CancelledError
                await asyncio.sleep(next(pauses))
                ranks = await ask("poll", deadline - time.monotonic(), phase=op, id=id, **self._patience(op, hold))
            return ranks
        except (StateError, ManifestError, UpdateNotFound):
            raise
        except WeightwireError as error:
            await self.give_up(id, error, error.message)
            raise
        except asyncio.CancelledError as error:
            await self.give_up(id, error, "the trainer hung up")
            raise

    def _pauses(self) -> Iterator[float]:
        """Seconds until each next question. A busy engine answers between two steps, and takes some 0.3 ms for it; one
        that answers beside its steps, which is not known here, has mostly done all by the second."""
        yield 0.001
        busy = 0.004
        while True:
            yield 0.001 if self.host.idle else busy
            busy = min(busy * 1.5, 0.02)

    @property
    def _linger(self) -> float:
        # Each question costs all processes on the way some time, of which the threads that do our work get less then.
        return _LINGER_SECONDS if self.host.idle else 0.0

    def _patience(self, phase: str, hold: float) -> dict[str, Any]:
        """Arguments of `Receiver.poll`: how long it may take to answer, and how long the lease lasts from then on."""
        # While bytes arrive they keep the lease; while an engine makes ready, whoever waits for it here does.
        return {"linger": self._linger, "hold": max(hold, _CLEAN_UP_SECONDS if phase == "seal" else 0.0)}

    async def _all(
        self, op: str, timeout: float, *, phase: str | None = None, body: bytes | None = None, **arguments: Any
    ) -> list[Any]:
        """Every rank's answer, or the first error of any."""
        phase = phase or op
        return self._answers(
            await self._in_time(self.host.call(op, encode_call(**arguments), body, timeout), timeout, phase), phase
        )

    def _answers(self, replies: Sequence[bytes], phase: str) -> list[Any]:
        answers: list[Any] = []
        errors: list[WeightwireError] = []
        for reply in replies:
            try:
                answers.append(decode_reply(reply))
            except WeightwireError as error:
                errors.append(error)
        if errors:
            raise errors[0].at(engine=self.host.name, phase=phase)
        return answers

    async def _clean_up(self, op: str, **arguments: Any) -> None:
        try:
            await self._all(op, _CLEAN_UP_SECONDS, **arguments)
        except WeightwireError as error:
            logger.warning("weightwire: could not %s: %s", op, error)

    async def _in_time(self, work: Awaitable[T], timeout: float, phase: str) -> T:
        try:
            # Nothing is begun when no time is left, however quick it might be.
            return await asyncio.wait_for(work, timeout)
        except TimeoutError as error:
            raise DeadlineError(
                f"no answer within {max(timeout, 0):.1f} s",
                engine=self.host.name,
                phase=phase,
                next_step="The engine is stuck or its workers are gone; look at its log.",
            ) from error


def _leave(task: asyncio.Future[Any]) -> None:
    """To itself: nobody waits for it, but something must refer to it until it is done."""
    _unwaited.add(task)

    def over(task: asyncio.Future[Any]) -> None:
        _unwaited.discard(task)
        if not task.cancelled():
            task.exception()  # has been seen

    task.add_done_callback(over)


def refuse_left_over(manifest: Manifest, ranks: Sequence[Any]) -> None:
    """Raise when there are elements that no rank takes. vLLM's loaders take a slice out of a tensor that is too large,
    and say nothing."""
    if any(takes is None for takes in ranks):
        return
    for number, spec in enumerate(manifest.tensors):
        # Ranks that hold the same part hold it alike; different parts do not overlap.
        boxes = {(tuple(start), tuple(shape)) for takes in ranks for start, shape in takes[number]}
        taken = sum(math.prod(shape) for _, shape in boxes)
        if taken < spec.numel:
            raise ShapeMismatch(
                f"{spec.name} has {spec.numel} elements, of which the model takes {taken}",
                next_step="Publish a model of the same architecture.",
            )
