"""One update through all ranks of an engine: the strictest answer counts, and no rank is left behind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest
import torch

from weightwire.engines.control import AtOnce, Control, _Applied
from weightwire.errors import (
    BusyError,
    DeadlineError,
    EngineError,
    EngineLost,
    PoisonedError,
    RoomError,
    ShapeMismatch,
    StateError,
    TransportError,
    UpdateNotFound,
    VerificationError,
    WeightwireError,
)
from weightwire.receiver import Arrivals, Receiver, decode_reply, encode_call
from weightwire.updates.boxes import Box
from weightwire.updates.buckets import cut
from weightwire.updates.digest import scan
from weightwire.updates.manifest import Manifest, TensorSpec

pytestmark = pytest.mark.usefixtures("no_threads_left")

SPEC = TensorSpec(name="w", dtype="float32", shape=(2000,))
SECONDS = 60.0
SOON = 0.3


def manifest_of(version: int, *, partial: bool = False) -> Manifest:
    return Manifest(version=version, tensors=(SPEC,), bucket_bytes=4096, partial=partial)


def weights_of(version: int) -> torch.Tensor:
    return torch.full((2000,), float(version))


def digests_of(version: int) -> list[str]:
    return [scan(weights_of(version)).digest.hex()]


class Rank:
    """A rank's model: one tensor. `refuse`, `break_at` and `room_left` say what goes wrong there, `takes` what
    part of the tensor goes anywhere."""

    adapter_dtype = None

    def __init__(self) -> None:
        self.live = weights_of(0)
        self.refuse: WeightwireError | None = None
        self.break_at: str | None = None
        self.room_left = 1 << 20
        self.takes: list[list[Box]] | None = None

    def prepare(self, manifest: Manifest) -> Staged:
        if self.refuse is not None:
            raise self.refuse
        staged = Staged(self)
        if manifest.staging == "none":
            staged._staged = self.live
        return staged

    def room(self) -> int:
        return self.room_left


class Staged:
    nbytes = 8000

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self.takes = rank.takes
        self._staged = torch.zeros(2000)

    def write(self, tensor: int, start: int, data: torch.Tensor) -> None:
        self._staged[start : start + data.numel()] = data

    def lend(self, tensor: int, data: torch.Tensor) -> None:
        self.write(tensor, 0, data.reshape(-1))

    def seal(self, scans: Sequence[Any]) -> None:
        self._break("seal")

    def check(self, seconds: float) -> bool:
        return True

    def commit(self) -> None:
        self._break("commit")
        self._rank.live.copy_(self._staged)

    def proof(self) -> dict[str, str]:
        self._break("proof")
        return {"w": "asked" if self._rank.break_at == "weakly" else "read back"}

    def discard(self) -> None:
        pass

    def _break(self, step: str) -> None:
        if self._rank.break_at == step:
            raise RuntimeError(f"{step} broke")


class FakeHost:
    """An engine of several ranks. `hooks` may stand in for any of its methods; `log` is what was asked of it."""

    name = "fake"
    model = "a model"
    idle = False
    alone = in_order = False

    def __init__(self, ranks: int) -> None:
        self.ranks = [Rank() for _ in range(ranks)]
        self.hours = 0.0
        self.sent = threading.Event()
        self.receivers = [Receiver(rank, self.fetch, rank=i, clock=self.clock) for i, rank in enumerate(self.ranks)]
        self.hooks: dict[str, Callable[[], Awaitable[None]]] = {}
        self.log: list[str] = []
        self.refusal: str | None = None
        self.paused = False
        self.version: int | None = None

    def clock(self) -> float:
        return time.time() + 3600 * self.hours

    def fetch(self, address: str, arrivals: Arrivals) -> Iterator[tuple[int, torch.Tensor]]:
        weights = weights_of(int(address.partition(":")[2] or 0))
        for bucket in arrivals.buckets:
            while address.startswith("never"):
                if arrivals.cancelled.wait(0.01):
                    raise TransportError("aborted")
            if address.startswith("late"):
                assert self.sent.wait(SECONDS)
            if address.startswith("lost"):
                raise TransportError("the trainer is gone")
            (piece,) = bucket.pieces
            yield bucket.index, weights[piece.start : piece.start + piece.count].view(torch.uint8).clone()

    async def call(self, op: str, arguments: bytes, body: bytes | None, timeout: float) -> list[bytes]:
        await self._hook(op)
        self.log.append(op)
        calls = [asyncio.to_thread(receiver.handle, op, arguments, body) for receiver in self.receivers]
        return list(await asyncio.gather(*calls))

    async def before_pause(self) -> None:
        await self._hook("look")
        self.log.append("look")

    async def pause(self, mode: str, keep_cache: Any) -> None:
        await self._hook("pause")
        self.log.append(f"pause {mode} {keep_cache}")
        self.paused = True

    async def resume(self) -> None:
        await self._hook("resume")
        self.log.append("resume")
        self.paused, self.refusal = False, None

    async def refuse(self, reason: str) -> None:
        self.log.append("refuse")
        self.refusal = reason

    async def label(self, version: int) -> None:
        await self._hook("label")
        self.version = version

    async def _hook(self, name: str) -> None:
        if name in self.hooks:
            await self.hooks[name]()

    def live(self) -> list[float]:
        """What every rank holds, which is one value all over."""
        assert all(len(set(rank.live.tolist())) == 1 for rank in self.ranks)
        return [float(rank.live[0]) for rank in self.ranks]

    def states(self) -> set[str]:
        return {receiver.status()["state"] for receiver in self.receivers}


@pytest.fixture
def host() -> Iterator[FakeHost]:
    made = FakeHost(3)
    yield made
    for receiver in made.receivers:
        receiver.close()


async def seal(control: Control, version: int, *, lease: float = SECONDS, partial: bool = False) -> str:
    id = (await control.begin(manifest_of(version, partial=partial), "trainer", lease, SECONDS)).id
    await control.stage(id, f"test:{version}", SECONDS)
    await control.seal(id, digests_of(version), SECONDS)
    return id


async def update(control: Control, version: int, *, timeout: float = SECONDS, **options: Any) -> Any:
    return await control.commit(await seal(control, version, **options), "keep", False, timeout)


async def never() -> None:
    await asyncio.sleep(3600)


async def breaks() -> None:
    raise RuntimeError("the host broke")


async def heals(control: Control, host: FakeHost, version: int) -> None:
    """The next complete update succeeds, and the engine generates."""
    await update(control, version)
    assert host.live() == [version] * 3
    assert (host.states(), host.refusal, host.paused) == ({"idle"}, None, False)


# -- what goes well ------------------------------------------------------------------------------------------------


def test_an_engine_is_looked_at_when_all_is_sealed(host: FakeHost) -> None:
    async def run() -> Any:
        control = Control(host)
        id = (await control.begin(manifest_of(7), "trainer", SECONDS, SECONDS, "late:7")).id
        committing = asyncio.ensure_future(control.commit(id, "keep", False, SECONDS, digests_of(7)))
        while host.log.count("poll") < 2:
            await asyncio.sleep(0.01)
        assert host.log.count("look") == 0
        host.sent.set()
        return await committing

    asyncio.run(run())
    before = host.log[: host.log.index("pause keep False")]
    assert before.count("look") == 1
    assert before[-2:] in (["poll", "look"], ["look", "poll"])


def test_a_lease_does_not_end_in_a_commit_that_seals_and_has_to_wait(host: FakeHost) -> None:
    async def a_long_one() -> None:
        host.hours += 0.5
        assert host.states() == {"sealed"}

    async def run() -> Any:
        control, host.hooks["pause"] = Control(host), a_long_one
        id = (await control.begin(manifest_of(7), "trainer", 1.0, SECONDS, "test:7")).id
        return await control.commit(id, "keep", False, 3600.0, digests_of(7))

    assert asyncio.run(run()).version == 7
    assert host.live() == [7.0] * 3


def test_every_rank_gets_it_and_the_weakest_proof_counts(host: FakeHost) -> None:
    async def run() -> None:
        host.ranks[1].break_at = "weakly"
        control = Control(host)
        receipt = await update(control, 7)
        assert host.live() == [7.0] * 3
        assert host.version == 7
        assert (receipt.engine, receipt.version, receipt.ranks, receipt.transport) == ("fake", 7, 3, "test")
        assert receipt.proven == {"w": "asked"}
        assert receipt.digests == {"w": digests_of(7)[0]}
        assert receipt.seconds.keys() == {"begin", "stage", "seal", "commit", "verify"}
        status = await control.status((), SECONDS)
        assert (status.version, status.state, status.ranks, status.receipt) == (7, "idle", 3, receipt)
        assert "pause keep False" in host.log
        assert not host.paused

    asyncio.run(run())


class Queued(Staged):
    """Whose commit is still on its way when the engine goes on."""

    def finish(self) -> bool:
        time.sleep(0.2)
        return True


def test_an_engine_stands_still_until_the_last_rank_has_the_weights(host: FakeHost) -> None:
    rank = host.ranks[1]
    rank.prepare = lambda manifest: Queued(rank)  # type: ignore[method-assign]
    receipt = asyncio.run(update(Control(host), 7))
    assert receipt.pause >= 0.2
    assert receipt.seconds["commit"] >= 0.2
    assert receipt.seconds["verify"] >= 0


@pytest.mark.parametrize(("late", "pause", "verify"), [(0.5, 1.0, 2.0), (1.0, 1.25, 1.75), (9.0, 9.25, 0.0)])
def test_what_the_engine_stood_anyway_is_not_counted_twice(
    host: FakeHost, late: float, pause: float, verify: float
) -> None:
    """It stood for a second, three quarters of it after the commit; the receipt was made two seconds later."""
    part = {"version": 7, "kind": "dense", "transport": "shm", "tensors": 1, "nbytes": 4, "stood": 0.0, "digests": {},
            "adapter": None, "seconds": {"begin": 0.0, "stage": 0.0, "seal": 0.0, "commit": 0.125}}  # fmt: skip
    proof = {"proven": {}, "held": None, "computed": [], "late": late}
    receipt = Control(host)._receipt(_Applied([part], 1.0, 0.75), 2.0, [proof])
    assert (receipt.pause, receipt.seconds["verify"]) == (pause, verify)
    assert receipt.seconds["commit"] == 0.125 + late


def test_a_busy_engine_is_asked_less_often(host: FakeHost) -> None:
    pauses = Control(host)._pauses()
    busy = [next(pauses) for _ in range(8)]
    assert (*busy[:2], busy[-1]) == (0.001, 0.004, 0.02)
    assert busy == sorted(busy)
    host.idle = True
    assert next(pauses) == 0.001


async def eventually(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not happened():
            await asyncio.sleep(0.01)


def direct(version: int) -> Manifest:
    return msgspec.structs.replace(manifest_of(version), staging="none")


def test_without_a_staged_copy_the_engine_stands_still_from_the_beginning(host: FakeHost) -> None:
    async def run() -> None:
        control = Control(host)
        id = (await control.begin(direct(7), "trainer", SECONDS, SECONDS)).id
        assert host.paused
        await control.stage(id, "test:7", SECONDS)
        assert host.live() == [7.0] * 3  # before it is verified, which is what was asked for
        assert (await control.status((), SECONDS)).poisoned
        await control.seal(id, digests_of(7), SECONDS)
        receipt = await control.commit(id, "keep", False, SECONDS)
        assert receipt.pause >= receipt.seconds["stage"]
        assert (host.states(), host.refusal, host.paused, host.version) == ({"idle"}, None, False, 7)
        await asyncio.sleep(1.2)  # the watch over it has nothing more to do
        assert host.log.count("resume") == 1

    asyncio.run(run())


def test_given_where_to_fetch_an_engine_does_so_from_the_beginning(host: FakeHost) -> None:
    async def run() -> None:
        control = Control(host)
        id = (await control.begin(manifest_of(7), "trainer", SECONDS, SECONDS, "test:7")).id
        await control.stage(id, "test:7", SECONDS)  # waits for it, and does not begin again
        await control.seal(id, digests_of(7), SECONDS)
        await control.stage(id, "test:7", SECONDS)
        await control.commit(id, "keep", False, SECONDS)
        assert host.live() == [7.0] * 3
        id = (await control.begin(direct(8), "trainer", SECONDS, SECONDS, "test:8")).id
        paused = host.log.index("pause keep True", -4)  # before anything is fetched
        assert "stage" in host.log[paused:]
        await control.seal(id, digests_of(8), SECONDS)
        await control.commit(id, "keep", False, SECONDS)
        assert host.live() == [8.0] * 3

    asyncio.run(run())


@pytest.mark.parametrize("right", [True, False])
def test_sealed_while_it_is_fetched_an_update_is_verified_once_all_is_there(host: FakeHost, right: bool) -> None:
    async def run() -> None:
        control = Control(host)
        id = (await control.begin(manifest_of(7), "trainer", SECONDS, SECONDS, "late:7")).id
        sealing = asyncio.ensure_future(control.seal(id, digests_of(7 if right else 6), SECONDS))
        await eventually(lambda: "seal" in host.log)
        with pytest.raises(StateError, match="have not arrived"):
            await control.seal(id, digests_of(7), SECONDS)  # a second time
        assert not sealing.done()
        host.sent.set()
        if right:
            await sealing
            await control.commit(id, "keep", False, SECONDS)
            assert host.live() == [7.0] * 3
        else:
            with pytest.raises(VerificationError):
                await sealing
            assert (host.live(), host.states()) == ([0.0] * 3, {"idle"})

    asyncio.run(run())


def test_what_fails_while_it_is_fetched_is_told_to_who_seals(host: FakeHost) -> None:
    async def run() -> None:
        control = Control(host)
        id = (await control.begin(manifest_of(7), "trainer", SECONDS, SECONDS, "lost:7")).id
        with pytest.raises(TransportError, match="the trainer is gone") as caught:
            await control.seal(id, digests_of(7), SECONDS)
        assert caught.value.phase == "stage"
        await heals(control, host, 8)

    asyncio.run(run())


def test_a_receipt_is_there_for_whoever_asks_after_the_commit(host: FakeHost) -> None:
    async def run() -> None:
        control = Control(host)
        for version in (1, 2):
            receipt = await update(control, version)
            assert (await control.status((), SECONDS)).receipt == receipt

    asyncio.run(run())


def test_aborted_before_anything_was_written_the_engine_goes_on(host: FakeHost) -> None:
    async def run() -> None:
        control = Control(host)
        id = (await control.begin(direct(7), "trainer", SECONDS, SECONDS)).id
        await control.abort(id, SECONDS)
        assert (host.paused, host.refusal, host.live()) == (False, None, [0.0] * 3)
        await heals(control, host, 8)

    asyncio.run(run())


def test_what_comes_after_an_abort_is_written_nowhere(host: FakeHost) -> None:
    async def run() -> None:
        control, receiver = Control(host), host.receivers[0]
        id = (await control.begin(direct(7), "trainer", SECONDS, SECONDS)).id
        update = receiver._update
        assert update is not None
        await control.abort(id, SECONDS)
        with pytest.raises(TransportError, match="aborted before anything was written"):
            receiver._take(update, [(0, torch.ones(4096, dtype=torch.uint8))])
        assert (host.live(), host.states(), host.paused) == ([0.0] * 3, {"idle"}, False)

    asyncio.run(run())


def test_aborted_in_the_middle_the_engine_refuses_until_it_is_healed(host: FakeHost) -> None:
    async def run() -> None:
        control = Control(host)
        id = (await control.begin(direct(7), "trainer", SECONDS, SECONDS)).id
        await control.put(id, 0, bytes(4096), SECONDS)
        await control.abort(id, SECONDS)
        assert "version 7 is being written" in (host.refusal or "")
        with pytest.raises(PoisonedError):
            await control.begin(manifest_of(8, partial=True), "trainer", SECONDS, SECONDS)
        await heals(control, host, 7)

    asyncio.run(run())


def test_digests_that_differ_leave_it_refusing(host: FakeHost) -> None:
    async def run() -> None:
        control = Control(host)
        id = (await control.begin(direct(7), "trainer", SECONDS, SECONDS)).id
        await control.stage(id, "test:6", SECONDS)
        with pytest.raises(VerificationError):
            await control.seal(id, digests_of(7), SECONDS)
        await eventually(lambda: host.refusal is not None)
        await heals(control, host, 8)

    asyncio.run(run())


def test_a_trainer_that_goes_silent_does_not_stop_the_engine_for_ever(host: FakeHost) -> None:
    async def run() -> None:
        control = Control(host)
        await control.begin(direct(7), "trainer", SECONDS, SECONDS)
        host.hours = 1.0
        await eventually(lambda: not host.paused)
        id = (await control.begin(direct(8), "trainer", SECONDS, SECONDS)).id
        await control.put(id, 0, bytes(4096), SECONDS)
        host.hours = 2.0
        await eventually(lambda: host.refusal is not None)
        await heals(control, host, 9)

    asyncio.run(run())


def test_bodies_handed_over_go_to_every_rank(host: FakeHost) -> None:
    async def run() -> None:
        control = Control(host)
        id = (await control.begin(manifest_of(3), "trainer", SECONDS, SECONDS)).id
        data = weights_of(3).view(torch.uint8).numpy().tobytes()
        for bucket in cut(manifest_of(3)):
            await control.put(id, bucket.index, data[4096 * bucket.index :][: bucket.nbytes], SECONDS)
        await control.seal(id, digests_of(3), SECONDS)
        assert (await control.commit(id, "wait", True, SECONDS)).transport == "http"
        assert host.live() == [3.0] * 3
        assert "pause wait True" in host.log

    asyncio.run(run())


def test_an_offer_counts_when_every_rank_can_use_it(host: FakeHost) -> None:
    async def run() -> None:
        host.receivers[2]._probe = lambda offer: "not from here" if offer == "b:" else None
        status = await Control(host).status(["a:", "b:"], SECONDS)
        assert status.offers == {"a:": None, "b:": "not from here"}

    asyncio.run(run())


def test_ranks_that_disagree_are_poisoned(host: FakeHost) -> None:
    async def run() -> None:
        host.receivers[1]._version = 5
        status = await Control(host).status((), SECONDS)
        assert status.state == "poisoned"
        assert "ranks disagree on the version" in (status.poisoned or "")

    asyncio.run(run())


# -- one rank that fails -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("what", ["refuse", "room"])
def test_one_rank_that_refuses_frees_all(host: FakeHost, rank: int, what: str) -> None:
    async def run() -> None:
        control, one = Control(host), host.ranks[rank]
        one.refuse = ShapeMismatch("w is smaller here") if what == "refuse" else None
        one.room_left = 0 if what == "room" else one.room_left
        with pytest.raises(ShapeMismatch if what == "refuse" else RoomError) as caught:
            await control.begin(manifest_of(1), "trainer", SECONDS, SECONDS)
        assert (caught.value.engine, caught.value.phase) == ("fake", "begin")
        assert host.states() == {"idle"}
        one.refuse, one.room_left = None, 1 << 20
        await heals(control, host, 1)

    asyncio.run(run())


def test_what_no_rank_takes_is_refused(host: FakeHost) -> None:
    async def run() -> None:
        control = Control(host)
        for index, rank in enumerate(host.ranks):
            rank.takes = [[Box((600 * index,), (600,))]]
        with pytest.raises(ShapeMismatch, match="w has 2000 elements, of which the model takes 1800"):
            await control.begin(manifest_of(1), "trainer", SECONDS, SECONDS)
        assert host.states() == {"idle"}
        host.ranks[0].takes = [[Box((0,), (600,)), Box((1800,), (200,))]]
        await heals(control, host, 1)

    asyncio.run(run())


@pytest.mark.parametrize("step", ["fetch", "seal", "digest"])
def test_one_rank_that_fails_before_the_commit_frees_all(host: FakeHost, step: str) -> None:
    async def run() -> None:
        control = Control(host)
        id = (await control.begin(manifest_of(1), "trainer", SECONDS, SECONDS)).id
        if step == "fetch":
            host.receivers[1]._fetch = lambda *_: iter([(0, torch.zeros(1, dtype=torch.uint8))])
        if step == "digest":
            host.receivers[1]._fetch = lambda _, arrivals: host.fetch("test:2", arrivals)
        if step == "seal":
            host.ranks[1].break_at = "seal"

        async def stage_and_seal() -> None:
            await control.stage(id, "test:1", SECONDS)
            await control.seal(id, digests_of(1), SECONDS)

        with pytest.raises(WeightwireError) as caught:
            await stage_and_seal()
        assert (caught.value.engine, caught.value.phase) == ("fake", "stage" if step == "fetch" else "seal")
        assert isinstance(caught.value, VerificationError) == (step == "digest")
        assert "rank 1" in str(caught.value)
        assert host.states() == {"idle"}
        assert host.live() == [0.0] * 3
        assert not any(entry.startswith("pause") for entry in host.log)
        host.receivers[1]._fetch, host.ranks[1].break_at = host.fetch, None
        await heals(control, host, 1)

    asyncio.run(run())


@pytest.mark.parametrize("step", ["commit", "proof"])
def test_one_rank_that_fails_in_the_commit_poisons_all(host: FakeHost, step: str) -> None:
    async def run() -> None:
        control = Control(host)
        await update(control, 1)
        host.ranks[2].break_at = step
        with pytest.raises(PoisonedError, match=f"{step} broke") as caught:
            await update(control, 2)
        assert (caught.value.engine, caught.value.phase) == ("fake", "commit")
        assert f"{step} broke" in str(host.refusal)
        assert (await control.status((), SECONDS)).state == "poisoned"
        host.ranks[2].break_at = None
        with pytest.raises(PoisonedError, match="cannot heal"):
            await control.begin(manifest_of(3, partial=True), "trainer", SECONDS, SECONDS)
        await heals(control, host, 3)

    asyncio.run(run())


def test_a_partial_update_cannot_heal_what_another_rank_broke(host: FakeHost) -> None:
    async def run() -> None:
        control = Control(host)
        id = await seal(control, 1, partial=True)
        host.receivers[0].poison("rank 0 only")
        with pytest.raises(PoisonedError):
            await control.commit(id, "keep", False, SECONDS)
        assert "rank 0 only" in str(host.refusal)
        await heals(control, host, 2)

    asyncio.run(run())


# -- the wrong call, and the wrong time ----------------------------------------------------------------------------


def test_a_commit_that_cannot_succeed_costs_no_pause(host: FakeHost) -> None:
    async def run() -> None:
        control = Control(host)
        id = (await control.begin(manifest_of(1), "trainer", SECONDS, SECONDS)).id
        with pytest.raises(StateError, match="not sealed"):
            await control.commit(id, "keep", False, SECONDS)
        with pytest.raises(UpdateNotFound):
            await control.commit("0" * 32, "keep", False, SECONDS)
        assert not any(entry.startswith("pause") for entry in host.log)
        await control.abort(id, SECONDS)
        await heals(control, host, 1)

    asyncio.run(run())


def test_a_seal_too_early_can_be_mended(host: FakeHost) -> None:
    async def run() -> None:
        control = Control(host)
        id = (await control.begin(manifest_of(1), "trainer", SECONDS, SECONDS)).id
        with pytest.raises(StateError, match="2 of 2 buckets have not arrived"):
            await control.seal(id, digests_of(1), SECONDS)
        await control.stage(id, "test:1", SECONDS)
        await control.seal(id, digests_of(1), SECONDS)
        await control.commit(id, "keep", False, SECONDS)
        assert host.live() == [1.0] * 3

    asyncio.run(run())


def test_who_comes_second_disturbs_nobody(host: FakeHost) -> None:
    async def run() -> None:
        control = Control(host)
        id = await seal(control, 1)
        with pytest.raises(BusyError, match="held by trainer"):
            await control.begin(manifest_of(2), "another", SECONDS, SECONDS)
        await control.commit(id, "keep", False, SECONDS)
        assert host.live() == [1.0] * 3

    asyncio.run(run())


# -- time ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["begin", "stage", "seal"])
def test_ranks_that_do_not_answer_are_named_in_time(host: FakeHost, op: str) -> None:
    async def run() -> None:
        control = Control(host)
        id = "" if op == "begin" else (await control.begin(manifest_of(1), "trainer", SECONDS, SECONDS)).id
        if op == "seal":
            await control.stage(id, "test:1", SECONDS)
        host.hooks[op] = never
        calls = {
            "begin": lambda: control.begin(manifest_of(1), "trainer", SECONDS, SOON),
            "stage": lambda: control.stage(id, "test:1", SOON),
            "seal": lambda: control.seal(id, digests_of(1), SOON),
        }
        started = time.monotonic()
        with pytest.raises(DeadlineError, match=r"no answer within 0\.\d s") as caught:
            await calls[op]()
        # And not after the 20 s that cleaning up may take.
        assert time.monotonic() - started < 15
        assert (caught.value.engine, caught.value.phase) == ("fake", op)
        host.hooks.clear()
        await becomes(lambda: host.states() == {"idle"})
        await heals(control, host, 1)

    asyncio.run(run())


def test_buckets_that_never_come_end_the_update_in_time(host: FakeHost) -> None:
    async def run() -> None:
        control = Control(host)
        id = (await control.begin(manifest_of(1), "trainer", SECONDS, SECONDS)).id
        with pytest.raises(DeadlineError) as caught:
            await control.stage(id, "never:", SOON)
        assert (caught.value.engine, caught.value.phase) == ("fake", "stage")
        await becomes(lambda: host.states() == {"idle"})
        await heals(control, host, 1)

    asyncio.run(run())


@pytest.mark.parametrize("op", ["begin", "stage"])
def test_a_trainer_that_hangs_up_frees_all_ranks(host: FakeHost, op: str) -> None:
    async def run() -> None:
        control = Control(host)
        reached = asyncio.Event()

        async def slowly() -> None:
            reached.set()
            await asyncio.sleep(0.5)

        if op == "begin":
            # The ranks take it, and the answer is what comes too late.
            host.hooks["begin"] = slowly
            call = control.begin(manifest_of(1), "trainer", SECONDS, SECONDS)
        else:
            id = (await control.begin(manifest_of(1), "trainer", SECONDS, SECONDS)).id
            host.hooks["poll"] = slowly
            call = control.stage(id, "never:", SECONDS)
        task = asyncio.ensure_future(call)
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        host.hooks.clear()
        await becomes(lambda: host.states() == {"idle"})
        await heals(control, host, 1)

    asyncio.run(run())


def test_a_long_pause_outlasts_the_lease(host: FakeHost) -> None:
    async def run() -> None:
        async def long() -> None:
            host.hours += 0.5

        control = Control(host)
        host.hooks["pause"] = long
        await update(control, 1, lease=SECONDS, timeout=3600.0)
        assert host.live() == [1.0] * 3
        assert host.states() == {"idle"}

    asyncio.run(run())


def test_a_pause_that_fails_changes_nothing_and_frees_all(host: FakeHost) -> None:
    async def run() -> None:
        control = Control(host)
        for hook, kind, seconds in ((never, DeadlineError, 1.0), (breaks, RuntimeError, SECONDS)):
            host.hooks["pause"] = hook
            id = await seal(control, 1)
            with pytest.raises(kind):
                await control.commit(id, "keep", False, seconds)
            assert host.live() == [0.0] * 3
            assert (host.states(), host.refusal, host.log[-1]) == ({"idle"}, None, "resume")
        host.hooks.clear()
        await heals(control, host, 1)

    asyncio.run(run())


@pytest.mark.parametrize("what", ["commit", "label", "resume"])
@pytest.mark.parametrize("hook", [never, breaks])
def test_what_fails_once_ranks_may_have_changed_never_leaves_the_engine_paused(
    host: FakeHost, what: str, hook: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightwire.engines.control._CLEAN_UP_SECONDS", 1.0)

    async def once() -> None:
        del host.hooks[what]
        await hook()

    async def run() -> None:
        control = Control(host)
        id = await seal(control, 1)
        host.hooks[what] = once
        with pytest.raises((PoisonedError, DeadlineError, RuntimeError)) as caught:
            await control.commit(id, "keep", False, 1.0 if hook is never else SECONDS)
        status = await control.status((), SECONDS)
        if what == "resume":
            # The ranks hold the new version, all of them, and are told to go on once more.
            assert (status.version, status.state, host.refusal, host.paused) == (1, "idle", None, False)
        else:
            assert isinstance(caught.value, PoisonedError)
            assert status.poisoned
            assert host.refusal
        await heals(control, host, 2)

    asyncio.run(run())


def test_workers_that_are_gone_after_a_commit_are_refused(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightwire.engines.control._CLEAN_UP_SECONDS", 1.0)

    async def gone() -> None:
        raise EngineLost("its workers are gone")

    async def run() -> None:
        control = Control(host)
        id = await seal(control, 1)
        host.hooks |= dict.fromkeys(("commit", "poison", "status"), gone)
        with pytest.raises(EngineLost, match="its workers are gone"):
            await control.commit(id, "keep", False, SECONDS)
        assert "its workers are gone" in str(host.refusal)

    asyncio.run(run())


def test_a_record_that_is_lost_is_no_failed_commit(host: FakeHost) -> None:
    async def run() -> None:
        control = Control(host)

        async def lost() -> None:
            raise EngineLost("gone for a moment")

        host.hooks["record"] = lost
        assert (await update(control, 1)).version == 1
        assert host.live() == [1.0] * 3

    asyncio.run(run())


async def becomes(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not ready():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


# -- hosts that commit by one question ---------------------------------------------------------------------------------


class AsksOnce(FakeHost):
    """Does what vLLM's engine core does when it is asked once."""

    able = True

    async def commit_at_once(
        self, mode: str, keep_cache: Any, arguments: bytes, sealing: tuple[str, bytes] | None = None
    ) -> AtOnce | None:
        self.log.append("at once")
        if not self.able or mode != "keep":
            return None
        sealed: list[bytes] = []
        if sealing is not None:
            sealed = await self.call(*sealing, None, SECONDS)
            found = [msgspec.msgpack.decode(reply).get("ok") for reply in sealed]
            if not all(each and each["state"] == "sealed" for each in found):
                return AtOnce(sealed, None, 0.0)
        self.paused = True
        await self._hook("paused")
        replies = await self.call("commit", arguments, None, SECONDS)
        if all("ok" in msgspec.msgpack.decode(reply) for reply in replies):
            self.version = int(decode_reply(replies[0])["version"])
            self.paused, self.refusal = False, None
        return AtOnce(sealed, replies, 0.25)

    async def stage_at_once(self, arguments: bytes) -> list[bytes] | None:
        if not self.able:
            return None
        self.log.append("stage at once")
        self.paused = True
        return await self.call("stage", arguments, None, SECONDS)


