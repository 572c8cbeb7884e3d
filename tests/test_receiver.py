"""The receiver, checked by machine: live weights change in a sealed update's commit, and nowhere else."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from support.cases import cases
from weightwire import receiver as receiver_module
from weightwire.errors import (
    BusyError,
    EngineError,
    PoisonedError,
    RoomError,
    StateError,
    TransportError,
    UnknownTensor,
    UnsupportedError,
    UpdateNotFound,
    UsageError,
    VerificationError,
    VersionError,
    WeightwireError,
)
from weightwire.interpreter import collecting_later
from weightwire.landing import Landed
from weightwire.receiver import Arrivals, Lent, Receiver, decode_reply, encode_call
from weightwire.revisions import Revision
from weightwire.updates.buckets import Bucket, cut
from weightwire.updates.digest import Scan, scan, scan_and_copy
from weightwire.updates.manifest import Adapter, Manifest, TensorSpec

WEIGHTS = (
    TensorSpec(name="wide", dtype="float32", shape=(1500,)),
    TensorSpec(name="small", dtype="float32", shape=(3,)),
)
BUCKET_BYTES = 4096  # so that `wide` is split and there are two buckets
LEASE = 10.0
CALLS = (
    "status",
    "begin",
    "stage",
    "put",
    "poll",
    "seal",
    "commit",
    "proof",
    "abort",
    "try_offers",
    "poison",
    "record",
    "adapters",
    "unload",
)
OLD = -1


def values(seed: int) -> list[torch.Tensor]:
    """What a trainer sends: finite and different in each element."""
    return [torch.arange(spec.numel, dtype=torch.float32) + 10_000 * seed for spec in WEIGHTS]


def digests(seed: int) -> list[str]:
    return [scan(tensor).digest.hex() for tensor in values(seed)]


def bodies(manifest: Manifest, seed: int) -> list[bytes]:
    sent = values(seed)
    filled = []
    for bucket in cut(manifest):
        data = torch.zeros(bucket.nbytes, dtype=torch.uint8)
        for piece in bucket.pieces:
            run = sent[piece.tensor][piece.start : piece.start + piece.count].view(torch.uint8)
            data[piece.offset : piece.offset + run.numel()] = run
        filled.append(data.numpy().tobytes())
    return filled


def manifest_of(version: int, *, partial: bool = False) -> Manifest:
    return Manifest(version=version, tensors=WEIGHTS, partial=partial, bucket_bytes=BUCKET_BYTES)


class FakeStaging:
    """A staged copy in lists; `fails` names the step that raises, once."""

    nbytes = sum(spec.nbytes for spec in WEIGHTS)
    takes = None

    def __init__(self, target: FakeTarget, fails: str | None) -> None:
        self._target = target
        self._fails = fails
        self.staged = [torch.full(spec.shape, float("nan")) for spec in WEIGHTS]
        self.discarded = False
        self.unchecked = 3

    def write(self, tensor: int, start: int, data: torch.Tensor) -> Scan | None:
        self._fail("write")
        assert not self.discarded
        to = self.staged[tensor][start : start + data.numel()]
        if tensor == 0:
            return scan_and_copy(data, start, to)
        to.copy_(data)
        return None

    def lend(self, tensor: int, data: torch.Tensor) -> None:
        self.write(tensor, 0, data.reshape(-1))

    def seal(self, scans: Sequence[Scan]) -> None:
        self.scans = scans
        self._fail("seal")

    def check(self, seconds: float) -> bool:
        # As an engine whose own thread does a little of the work at a time.
        self._fail("check")
        self.unchecked -= 1
        return self.unchecked <= 0

    def commit(self) -> None:
        assert not self.discarded
        assert self.unchecked <= 0
        self._target.live[0] = self.staged[0].clone()
        self._fail("commit")
        self._target.live[1] = self.staged[1].clone()

    def proof(self) -> dict[str, str]:
        self._fail("proof")
        return {spec.name: "read back" for spec in WEIGHTS}

    def discard(self) -> None:
        self.discarded = True

    def _fail(self, step: str) -> None:
        if self._fails == step:
            raise RuntimeError(f"{step} broke")


class FakeAdapter(FakeStaging):
    """An adapter's, which changes nothing that is live."""

    def commit(self) -> None:
        self._fail("commit")

    def held(self) -> str:
        return "00" * 16


class FakeTarget:
    """A model of two tensors. `fails` is what the next staging breaks at; `known` and `free` refuse what they must."""

    adapter_dtype = None

    def __init__(self) -> None:
        self.live = values(OLD)
        self.fails: str | None = None
        self.known = True
        self.free = 1 << 20
        self.stagings: list[FakeStaging] = []
        self.dropped: list[str] = []

    def prepare(self, manifest: Manifest) -> FakeStaging:
        if not self.known:
            raise UnknownTensor("no such tensor")
        self.stagings.append(FakeStaging(self, self.fails))
        return self.stagings[-1]

    def prepare_adapter(self, manifest: Manifest, revision: Revision) -> FakeAdapter:
        return FakeAdapter(self, self.fails)

    def drop(self, revision: Revision) -> None:
        self.dropped.append(revision.label)

    def room(self) -> int:
        return self.free

    def holds(self, seed: int) -> bool:
        return all(torch.equal(a, b) for a, b in zip(self.live, values(seed), strict=True))