@pytest.fixture
def at_once() -> Iterator[AsksOnce]:
    made = AsksOnce(3)
    yield made
    for receiver in made.receivers:
        receiver.close()


def test_an_engine_that_can_is_asked_once_to_commit(at_once: AsksOnce) -> None:
    async def run() -> None:
        receipt = await update(Control(at_once), 7)
        assert (receipt.version, receipt.pause) == (7, 0.25)
        assert (at_once.live(), at_once.states(), at_once.version) == ([7.0] * 3, {"idle"}, 7)
        assert not {"resume", "label"} & set(at_once.log)
        assert not any(asked.startswith("pause") for asked in at_once.log)

    asyncio.run(run())


@pytest.mark.parametrize("mode", ["keep", "wait"])
def test_an_engine_that_cannot_is_asked_step_by_step(at_once: AsksOnce, mode: Any) -> None:
    async def run() -> None:
        at_once.able = mode != "keep"
        control = Control(at_once)
        await control.commit(await seal(control, 7), mode, False, SECONDS)
        assert [asked for asked in at_once.log if asked in ("at once", "commit", "resume") or "pause" in asked] == [
            "at once", f"pause {mode} False", "commit", "resume",
        ]  # fmt: skip
        assert (at_once.live(), at_once.paused, at_once.version) == ([7.0] * 3, False, 7)

    asyncio.run(run())


async def sealed_and_committed(control: Control, version: int, *, address: str = "test", **how: Any) -> Any:
    """Begun with an address, and nothing else asked than to seal and commit it."""
    manifest = how.get("manifest", manifest_of(version))
    id = (await control.begin(manifest, "trainer", SECONDS, SECONDS, f"{address}:{version}")).id
    return await control.commit(id, "keep", False, how.get("timeout", SECONDS), digests_of(version))


def test_what_is_sealed_is_committed_by_the_same_question(at_once: AsksOnce) -> None:
    async def run() -> None:
        control = Control(at_once)
        for version in (7, 8):
            at_once.log.clear()
            assert (await sealed_and_committed(control, version)).version == version
            assert (at_once.live(), at_once.states(), at_once.version) == ([version] * 3, {"idle"}, version)
            assert not {"look", "resume", "label"} & set(at_once.log)
            # However often it was asked whether all has come, the last time it was committed.
            assert at_once.log.count("commit") == 1
            assert at_once.log.count("at once") == at_once.log.count("seal") + at_once.log.count("poll")

    asyncio.run(run())


def test_what_comes_late_is_committed_when_it_has_come(at_once: AsksOnce) -> None:
    async def run() -> Any:
        committing = asyncio.ensure_future(sealed_and_committed(Control(at_once), 7, address="late"))
        while at_once.log.count("poll") < 2:
            await asyncio.sleep(0.01)
        assert not at_once.paused
        at_once.sent.set()
        return await committing

    assert asyncio.run(run()).version == 7
    assert (at_once.live(), at_once.paused) == ([7.0] * 3, False)