def make(target: FakeTarget, fetch: Any = None, clock: Callable[[], float] = lambda: 0.0) -> Receiver:
    return Receiver(target, fetch or no_fetch, clock=clock, background=False)


def no_fetch(address: str, arrivals: Arrivals) -> Iterator[tuple[int, torch.Tensor]]:
    raise TransportError(f"nothing is at {address} for {arrivals.update}")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What goes wrong here goes wrong on purpose, thousands of times."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class Updates(RuleBasedStateMachine):
    """Calls in any order, with a model of what must be live beside them.

    A version's weights are those of its own number as a seed, so what is live tells which update it came from.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000_000.0
        self.target = FakeTarget()
        self.receiver = Receiver(self.target, self._fetch, clock=lambda: self.now, background=False)
        self.ids = (f"{n:032x}" for n in itertools.count())
        self.used: list[str] = ["never"]
        self.ended: dict[str, str] = {}
        # What the model says: the version served, whether poisoned, and the update held.
        self.version: int | None = None
        self.poisoned = False
        self.held: str | None = None
        self.manifest: Manifest | None = None
        self.beginning: Manifest | None = None
        self.fails: str | None = None
        self.spoiled = False
        self.address: str | None = None
        self.arrived: set[int] = set()
        self.sealed = False
        self.torn = False
        self.expires = 0.0

    # -- what a trainer may call, in any order --------------------------------------------------------------------

    @rule(
        step=st.integers(-1, 2),
        partial=st.booleans(),
        fails=st.sampled_from([None, None, None, "write", "seal", "commit", "proof"]),
        refuse=st.sampled_from([None, None, None, "unknown", "room"]),
        address=st.sampled_from([None, None, "good", "flipped", "halfway", "nowhere"]),
    )
    def begin(self, step: int, partial: bool, fails: str | None, refuse: str | None, address: str | None) -> None:
        version = max((-1 if self.version is None else self.version) + step, 0)
        self.target.fails, self.target.known = fails, refuse != "unknown"
        self.target.free = 0 if refuse == "room" else 1 << 20
        id, manifest = next(self.ids), manifest_of(version, partial=partial)
        self.used.append(id)
        self._expire()
        expected: type[WeightwireError] | None = None
        if self.held is not None:
            expected = BusyError
        elif self.version is not None and version < self.version + (not self.poisoned):
            # Poisoned, it may hold a version that another rank failed to take: that may be sent again.
            expected = VersionError
        elif self.poisoned and partial:
            expected = PoisonedError
        elif refuse is not None:
            expected = UnknownTensor if refuse == "unknown" else RoomError
        self.beginning, plain = manifest, msgspec.to_builtins(manifest)
        error = self._call("begin", id=id, manifest=plain, holder="t", lease=LEASE, address=address)
        assert expected is None if error is None else type(error) is expected, error
        if isinstance(error, BusyError):
            assert error.details == {"holder": "t", "until": self.expires}
        if error is None:
            self.held, self.manifest, self.fails, self.expires = id, manifest, fails, self.now + LEASE
            self.spoiled, self.sealed, self.arrived, self.address = False, False, set(), None
            if address is not None:
                self._fetches(address)

    @rule(
        data=st.data(), index=st.integers(-1, 2), how=st.sampled_from(["right", "right", "right", "flipped", "short"])
    )
    def put(self, data: st.DataObject, index: int, how: str) -> None:
        id = self._some_id(data)
        manifest = self.manifest or manifest_of(0)
        body = bytearray(bodies(manifest, manifest.version)[max(min(index, 1), 0)])
        if how == "flipped":
            body[7] ^= 1
        if how == "short":
            del body[-1]
        self._expire()
        error = self._call("put", body=bytes(body), id=id, index=index)
        if id != self.held:
            self._is_not_found(error, id)
        elif self.spoiled or self.sealed or index not in (0, 1) or how == "short":
            assert error is not None
        else:
            self.expires = self.now + LEASE
            self._arrive(index, how)
            assert (error is not None) == self.spoiled  # the answer says what became of the work, if that is over

    @rule(data=st.data(), address=st.sampled_from(["good", "good", "flipped", "nowhere", "halfway", ""]))
    def stage(self, data: st.DataObject, address: str) -> None:
        id = self._some_id(data)
        self._expire()
        error = self._call("stage", id=id, address=address)
        if id != self.held:
            self._is_not_found(error, id)
            return
        again = address == self.address
        refused = self.spoiled or (self.sealed and not again)
        if not refused and not again:
            self._fetches(address)
        assert (error is not None) == (refused or self.spoiled)

    @rule(data=st.data(), how=st.sampled_from(["right", "right", "right", "wrong", "few", "none"]))
    def seal(self, data: st.DataObject, how: str) -> None:
        id = self._some_id(data)
        sent = digests((self.manifest or manifest_of(0)).version)
        sent = {"right": sent, "wrong": sent[::-1], "few": sent[:1], "none": []}[how]
        self._expire()
        error = self._call("seal", id=id, digests=sent)
        if id != self.held:
            self._is_not_found(error, id)
            return
        good = not (self.spoiled or self.sealed or self.torn) and self.arrived == {0, 1} and how == "right"
        if good:
            self.expires = self.now + LEASE
            self.spoiled = self.fails == "seal"
            self.sealed = not self.spoiled
        assert (error is None) == (good and not self.spoiled), error

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        id = self._some_id(data)
        self._expire()
        error = self._call("commit", id=id)
        if id != self.held:
            self._is_not_found(error, id)
            return
        assert self.manifest is not None
        if not self.sealed:
            assert isinstance(error, StateError)
        elif self.poisoned and self.manifest.partial:
            assert isinstance(error, PoisonedError)
        elif self.fails == "commit":
            assert isinstance(error, PoisonedError)
            self.poisoned = True
            self._end("its commit failed")
        else:
            assert error is None
            assert self.version is None or self.manifest.version > self.version
            # A proof that fails poisons after the fact.
            self.version, self.poisoned = self.manifest.version, self.fails == "proof"
            self._end("it was committed")
            proof = self._call("proof", id=id)
            assert (proof is None) == (self.fails != "proof")

    @rule(data=st.data())
    def poll(self, data: st.DataObject) -> None:
        id = self._some_id(data)
        self._expire()
        error = self._call("poll", id=id)
        if id != self.held:
            self._is_not_found(error, id)
        else:
            assert (error is not None) == self.spoiled

    @rule(data=st.data())
    def proof(self, data: st.DataObject) -> None:
        self._call("proof", id=self._some_id(data))

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        id = self._some_id(data)
        self._expire()
        assert self._call("abort", id=id, reason="enough") is None
        if id == self.held:
            self._end("enough")

    # -- what happens beside ---------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.1, LEASE / 2, LEASE, 3 * LEASE]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def another_rank_poisons(self) -> None:
        self._call("poison", reason="rank 1 failed")
        self.poisoned = True

    @rule(op=st.sampled_from(CALLS), arguments=st.binary(max_size=20))
    def nonsense(self, op: str, arguments: bytes) -> None:
        assert "error" in msgspec.msgpack.decode(self.receiver.handle(op, b"\xc1" + arguments))

    # -- what must hold --------------------------------------------------------------------------------------------

    @invariant()
    def live_is_what_was_last_committed(self) -> None:
        if not (self.poisoned and self.target.stagings and self._half_committed()):
            assert self.target.holds(OLD if self.version is None else self.version)

    @invariant()
    def status_is_what_the_model_says(self) -> None:
        self._expire()
        status = self.receiver.status()
        assert status["version"] == self.version
        assert (status["poisoned"] is not None) == self.poisoned
        assert (status["update"] or {}).get("id") == self.held
        state = "poisoned" if self.poisoned else "idle"
        assert status["state"] == (state if self.held is None else "sealed" if self.sealed else "staging")

    @invariant()
    def what_has_ended_is_let_go(self) -> None:
        held = self.receiver._update
        assert all(s.discarded for s in self.target.stagings if held is None or s is not held.staging)

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _call(self, op: str, *, body: bytes | None = None, **arguments: Any) -> WeightwireError | None:
        try:
            decode_reply(self.receiver.handle(op, encode_call(**arguments), body))
        except WeightwireError as error:
            return error
        return None

    def _fetch(self, address: str, arrivals: Arrivals) -> Iterator[tuple[int, torch.Tensor]]:
        manifest = self.manifest if arrivals.update == self.held else self.beginning
        assert manifest is not None
        for index, body in enumerate(bodies(manifest, manifest.version)):
            data = torch.frombuffer(bytearray(body), dtype=torch.uint8)
            if address not in ("good", "flipped") and (address, index) != ("halfway", 0):
                raise TransportError(f"lost at {address}")
            if (address, index) == ("flipped", 1):
                data[7] ^= 1
            yield index, data

    def _fetches(self, address: str) -> None:
        self.address, self.expires = address, self.now + LEASE
        for index in {"good": [0, 1], "flipped": [0, 1], "halfway": [0]}.get(address, []):
            self._arrive(index, "flipped" if (address, index) == ("flipped", 1) else "right")
        self.spoiled |= address in ("nowhere", "halfway", "")

    def _arrive(self, index: int, how: str) -> None:
        if index in self.arrived or self.spoiled:
            return
        if self.fails == "write":
            self.spoiled = True
            return
        self.arrived.add(index)
        self.torn = (self.torn if len(self.arrived) > 1 else False) or how == "flipped"

    def _some_id(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(self.used)) if self.held is None or data.draw(st.booleans()) else self.held

    def _end(self, reason: str) -> None:
        assert self.held is not None
        self.ended[self.held] = reason
        self.held = self.manifest = None
        self.sealed = self.torn = False

    def _expire(self) -> None:
        if self.held is not None and self.now >= self.expires:
            self._end("its lease ended: nothing was heard of t for 10 s")

    def _is_not_found(self, error: WeightwireError | None, id: str) -> None:
        assert isinstance(error, UpdateNotFound)
        assert self.ended.get(id, "it was never begun here") in error.message

    def _half_committed(self) -> bool:
        return any(staging._fails == "commit" for staging in self.target.stagings)


Updates.TestCase.settings = settings(max_examples=cases(120), stateful_step_count=40, deadline=None)
test_calls_in_any_order = Updates.TestCase


# -- what a machine that stays within the protocol does not try ----------------------------------------------------


def sealed(receiver: Receiver, version: int, *, id: str = "u", seed: int | None = None, partial: bool = False) -> None:
    """Take an update as far as `sealed`."""
    manifest = manifest_of(version, partial=partial)
    seed = version if seed is None else seed
    receiver.begin(id, manifest, "trainer", LEASE)
    for index, body in enumerate(bodies(manifest, seed)):
        receiver.put(id, index, body)
    receiver.seal(id, digests(seed))
    assert receiver.state == "sealed"


@given(op=st.sampled_from(CALLS) | st.text(), arguments=st.binary(), body=st.none() | st.binary())
@settings(max_examples=cases(500))
def test_random_bytes_are_answered_and_never_raised(op: str, arguments: bytes, body: bytes | None) -> None:
    target = FakeTarget()
    answer = msgspec.msgpack.decode(make(target).handle(op, arguments, body))
    assert answer.keys() in ({"ok"}, {"error"})
    assert target.holds(OLD)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(
    ["id", "manifest", "holder", "lease", "address", "index", "digests", "hold", "reason", "offers"]
)


@given(
    calls=st.lists(
        st.tuples(st.sampled_from(CALLS), st.dictionaries(names, plain | st.just("u"), max_size=4)), max_size=6
    )
)
@settings(max_examples=cases(200))
def test_arguments_of_any_type_are_answered_and_never_raised(calls: list[tuple[str, dict[str, Any]]]) -> None:
    target = FakeTarget()
    receiver = make(target)
    sealed(receiver, 1)
    committed = False
    for op, arguments in calls:
        answer = msgspec.msgpack.decode(receiver.handle(op, encode_call(**arguments)))
        assert answer.keys() in ({"ok"}, {"error"})
        committed |= op == "commit" and "ok" in answer
    assert target.holds(1 if committed else OLD)


def test_an_unknown_operation_says_what_to_do() -> None:
    with pytest.raises(StateError, match="Install the same weightwire on both sides"):
        decode_reply(make(FakeTarget()).handle("promote", b"\x80"))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda r, _: r.abort("u", "somebody asked"), "somebody asked"),
        (lambda r, _: r.abort("u"), "it was aborted"),
        (lambda r, _: r.commit("u"), "it was committed"),
        (lambda _, clock: clock.append(LEASE), "its lease ended: nothing was heard of trainer for 10 s"),
        (lambda r, _: r.close(), "the engine was closed"),
    ],
)
def test_an_update_that_is_no_more_says_why(how: Any, reason: str) -> None:
    clock = [0.0]
    receiver = make(FakeTarget(), clock=lambda: clock[-1])
    sealed(receiver, 1)
    how(receiver, clock)
    for call in (receiver.poll, receiver.commit, lambda id: receiver.seal(id, []), lambda id: receiver.put(id, 0, b"")):
        with pytest.raises(UpdateNotFound, match=reason):
            call("u")
    receiver.abort("u")


def test_an_id_is_taken_once() -> None:
    receiver = make(FakeTarget())
    receiver.begin("u", manifest_of(1), "trainer", LEASE)
    receiver.abort("u")
    with pytest.raises(UsageError, match="there is an update u already: it was aborted"):
        receiver.begin("u", manifest_of(1), "trainer", LEASE)
    receiver.begin("v", manifest_of(1), "trainer", LEASE)
    with pytest.raises(UsageError, match="there is an update v already: it is under way"):
        receiver.begin("v", manifest_of(1), "trainer", LEASE)


def test_a_receipt_that_comes_late_is_not_the_last() -> None:
    receiver = make(FakeTarget())
    for id, version in (("u", 1), ("v", 2)):
        sealed(receiver, version, id=id)
        receiver.commit(id)
    receiver.record("v", {"version": 2})
    receiver.record("u", {"version": 1})
    assert receiver.status()["receipt"] == {"version": 2}


def test_only_the_last_endings_are_remembered() -> None:
    receiver = make(FakeTarget())
    for n in range(100):
        receiver.begin(f"u{n}", manifest_of(1), "trainer", LEASE)
        receiver.abort(f"u{n}")
    with pytest.raises(UpdateNotFound, match="never begun"):
        receiver.poll("u0")
    with pytest.raises(UpdateNotFound, match="aborted"):
        receiver.poll("u99")


def test_every_bucket_renews_the_lease_and_asking_does_not() -> None:
    now = [0.0]
    receiver = make(FakeTarget(), clock=lambda: now[0])
    receiver.begin("u", manifest_of(1), "trainer", LEASE)
    first, second = bodies(manifest_of(1), 1)
    now[0] = 9.0
    receiver.put("u", 0, first)
    now[0] = 18.0
    receiver.put("u", 1, second)
    now[0] = 27.0
    receiver.seal("u", digests(1))
    now[0] = 36.0
    receiver.poll("u")
    now[0] = 37.0
    with pytest.raises(UpdateNotFound, match="its lease ended"):
        receiver.poll("u")


def test_a_commit_under_way_holds_the_lease() -> None:
    now = [0.0]
    receiver = make(target := FakeTarget(), clock=lambda: now[0])
    sealed(receiver, 1)
    receiver.poll("u", hold=100.0)
    now[0] = 99.0
    receiver.commit("u")
    assert target.holds(1)


def test_a_bucket_sent_twice_is_taken_once() -> None:
    receiver = make(target := FakeTarget())
    receiver.begin("u", manifest_of(1), "trainer", LEASE)
    for index in (1, 0, 1, 0, 0):
        receiver.put("u", index, bodies(manifest_of(1), 1)[index])
    receiver.seal("u", digests(1))
    assert receiver.commit("u")["digests"] == dict(zip(("wide", "small"), digests(1), strict=True))
    assert target.holds(1)


def test_what_is_lent_is_taken_whole_and_verified() -> None:
    target = FakeTarget()
    lent = values(3)
    receiver = Receiver(target, _never_fetched, open=lambda address, arrivals: Lent(lent), background=False)
    manifest = msgspec.structs.replace(manifest_of(1), staging="lent")
    receiver.begin("u", manifest, "trainer", 60.0)
    receiver.stage("u", "cuda-ipc:")
    assert receiver.poll("u")["received"] == len(cut(manifest)) > 1
    with pytest.raises(VerificationError):
        receiver.seal("u", digests(4))
    receiver.seal("u", digests(3))
    assert [scan.digest.hex() for scan in target.stagings[0].scans] == digests(3)
    receiver.commit("u")
    assert target.holds(3)


def test_what_is_lent_is_opened_as_an_update_begins_and_let_go_of_if_it_cannot() -> None:
    target, opened, swept = FakeTarget(), list[str](), list[str]()

    def open_lent(address: str, arrivals: Arrivals) -> Lent:
        # Before anything was made ready for it, so that it is scanned meanwhile.
        opened.append(f"{arrivals.update}, {len(target.stagings)} staged")
        return Lent(values(3))

    receiver = Receiver(target, _never_fetched, open=open_lent, sweep=swept.append, background=False)
    manifest = msgspec.structs.replace(manifest_of(1), staging="lent")
    target.known = False
    with pytest.raises(UnknownTensor):
        receiver.begin("t", manifest, "trainer", 60.0, "cuda-ipc:")
    target.known, target.free = True, 1
    with pytest.raises(RoomError):
        receiver.begin("u", manifest, "trainer", 60.0, "cuda-ipc:")
    assert swept == ["t", "u"]
    target.free = 1 << 20
    receiver.begin("v", manifest, "trainer", 60.0, "cuda-ipc:")
    assert opened == ["t, 0 staged", "u, 0 staged", "v, 1 staged"]
    receiver.seal("v", digests(3))
    receiver.commit("v")
    assert target.holds(3)
    assert swept == ["t", "u"]


def _never_fetched(address: str, arrivals: Arrivals) -> Iterator[tuple[int, torch.Tensor]]:
    raise AssertionError("nothing is fetched of what is lent")


def test_a_partial_update_begun_before_a_poisoning_cannot_heal_it() -> None:
    receiver = make(target := FakeTarget())
    sealed(receiver, 1, partial=True)
    receiver.poison("rank 1 failed")
    with pytest.raises(PoisonedError, match="cannot heal"):
        receiver.commit("u")
    assert target.holds(OLD)
    receiver.abort("u")
    sealed(receiver, 1, id="v")
    receiver.commit("v")
    assert receiver.state == "idle"
    assert target.holds(1)


def test_what_is_live_and_not_what_was_staged_poisons() -> None:
    target = FakeTarget()
    target.fails = "proof"
    receiver = make(target)
    sealed(receiver, 1)
    receiver.commit("u")
    assert receiver.state == "poisoned"
    with pytest.raises(RuntimeError, match="proof broke"):
        receiver.proof("u")
    assert "could not be verified" in str(receiver.status()["poisoned"])


def test_a_receiver_with_threads_of_its_own_leaves_none(no_threads_left: None) -> None:
    target = FakeTarget()
    receiver = Receiver(target, no_fetch)
    for version in range(3):
        id = f"u{version}"
        receiver.begin(id, manifest_of(version), "trainer", LEASE)
        for index, body in enumerate(bodies(manifest_of(version), version)):
            receiver.put(id, index, body)
        _settle(receiver, id)
        receiver.seal(id, digests(version))
        _settle(receiver, id)
        receiver.commit(id)
        assert target.holds(version)
    receiver.begin("v", manifest_of(9), "trainer", LEASE)
    receiver.close()
    assert all(staging.discarded for staging in target.stagings)


def test_sealed_only_when_the_engines_own_thread_has_checked_all_of_it() -> None:
    target = FakeTarget()
    receiver = Receiver(target, no_fetch)
    threads: set[str] = set()
    receiver.begin("u", manifest_of(1), "trainer", LEASE)
    staging = target.stagings[-1]
    staging.unchecked = 10**6
    check = staging.check
    staging.check = lambda seconds: (threads.add(threading.current_thread().name), check(seconds))[1]  # type: ignore[method-assign]
    for index, body in enumerate(bodies(manifest_of(1), 1)):
        receiver.put("u", index, body)
    deadline = time.monotonic() + 60
    while receiver.poll("u")["received"] < len(bodies(manifest_of(1), 1)):
        assert time.monotonic() < deadline
    receiver.seal("u", digests(1))
    for _ in range(50):
        assert receiver.poll("u", linger=0.01)["busy"]
        with pytest.raises(StateError):
            receiver.commit("u")
    staging.unchecked = 1
    _settle(receiver)
    assert receiver.state == "sealed"
    assert threads == {threading.current_thread().name}
    receiver.commit("u")
    receiver.close()


def test_a_failed_check_ends_the_update_and_changes_nothing() -> None:
    target = FakeTarget()
    receiver = make(target)
    target.fails = "check"
    receiver.begin("u", manifest_of(1), "trainer", LEASE)
    for index, body in enumerate(bodies(manifest_of(1), 1)):
        receiver.put("u", index, body)
    receiver.seal("u", digests(1))
    with pytest.raises(EngineError, match="check broke"):
        receiver.poll("u")
    assert target.holds(OLD)
    assert receiver.status()["poisoned"] is None


class PlacedStaging(FakeStaging):
    """Where buckets arrive where they are to stay."""

    def places(self, bucket: Bucket) -> list[torch.Tensor]:
        return [piece.of(self.staged[piece.tensor]) for piece in bucket.pieces]

    def write_parts(self, bucket: Bucket, parts: Sequence[torch.Tensor]) -> None:
        assert [part.data_ptr() for part in parts] == [place.data_ptr() for place in self.places(bucket)]


class PlacedTarget(FakeTarget):
    def prepare(self, manifest: Manifest) -> FakeStaging:
        self.stagings.append(PlacedStaging(self, self.fails))
        return self.stagings[-1]


def arriving(version: int, stays: bool, before: Callable[[int, Arrivals], None] = lambda index, arrivals: None) -> Any:
    """A fetch function that brings each bucket to its places; and at the end to none: it gives what was given out."""

    def fetch(address: str, arrivals: Arrivals) -> Iterator[tuple[int, Landed]]:
        for bucket in arrivals.buckets:
            before(bucket.index, arrivals)
            places: Any = arrivals.places(bucket)
            for piece, place in zip(bucket.pieces, places, strict=True):
                place.copy_(piece.of(values(version)[piece.tensor]))
            parts = places if stays else [place.clone() for place in places]
            yield bucket.index, Landed(parts, None, stays)
            if not stays:
                for part in parts:
                    part.fill_(float("nan"))  # as the next bucket would, in memory that is used again

    return fetch


def scanned_by(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pieces each call scans, from now on."""
    real, calls = receiver_module.scan_pieces_any, list[int]()
    monkeypatch.setattr(receiver_module, "scan_pieces_any", lambda pieces: (calls.append(len(pieces)), real(pieces))[1])
    return calls


@pytest.mark.parametrize(
    ("together", "seconds", "calls"), [(1 << 30, 60, [3]), (BUCKET_BYTES, 60, [1, 2]), (1 << 30, -1, [1, 2])]
)
def test_what_stays_where_it_arrives_is_scanned_together_until_it_is_much_or_late(
    monkeypatch: pytest.MonkeyPatch, together: int, seconds: float, calls: list[int]
) -> None:
    monkeypatch.setattr(receiver_module, "_TOGETHER_BYTES", together)
    monkeypatch.setattr(receiver_module, "_TOGETHER_SECONDS", seconds)
    found, target = scanned_by(monkeypatch), PlacedTarget()
    receiver = make(target, arriving(1, stays=True))
    receiver.begin("u", manifest_of(1), "trainer", LEASE, "x:")
    assert [n for n in found if n] == calls
    receiver.seal("u", digests(1))
    receiver.commit("u")
    assert target.holds(1)


def test_what_is_only_lent_is_scanned_before_the_next_is_asked_for() -> None:
    target = PlacedTarget()
    target.prepare = lambda manifest: _Copying(target, None)  # type: ignore[method-assign]
    receiver = make(target, arriving(1, stays=False))
    receiver.begin("u", manifest_of(1), "trainer", LEASE, "x:")
    receiver.seal("u", digests(1))
    receiver.commit("u")
    assert target.holds(1)