@pytest.mark.parametrize(("broken", "error"), [("seal", EngineError), ("commit", PoisonedError)])
def test_asked_to_seal_and_commit_one_rank_that_fails(at_once: AsksOnce, broken: str, error: type[Exception]) -> None:
    async def run() -> None:
        control = Control(at_once)
        await sealed_and_committed(control, 1)
        at_once.ranks[1].break_at = broken
        with pytest.raises(error):
            await sealed_and_committed(control, 2)
        poisoned = broken == "commit"
        assert at_once.states() == {"poisoned" if poisoned else "idle"}
        assert (at_once.refusal is not None, at_once.paused) == (poisoned, poisoned)
        at_once.ranks[1].break_at = None
        await heals(control, at_once, 3)

    asyncio.run(run())


@pytest.mark.parametrize("able", [True, False])
def test_without_a_staged_copy_it_stands_still_and_fetches_by_one_question(at_once: AsksOnce, able: bool) -> None:
    async def run() -> None:
        control, at_once.able = Control(at_once), able
        id = (await control.begin(direct(7), "trainer", SECONDS, SECONDS, "late:7")).id
        assert (at_once.paused, at_once.live()) == (True, [0.0] * 3)
        assert ("stage at once" in at_once.log, "pause keep True" in at_once.log) == (able, not able)
        at_once.sent.set()
        await control.commit(id, "keep", False, SECONDS, digests_of(7))
        assert (at_once.live(), at_once.states(), at_once.paused) == ([7.0] * 3, {"idle"}, False)

    asyncio.run(run())


def test_standing_still_for_a_trainer_that_is_lost_it_goes_on(at_once: AsksOnce) -> None:
    async def run() -> None:
        control = Control(at_once)
        with pytest.raises(TransportError, match="the trainer is gone"):  # as it begins, or later
            await sealed_and_committed(control, 7, address="lost", manifest=direct(7))
        await becomes(lambda: not at_once.paused)
        assert (at_once.live(), at_once.refusal) == ([0.0] * 3, None)
        await heals(control, at_once, 8)

    asyncio.run(run())


def test_asked_to_seal_and_commit_what_is_not_answered_is_not_live_or_poisons(at_once: AsksOnce) -> None:
    async def run() -> None:
        control = Control(at_once)
        await sealed_and_committed(control, 1)
        at_once.hooks["paused"] = never
        with pytest.raises(DeadlineError):
            await sealed_and_committed(control, 2, timeout=SOON)
        assert (at_once.live(), at_once.states(), at_once.paused) == ([1.0] * 3, {"idle"}, False)
        # Some ranks have done it when the answer is lost.
        at_once.ranks[1].break_at = "commit"
        at_once.hooks["paused"] = lost_behind(at_once)
        with pytest.raises(PoisonedError):
            await sealed_and_committed(control, 3, timeout=SOON)
        assert at_once.refusal is not None
        at_once.ranks[1].break_at = None
        at_once.hooks.clear()
        await heals(control, at_once, 4)

    asyncio.run(run())