class _Copying(PlacedStaging):
    def write_parts(self, bucket: Bucket, parts: Sequence[torch.Tensor]) -> None:
        assert not any(part.isnan().any() for part in parts)


def test_what_arrives_after_an_abort_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    found, target = scanned_by(monkeypatch), PlacedTarget()

    def abort(index: int, arrivals: Arrivals) -> None:
        if index == 1:
            arrivals.cancelled.set()

    receiver = make(target, arriving(1, stays=True, before=abort))
    receiver.begin("u", manifest_of(1), "trainer", LEASE, "x:")
    assert not any(found)
    assert receiver.poll("u")["received"] == 0


def test_what_is_fetched_by_is_closed_at_once_when_taking_fails() -> None:
    """An error that is kept keeps the frames that it went through, until a garbage collection long after."""
    closed: list[str] = []

    def fetch(address: str, arrivals: Arrivals) -> Iterator[tuple[int, torch.Tensor]]:
        try:
            for bucket in arrivals.buckets:
                yield bucket.index, torch.zeros(bucket.nbytes, dtype=torch.uint8)
        finally:
            closed.append(address)

    class Refusing(FakeStaging):
        def write(self, tensor: int, start: int, data: torch.Tensor) -> Scan | None:
            raise UnsupportedError("not this")

    target = FakeTarget()
    target.prepare = lambda manifest: Refusing(target, None)  # type: ignore[method-assign]
    receiver = make(target, fetch)
    with collecting_later():
        receiver.begin("u", manifest_of(1), "trainer", LEASE, "x:")
        with pytest.raises(UnsupportedError, match="not this"):
            receiver.poll("u")
        assert closed == ["x:"]


class QueuingStaging(FakeStaging):
    """Whose commit is over only once somebody has waited for it."""

    queued = True

    def commit(self) -> None:
        self._committing = super().commit

    def finish(self) -> bool:
        time.sleep(0.05)
        self._fail("finish")
        self._committing()
        return self.queued

    def proof(self) -> dict[str, str]:
        assert self._target.holds(1)
        return super().proof()


def test_a_commit_that_was_only_queued_is_waited_for_before_the_proof_and_counted() -> None:
    target = FakeTarget()
    target.prepare = lambda manifest: QueuingStaging(target, None)  # type: ignore[method-assign]
    receiver = make(target)
    sealed(receiver, 1)
    receiver.commit("u")
    proof = receiver.proof("u")
    assert proof is not None
    assert proof["late"] >= 0.05
    assert receiver.status()["poisoned"] is None


def test_a_commit_that_was_over_is_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QueuingStaging, "queued", False)
    target = FakeTarget()
    target.prepare = lambda manifest: QueuingStaging(target, None)  # type: ignore[method-assign]
    receiver = make(target)
    sealed(receiver, 1)
    receiver.commit("u")
    assert (receiver.proof("u") or {})["late"] == 0


def test_a_queued_commit_that_fails_poisons() -> None:
    target = FakeTarget()
    target.prepare = lambda manifest: QueuingStaging(target, "finish")  # type: ignore[method-assign]
    receiver = make(target)
    sealed(receiver, 1)
    receiver.commit("u")
    with pytest.raises(RuntimeError, match="finish broke"):
        receiver.proof("u")
    assert "finish broke" in receiver.status()["poisoned"]