def lost_behind(host: AsksOnce) -> Callable[[], Awaitable[None]]:
    """All ranks are asked to commit, and nobody hears what they say."""

    async def hook() -> None:
        id = host.receivers[0].status()["update"]["id"]
        await host.call("commit", encode_call(id=id), None, SECONDS)
        await never()

    return hook


def test_of_a_commit_that_is_not_answered_the_error_is_of_that_phase(at_once: AsksOnce) -> None:
    async def run() -> None:
        at_once.hooks["paused"] = never
        with pytest.raises(DeadlineError) as caught:
            await sealed_and_committed(Control(at_once), 2, timeout=SOON)
        assert caught.value.phase == "commit"

    asyncio.run(run())


def test_what_was_committed_is_not_asked_after_though_its_rank_was_busy_still(at_once: AsksOnce) -> None:
    async def run() -> None:
        commit = at_once.commit_at_once

        async def busy(*arguments: Any) -> AtOnce | None:
            found = await commit(*arguments)
            if found is None or found.committed is None:
                return found
            said = [msgspec.msgpack.decode(reply) for reply in found.sealed]
            sealed = [msgspec.msgpack.encode({"ok": {**each["ok"], "busy": True}}) for each in said]
            return found._replace(sealed=sealed)

        at_once.commit_at_once = busy  # type: ignore[method-assign]
        assert (await sealed_and_committed(Control(at_once), 7)).version == 7
        assert at_once.live() == [7.0] * 3

    asyncio.run(run())


def begins_at_next_look(control: Control, host: AsksOnce) -> list[str]:
    """Has an update begin, for which the engine stands still, as soon as the host looks; its id, then."""
    began: list[str] = []

    async def begin() -> None:
        if not began:
            began.append("")
            began[0] = (await control.begin(direct(8), "trainer", SECONDS, SECONDS, "late:8")).id

    host.hooks["look"] = begin
    return began


async def assert_it_goes_on(control: Control, host: AsksOnce, id: str) -> None:
    """The engine stands still for this one, whose weights come only now."""
    assert host.paused
    host.sent.set()
    await control.commit(id, "keep", False, SECONDS, digests_of(8))
    assert (host.live(), host.paused) == ([8.0] * 3, False)


def test_the_watch_of_one_that_failed_lets_the_next_be(at_once: AsksOnce) -> None:
    async def run() -> None:
        control = Control(at_once)
        id = (await control.begin(direct(7), "trainer", SECONDS, SECONDS, "never:7")).id
        await at_once.call("abort", encode_call(id=id), None, SECONDS)  # as a lease's end does, which tells nobody
        again = (await control.begin(direct(8), "trainer", SECONDS, SECONDS, "late:8")).id
        await asyncio.sleep(1.2)
        await assert_it_goes_on(control, at_once, again)

    asyncio.run(run())