def test_what_a_trainer_left_is_swept_when_it_is_silent_after_its_commit_or_before_it() -> None:
    swept: list[str] = []
    receiver = Receiver(FakeTarget(), no_fetch, sweep=swept.append)

    def update(id: str, version: int, lease: float) -> None:
        receiver.begin(id, manifest_of(version), "trainer", lease)
        receiver.poll(id, hold=600.0)
        for index, body in enumerate(bodies(manifest_of(version), version)):
            receiver.put(id, index, body)
        _settle(receiver, id)
        receiver.seal(id, digests(version))
        _settle(receiver, id)
        receiver.commit(id)

    update("followed", 1, 600.0)
    update("last", 2, 2.0)
    _wait_for(lambda: swept == ["last"])
    receiver.begin("aborted", manifest_of(3), "trainer", 600.0)
    receiver.abort("aborted")
    _wait_for(lambda: swept == ["last", "aborted"])
    update("held until the end", 3, 600.0)
    receiver.close()
    assert swept == ["last", "aborted"]


def _wait_for(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def _settle(receiver: Receiver, id: str = "u") -> None:
    _wait_for(lambda: not receiver.poll(id)["busy"])


CLIENT = {"client": 0, "clients": 1, "in_use": []}


def begun_adapter(receiver: Receiver, version: int) -> dict[str, Any]:
    """The arguments with which to seal an adapter's update that has arrived."""
    id = f"{version:032x}"
    manifest = msgspec.structs.replace(
        manifest_of(version), kind="adapter", adapter=Adapter(name="policy", config={"r": 1, "lora_alpha": 1})
    )
    receiver.begin(id=id, manifest=manifest, holder="t", lease=LEASE)
    for index, body in enumerate(bodies(manifest, version)):
        receiver.put(id=id, index=index, body=body)
    return {"id": id, "digests": digests(version)}


def ask(receiver: Receiver, op: str, **arguments: Any) -> Any:
    return decode_reply(receiver.handle(op, encode_call(**arguments)))


def staged_adapter(receiver: Receiver, version: int) -> str:
    """The id of an adapter's update that is sealed."""
    sealing = begun_adapter(receiver, version)
    receiver.seal(**sealing)
    return str(sealing["id"])


def labels(receiver: Receiver) -> list[str]:
    return [revision.label for revision in receiver.adapters()]


def test_an_adapter_is_listed_once_it_is_committed_and_nothing_live_has_changed() -> None:
    target = FakeTarget()
    receiver = make(target)
    id = staged_adapter(receiver, 7)
    assert labels(receiver) == []
    part = receiver.commit(id=id, client={"client": 0, "clients": 1, "in_use": []})
    assert [revision.label for revision in part["adapters"]] == ["policy@7"]
    assert (part["adapter"], part["proof"]["held"]) == ("policy@7", "00" * 16)
    assert receiver.status()["version"] is None
    assert receiver.status()["spent"] == {"policy": 7}
    assert target.holds(OLD)


def test_an_adapter_on_a_rank_alone_is_sealed_and_committed_by_one_call() -> None:
    receiver = make(FakeTarget())
    found = ask(receiver, "seal", **begun_adapter(receiver, 7), client=CLIENT)
    assert (found["committed"]["version"], found["committed"]["adapter"]) == (7, "policy@7")
    assert [revision[0] for revision in found["committed"]["adapters"]] == ["policy"]
    assert (receiver.state, labels(receiver)) == ("idle", ["policy@7"])


def test_without_a_client_it_is_only_sealed() -> None:
    receiver = make(FakeTarget())
    assert ask(receiver, "seal", **begun_adapter(receiver, 7))["committed"] is None
    assert (receiver.state, labels(receiver)) == ("sealed", [])


def test_a_whole_model_is_not_committed_on_the_way() -> None:
    receiver, id = make(FakeTarget()), "7" * 32
    receiver.begin(id=id, manifest=manifest_of(7), holder="t", lease=LEASE)
    for index, body in enumerate(bodies(manifest_of(7), 7)):
        receiver.put(id=id, index=index, body=body)
    found = ask(receiver, "seal", id=id, digests=digests(7), client=CLIENT)
    assert (found["state"], found["committed"]) == ("sealed", None)


@pytest.mark.parametrize(("wrong", "error", "phase"), [(True, VerificationError, None), (False, EngineError, "commit")])
def test_which_of_the_two_has_failed_is_said(wrong: bool, error: type[WeightwireError], phase: str | None) -> None:
    target = FakeTarget()
    receiver = make(target)
    target.fails = None if wrong else "commit"
    sealing = begun_adapter(receiver, 7)
    with pytest.raises(error) as caught:
        ask(receiver, "seal", **sealing | ({"digests": digests(8)} if wrong else {}), client=CLIENT)
    assert caught.value.phase == phase
    assert labels(receiver) == []


def test_an_adapter_whose_commit_fails_is_dropped_and_poisons_nothing() -> None:
    target = FakeTarget()
    receiver = make(target)
    receiver.commit(id=staged_adapter(receiver, 7))
    target.fails = "commit"
    id = staged_adapter(receiver, 8)
    with pytest.raises(EngineError, match="policy@8 could not be kept on rank 0"):
        receiver.commit(id=id)
    assert (receiver.state, labels(receiver)) == ("idle", ["policy@7"])
    decode_reply(receiver.handle("status", encode_call()))
    assert target.dropped == ["policy@8"]
    target.fails = None
    receiver.commit(id=staged_adapter(receiver, 9))


def test_an_adapter_that_another_rank_could_not_keep_is_taken_back() -> None:
    receiver = make(FakeTarget())
    receiver.commit(id=staged_adapter(receiver, 7))
    id = staged_adapter(receiver, 8)
    receiver.commit(id=id)
    assert receiver.abort(id=id)
    assert not receiver.abort(id=id)
    assert labels(receiver) == ["policy@7"]


def test_an_adapter_cannot_heal_what_is_poisoned() -> None:
    receiver = make(FakeTarget())
    receiver.poison("the bus is on fire")
    with pytest.raises(PoisonedError, match="a LoRA adapter cannot heal it"):
        staged_adapter(receiver, 7)


def test_an_adapter_whose_lease_ends_is_dropped_on_the_engines_own_thread() -> None:
    now = [0.0]
    target = FakeTarget()
    receiver = make(target, clock=lambda: now[0])
    staged_adapter(receiver, 7)
    now[0] = LEASE + 1
    receiver.status()  # as the thread that watches leases
    assert target.dropped == []
    receiver.handle("status", encode_call())
    assert target.dropped == ["policy@7"]