def test_an_update_that_begins_while_the_watch_of_one_before_finds_out_is_let_be(at_once: AsksOnce) -> None:
    async def run() -> None:
        control = Control(at_once)
        id = (await control.begin(direct(7), "trainer", SECONDS, SECONDS, "never:7")).id
        began = begins_at_next_look(control, at_once)
        await at_once.call("abort", encode_call(id=id), None, SECONDS)
        await becomes(lambda: any(began))
        await asyncio.sleep(0.2)
        await assert_it_goes_on(control, at_once, began[0])

    asyncio.run(run())


def test_an_update_that_begins_while_one_before_is_aborted_is_let_be(at_once: AsksOnce) -> None:
    async def run() -> None:
        control = Control(at_once)
        id = (await control.begin(direct(7), "trainer", SECONDS, SECONDS, "never:7")).id
        await asyncio.sleep(0.1)  # until the watch sleeps
        began = begins_at_next_look(control, at_once)
        await control.abort(id, SECONDS)
        assert any(began)
        await assert_it_goes_on(control, at_once, began[0])

    asyncio.run(run())


def test_a_caller_that_is_gone_while_it_is_sealed_breaks_it_off(at_once: AsksOnce) -> None:
    async def run() -> None:
        control = Control(at_once)
        committing = asyncio.ensure_future(sealed_and_committed(control, 7, address="never"))
        while at_once.log.count("poll") < 2:
            await asyncio.sleep(0.01)
        committing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await committing
        await becomes(lambda: at_once.states() == {"idle"})
        assert (at_once.live(), at_once.paused) == ([0.0] * 3, False)
        await heals(control, at_once, 8)

    asyncio.run(run())


def test_asked_once_one_rank_that_fails_poisons_all(at_once: AsksOnce) -> None:
    async def run() -> None:
        control = Control(at_once)
        await update(control, 1)
        at_once.ranks[1].break_at = "commit"
        with pytest.raises(PoisonedError):
            await update(control, 2)
        assert at_once.refusal is not None
        assert at_once.paused
        assert at_once.states() == {"poisoned"}
        at_once.ranks[1].break_at = None
        await heals(control, at_once, 3)

    asyncio.run(run())


def test_asked_once_what_is_not_answered_in_time_does_not_go_live_later(at_once: AsksOnce) -> None:
    async def run() -> None:
        control, released = Control(at_once), asyncio.Event()
        await update(control, 1)

        async def hangs() -> None:
            await released.wait()

        late: list[asyncio.Task[Any]] = []
        commit = at_once.commit_at_once

        async def goes_on(*arguments: Any) -> Any:  # as an engine does, whoever has given up on it
            late.append(asyncio.ensure_future(commit(*arguments)))
            return await asyncio.shield(late[0])

        at_once.hooks["paused"] = hangs
        at_once.commit_at_once = goes_on  # type: ignore[method-assign]
        with pytest.raises(DeadlineError):
            await update(control, 2, timeout=SOON)
        assert (at_once.live(), at_once.states(), at_once.refusal) == ([1.0] * 3, {"idle"}, None)
        released.set()
        for reply in (await late[0]).committed:
            with pytest.raises(UpdateNotFound, match="its commit was not answered"):
                decode_reply(reply)
        assert at_once.live() == [1.0] * 3
        del at_once.commit_at_once
        at_once.hooks.clear()
        await heals(control, at_once, 3)

    asyncio.run(run())
