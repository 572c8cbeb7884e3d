"""A publish either happened on every engine or on none; what goes wrong leaves the old version, bit for bit."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import weightwire as ww
from support import same, snapshot, tiny, weights_for
from weightwire import run, transports
from weightwire.receiver import Lent, Receiver
from weightwire.run import Run
from weightwire.sources import find
from weightwire.sources.tensors import TensorSource
from weightwire.transports import gloo, shm
from weightwire.transports.unix_socket import SocketSender
from weightwire.updates.buckets import Bucket
from weightwire.updates.manifest import Manifest

pytestmark = pytest.mark.usefixtures("shm_root", "no_threads_left")

IN_PROCESS = ("shm", "gloo")


@pytest.fixture
def engines() -> Iterator[Callable[..., ww.TransformersEngine]]:
    """Makes engines around tiny models, and closes them."""
    with contextlib.ExitStack() as stack:

        def make(name: str = "a", model: torch.nn.Module | None = None) -> ww.TransformersEngine:
            engine = ww.TransformersEngine(model or tiny(), name=name)
            stack.callback(engine.close)
            return engine

        yield make


def publish(weights: Any, engines: Any, version: int, **options: Any) -> ww.Receipt:
    made = {k: options.pop(k) for k in ("transport", "bucket_bytes", "lease") if k in options}
    with ww.Publisher(weights, engines, **made) as publisher:
        return publisher.publish(version, **options)


def assert_unharmed(engine: ww.TransformersEngine, old: dict[str, torch.Tensor], version: int | None) -> None:
    """The old version is served, nobody holds the engine, and the next good publish succeeds."""
    assert same(engine.model, old)
    status = engine.status()
    assert (status.version, status.state, status.update) == (version, "idle", None)
    engine.model(torch.zeros(1, 16))
    new = weights_for(engine.model, seed=99)
    publish(new, engine, 1000)
    assert same(engine.model, new)


# -- what goes well ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", IN_PROCESS)
@pytest.mark.parametrize("bucket_bytes", [4096, 64 << 20])
def test_every_engine_gets_exactly_what_was_sent(engines: Any, transport: str, bucket_bytes: int) -> None:
    # Of 65,536 bytes a weight: many buckets each at 4,096, and biases that share one.
    pair = [engines("a", tiny(width=128)), engines("b", tiny(width=128))]
    with ww.Publisher(
        source := weights_for(pair[0].model, 1), pair, transport=transport, bucket_bytes=bucket_bytes
    ) as publisher:
        for version in (0, 7):
            for tensor in source.values():
                tensor.add_(1)
            receipt = publisher.publish(version)
            assert all(same(engine.model, source) for engine in pair)
            assert receipt.version == version
            assert receipt.nbytes == sum(t.nbytes for t in source.values())
            for engine in pair:
                mine = receipt.engines[engine.name]
                assert mine.transport == transport
                assert mine.proven == dict.fromkeys(source, "read back")
                assert engine.status().version == version
                assert engine.status().receipt == mine


def test_a_module_is_read_anew_at_each_publish(engines: Any) -> None:
    engine, trained = engines(), tiny()
    with ww.Publisher(trained, engine) as publisher:
        for version in range(3):
            with torch.no_grad():
                trained[0].weight.add_(1)
            publisher.publish(version)
            assert same(engine.model, snapshot(trained))


def test_explain_names_the_transport_and_why_not_the_others(engines: Any) -> None:
    engine = engines()
    with ww.Publisher(weights_for(engine.model, 1), engine) as publisher:
        told = publisher.explain()
    assert told.engines["a"].name == "shm"
    no_gpu = "the weights are on the cpu, not on an Nvidia GPU"
    reasons = {"cuda-ipc": no_gpu, "nccl": no_gpu, "shm": None, "gloo": None, "http": "the engine has no HTTP server"}
    assert told.engines["a"].reasons == reasons
    assert "a: over shm" in str(told)
    assert "http: the engine has no HTTP server" in str(told)


@pytest.mark.parametrize("transport", IN_PROCESS)
def test_many_engines_are_resolved_at_the_same_time(engines: Any, transport: str) -> None:
    several = [engines(name) for name in "abcdefgh"]
    new = weights_for(several[0].model, 1)
    for version in range(3):
        receipt = publish(new, several, version, transport=transport)
        assert {mine.transport for mine in receipt.engines.values()} == {transport}
    assert all(same(engine.model, new) for engine in several)


def test_where_one_launch_scans_all_the_pieces_are_only_copied(engines: Any) -> None:
    # As on a GPU, by a source that says it is on one.
    class Source(TensorSource):
        device = torch.device("cuda")

        def read(self, *_: Any) -> Any:
            raise AssertionError("read piece by piece")

    engine = engines()
    sent = weights_for(engine.model, 1)
    with ww.Publisher(Source(sent), engine, transport="shm", bucket_bytes=4096) as publisher:
        assert "not on one Nvidia GPU" in str(publisher.explain())
        publisher.publish(1)
    assert same(engine.model, sent)


def test_a_publisher_that_nobody_closes_leaves_nothing(engines: Any, shm_root: Path) -> None:
    engine = engines()
    ww.Publisher(weights_for(engine.model, 1), engine).publish(1)
    assert not list(shm_root.iterdir())


# -- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"transport": "pigeon"},
        {"bucket_bytes": 4095},
        {"bucket_bytes": (1 << 30) + 1},
        {"lease": 0},
        {"deadline": -1},
    ],
)
def test_an_argument_that_cannot_work_is_refused_at_once(engines: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ww.UsageError):
        ww.Publisher({"w": torch.zeros(2)}, engines(), **options)


def test_without_engines_there_is_nothing_to_do() -> None:
    with pytest.raises(ww.UsageError, match="no engines"):
        ww.Publisher({"w": torch.zeros(2)}, [])


@pytest.mark.parametrize("version", [-1, True, 1.0, "1", None])
def test_a_version_is_a_non_negative_integer(engines: Any, version: Any) -> None:
    engine = engines()
    with pytest.raises(ww.UsageError, match="version"):
        publish(weights_for(engine.model, 1), engine, version)


def test_an_unknown_pause_and_an_unknown_cache_are_refused(engines: Any) -> None:
    engine = engines()
    with pytest.raises(ww.UsageError, match="pause"):
        publish(weights_for(engine.model, 1), engine, 1, pause="nap")
    with pytest.raises(ww.UsageError, match=r"keep_cache='some'.*True, False or 'running'"):
        publish(weights_for(engine.model, 1), engine, 1, keep_cache="some")


# -- what goes wrong before the commit -----------------------------------------------------------------------------


class Flipping:
    """A transport that flips one bit of one bucket between the digest and the wire."""

    def __init__(self, inner: Any, bucket: int, bit: int) -> None:
        self._inner, self._bucket, self._bit = inner, bucket, bit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def sender(self, *args: Any) -> Any:
        sender = self._inner.sender(*args)
        buffer, send = sender.buffer, sender.send

        def flip(bucket: Any) -> None:
            if bucket.index == self._bucket:
                last[0][self._bit // 8] ^= 1 << self._bit % 8
            send(bucket)

        last: list[torch.Tensor] = []

        def keep(bucket: Any) -> torch.Tensor:
            last[:] = [buffer(bucket)]
            return last[0]

        sender.buffer, sender.send = keep, flip
        return sender


@pytest.mark.parametrize("transport", IN_PROCESS)
@pytest.mark.parametrize(("bucket", "bit"), [(0, 0), (0, 4096 * 8 - 1), (3, 777)])
def test_one_flipped_bit_is_noticed(engines: Any, transport: str, bucket: int, bit: int) -> None:
    engine = engines("a", tiny(width=64))
    old = snapshot(engine.model)
    with ww.Publisher(weights_for(engine.model, 1), engine, transport=transport, bucket_bytes=4096) as publisher:
        publisher._means.transports[transport] = Flipping(publisher._means.transports[transport], bucket, bit)
        with pytest.raises(ww.VerificationError, match="another digest on rank 0") as caught:
            publisher.publish(1)
    assert (caught.value.engine, caught.value.phase) == ("a", "seal")
    assert same(engine.model, old)
    assert engine.status().state == "idle"
    publish(new := weights_for(engine.model, 2), engine, 2)
    assert same(engine.model, new)


def test_a_wrong_digest_is_noticed(engines: Any) -> None:
    engine = engines()
    old, commit = snapshot(engine.model), engine.commit
    engine.commit = lambda id, digests, **how: commit(id, digests=[*digests[:3], "0" * 32], **how)
    with pytest.raises(ww.VerificationError, match=r"1 of 4 tensors .* 1\.bias"):
        publish(weights_for(engine.model, 1), engine, 1)
    engine.commit = commit
    assert_unharmed(engine, old, None)


def test_an_old_version_is_refused(engines: Any) -> None:
    engine = engines()
    publish(new := weights_for(engine.model, 1), engine, 5)
    for version in (5, 4, 0):
        with pytest.raises(ww.VersionError, match="not newer than 5") as caught:
            publish(weights_for(engine.model, 2), engine, version)
        assert "Publish version 6 or higher" in str(caught.value)
    assert_unharmed(engine, new, 5)


@pytest.mark.parametrize("transport", IN_PROCESS)
def test_a_second_trainer_is_told_who_holds_the_engine(engines: Any, transport: str) -> None:
    engine = engines()
    old, weights = snapshot(engine.model), weights_for(engine.model, 1)
    manifest = Manifest(version=3, tensors=tuple(find(weights, timeout=9.0).metadata()))
    begun = engine.begin(manifest, holder="trainer-1:42", lease=60.0, timeout=30.0)
    started = time.monotonic()
    with pytest.raises(ww.BusyError, match="held by trainer-1:42, which is sending version 3, until 20") as caught:
        publish(weights, engine, 4, transport=transport, lease=600.0)
    assert time.monotonic() - started < 60  # at once, and not once nobody is waited for any more
    assert caught.value.details["holder"] == "trainer-1:42"
    assert 0 < caught.value.details["until"] - time.time() <= 60
    assert engine.status().update["id"] == begun.id
    engine.abort(begun.id, timeout=30.0)
    assert_unharmed(engine, old, None)


def test_when_a_lease_ends_the_engine_is_free(engines: Any) -> None:
    engine = engines()
    old, weights = snapshot(engine.model), weights_for(engine.model, 1)
    manifest = Manifest(version=3, tensors=tuple(find(weights, timeout=9.0).metadata()))
    begun = engine.begin(manifest, holder="trainer-1:42", lease=0.2, timeout=30.0)
    until(lambda: engine.status().update is None)
    for call in (
        lambda: engine.stage(begun.id, "shm:", timeout=30.0),
        lambda: engine.seal(begun.id, [], timeout=30.0),
        lambda: engine.commit(begun.id, pause="keep", keep_cache=False, timeout=30.0),
    ):
        with pytest.raises(ww.UpdateNotFound, match=r"its lease ended: nothing was heard of trainer-1:42 for 0\.2 s"):
            call()
    assert_unharmed(engine, old, None)


def test_one_engine_that_refuses_keeps_all_from_changing(engines: Any) -> None:
    good, other = engines("good"), engines("other", tiny(width=8))
    old = snapshot(good.model)
    publish(first := weights_for(good.model, 1), good, 1)
    with pytest.raises(ww.ShapeMismatch) as caught:
        publish(weights_for(good.model, 2), [good, other], 2)
    assert (caught.value.engine, caught.value.phase) == ("other", "begin")
    assert not same(good.model, old)
    assert other.status().version is None
    assert_unharmed(good, first, 1)


class Failing:
    """A source that raises at its `at`-th read."""

    ranks = None

    def __init__(self, weights: Any, at: int) -> None:
        self._inner, self.at = find(weights, timeout=9.0), at
        self.aliases = self._inner.aliases

    def metadata(self) -> Any:
        return self._inner.metadata()

    def read(self, tensor: int, start: int, out: torch.Tensor) -> Any:
        self.at -= 1
        if self.at == 0:
            raise OSError("the disk is gone")
        return self._inner.read(tensor, start, out)

    def release(self) -> None:
        self._inner.release()


@pytest.mark.parametrize("transport", IN_PROCESS)
@pytest.mark.parametrize("at", [1, 3])
def test_a_source_that_fails_midway_changes_nothing(engines: Any, transport: str, at: int) -> None:
    engine = engines("a", tiny(width=64))
    old = snapshot(engine.model)
    source = Failing(new := weights_for(engine.model, 1), at)
    with ww.Publisher(source, engine, transport=transport, bucket_bytes=4096, lease=600.0) as publisher:
        with pytest.raises(ww.SourceError, match="the disk is gone") as caught:
            publisher.publish(1)
        assert caught.value.phase == "stage"
        assert same(engine.model, old)
        assert engine.status().state == "idle"
        # At once, and not after the lease of ten minutes.
        started = time.monotonic()
        publisher.publish(2)
        assert time.monotonic() - started < 60
    assert same(engine.model, new)


@pytest.mark.parametrize(("step", "says"), [("send", "lost"), ("buffer", "lost"), ("buffer", "failed"), ("send", None)])
def test_when_sending_fails_the_engine_that_knows_why_is_named(
    engines: Any, monkeypatch: pytest.MonkeyPatch, step: str, says: str | None
) -> None:
    good, other = engines("good"), engines("other")
    old = snapshot(good.model)
    failed = threading.Event()

    def fail(*_: object) -> None:
        failed.set()
        raise ww.TransportError("sending over gloo failed: connection reset by peer")

    def answer(error: Exception, after: float) -> Any:
        def stage(*_: object, **__: object) -> None:
            assert failed.wait(60)
            time.sleep(after)
            raise error

        return stage

    monkeypatch.setattr(gloo._Sender, step, fail)
    if says is not None:
        good.stage = answer(ww.TransportError("receiving failed"), 0.0)
    if says == "lost":
        other.stage = answer(ww.EngineLost("its workers are gone"), 0.2)
    with pytest.raises(ww.WeightwireError) as caught:
        publish(weights_for(good.model, 1), [good, other], 1, transport="gloo", bucket_bytes=4096)
    named = {"lost": ("EngineLost", "other"), "failed": ("TransportError", "good")}
    error = caught.value
    assert (type(error).__name__, error.engine) == named.get(str(says), ("TransportError", "good, other"))
    assert error.phase == "stage"
    monkeypatch.undo()
    for engine in (good, other):
        engine.__dict__.pop("stage", None)
    assert_unharmed(good, old, None)


def test_an_engine_of_the_user_that_raises_anything_is_an_engine_error(engines: Any) -> None:
    good, odd = engines("good"), engines("odd")
    old = snapshot(good.model)

    def begin(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    odd.begin = begin
    with pytest.raises(ww.EngineError, match="odd: begin: unexpected ZeroDivisionError"):
        publish(weights_for(good.model, 1), [good, odd], 1)
    assert_unharmed(good, old, None)


# -- what goes wrong in the commit ---------------------------------------------------------------------------------


def break_commit(engine: ww.TransformersEngine) -> Callable[[], None]:
    """Have the engine's commits fail half-way, after the first tensor; returns what mends it."""
    target = engine.receiver._target
    prepare = target.prepare

    def prepare_broken(manifest: Manifest) -> Any:
        staging = prepare(manifest)

        def commit() -> None:
            (name, staged), *_ = staging._staged.items()
            with torch.no_grad():
                staging._live[name].copy_(staged)
            raise RuntimeError("the bus is on fire")

        staging.commit = commit
        return staging

    target.prepare = prepare_broken
    return lambda: delattr(target, "prepare")


def test_a_commit_that_fails_poisons_until_a_complete_update(engines: Any) -> None:
    engine = engines()
    inputs = torch.zeros(1, 16)
    mend = break_commit(engine)
    with pytest.raises(ww.PoisonedError, match="the bus is on fire") as caught:
        publish(weights_for(engine.model, 1), engine, 1)
    assert (caught.value.engine, caught.value.phase) == ("a", "commit")
    mend()
    status = engine.status()
    assert (status.state, status.version, status.update) == ("poisoned", None, None)
    assert "the bus is on fire" in (status.poisoned or "")
    with pytest.raises(ww.PoisonedError, match="complete update"):
        engine.model(inputs)

    part = {"0.weight": torch.zeros(16, 16)}
    with pytest.raises(ww.PoisonedError, match="a partial update cannot heal it"):
        publish(part, engine, 1, partial=True)
    with pytest.raises(ww.MissingTensor):
        publish(part, engine, 1)
    with pytest.raises(ww.PoisonedError):
        engine.model(inputs)

    publish(new := weights_for(engine.model, 2), engine, 1)
    assert same(engine.model, new)
    assert engine.status().state == "idle"
    engine.model(inputs)


def test_engines_that_end_differently_are_told_apart(engines: Any) -> None:
    good, bad = engines("good"), engines("bad")
    mend = break_commit(bad)
    with pytest.raises(ww.PublishError, match="1 of 2 engines did not commit: bad: commit: ") as caught:
        publish(new := weights_for(good.model, 1), [good, bad], 1)
    outcomes = caught.value.outcomes
    assert sorted(outcomes) == ["bad", "good"]
    assert isinstance(outcomes["bad"], ww.PoisonedError)
    assert isinstance(outcomes["good"], ww.EngineReceipt)
    assert outcomes["good"].version == 1
    assert same(good.model, new)
    mend()
    publish(new := weights_for(good.model, 2), [good, bad], 2)
    assert same(good.model, new)
    assert same(bad.model, new)


# -- how often engines are asked ---------------------------------------------------------------------------------------


def calls_of(engine: ww.TransformersEngine) -> list[str]:
    """From now on, every call of the engine's workers."""
    host, made = engine._host, []
    call = host.call

    async def noted(op: str, *args: Any) -> Any:
        made.append(op)
        return await call(op, *args)

    host.call = noted
    return made


def test_an_engine_that_fetches_from_the_beginning_is_not_asked_how_far_it_is(
    engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_PATIENCE_SECONDS", 60.0)
    engine = engines()
    calls = calls_of(engine)
    publish(new := weights_for(engine.model, 1), engine, 1, transport="shm", bucket_bytes=4096)
    assert same(engine.model, new)
    asked = [op for op in calls if op not in ("status", "try_offers", "poll", "proof")]
    assert asked == ["begin", "seal", "commit", "record"]


@pytest.mark.parametrize("size", ["small", "large"])
def test_when_an_engine_fails_to_fetch_it_says_so_after_a_while(
    engines: Any, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    if size == "large":  # then it is noticed when the third bucket cannot be filled
        monkeypatch.setattr(shm, "_SMALL_UPDATE", 0)
    engine = engines(model=torch.nn.Linear(16, 500))
    old = snapshot(engine.model)
    calls = calls_of(engine)

    def fail(*_: Any) -> Any:
        raise ww.TransportError("the disk is on fire")

    monkeypatch.setattr(engine._host.receiver, "_fetch", fail)
    with pytest.raises(ww.TransportError, match="the disk is on fire") as caught:
        publish(weights_for(engine.model, 1), engine, 1, transport="shm", bucket_bytes=4096)
    assert (caught.value.engine, caught.value.phase) == ("a", "stage")
    assert ("stage" in calls) is (size == "large")
    monkeypatch.undo()
    assert_unharmed(engine, old, None)


@pytest.mark.parametrize("size", ["small", "large"])
def test_an_engine_that_fails_half_way_says_why(engines: Any, monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    if size == "large":
        monkeypatch.setattr(shm, "_SMALL_UPDATE", 0)
    engine = engines(model=torch.nn.Linear(16, 1 << 16))
    old = snapshot(engine.model)

    def no_room(*_: Any) -> Any:
        raise ww.RoomError("no room in the middle")

    with ww.Publisher(weights_for(engine.model, 1), engine, transport="shm", bucket_bytes=1 << 20) as publisher:
        with monkeypatch.context() as patched:
            patched.setattr(Receiver, "_take", no_room)
            with pytest.raises(ww.RoomError, match="no room in the middle") as caught:
                publisher.publish(1)
        assert (caught.value.engine, caught.value.phase) == ("a", "stage")
        assert_unharmed(engine, old, None)


@pytest.mark.parametrize("transport", IN_PROCESS)
def test_tensors_without_an_element_can_be_all_there_is(engines: Any, transport: str) -> None:
    model = torch.nn.Linear(4, 4, bias=False)
    model.weight = torch.nn.Parameter(torch.zeros(4, 0))
    engine = engines(model=model)
    with ww.Publisher({"weight": torch.zeros(4, 0)}, engine, transport=transport, deadline=60) as publisher:
        assert publisher.publish(1).engines["a"].version == 1


@pytest.mark.parametrize("size", ["small", "large"])
def test_buckets_are_filled_while_engines_begin(engines: Any, monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    if size == "large":
        monkeypatch.setattr(shm, "_SMALL_UPDATE", 0)
    engine = engines()
    host, call, seen, filled = engine._host, engine._host.call, [], threading.Event()
    sender = SocketSender if size == "small" else shm._Sender
    send = sender.send

    def tell(self: Any, bucket: Bucket) -> None:
        send(self, bucket)
        filled.set()

    monkeypatch.setattr(sender, "send", tell)

    async def late(op: str, *args: Any) -> Any:
        if op == "begin":
            await engines_loop_until(filled.is_set)
            seen.append(op)
        return await call(op, *args)

    host.call = late
    publish(new := weights_for(engine.model, 1), engine, 1, transport="shm", bucket_bytes=4096)
    assert seen == ["begin"]
    assert same(engine.model, new)


async def engines_loop_until(ready: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


def test_an_engine_with_other_ranks_than_it_had_is_refused(engines: Any) -> None:
    engine = engines()
    old, begin = snapshot(engine.model), engine.begin
    engine.begin = lambda *args, **how: msgspec.structs.replace(begin(*args, **how), ranks=2)
    with pytest.raises(ww.EngineError, match=r"on 2 ranks, expected was .* on 1") as caught:
        publish(weights_for(engine.model, 1), engine, 1)
    assert (caught.value.engine, caught.value.phase) == ("a", "begin")
    engine.begin = begin
    assert_unharmed(engine, old, None)


# -- deadlines -----------------------------------------------------------------------------------------------------


def hang(engine: ww.TransformersEngine, *ops: str) -> Callable[[], None]:
    """Have the engine's workers never answer some calls; returns what mends it."""
    host = engine._host
    call, mended = host.call, threading.Event()

    async def answer(op: str, *args: Any) -> Any:
        import asyncio

        while op in ops and not mended.is_set():
            await asyncio.sleep(0.02)
        return await call(op, *args)

    host.call = answer
    return mended.set


@pytest.mark.parametrize("op", ["status", "begin", "stage", "seal"])
def test_an_engine_that_never_answers_is_named_in_time(engines: Any, op: str) -> None:
    silent = engines("silent")
    everyone = [engines("good"), silent]
    old = snapshot(silent.model)
    mend = hang(silent, op)
    started = time.monotonic()
    if op == "stage":  # is not asked unless something has to be waited for
        silent._host.receiver._fetch = lambda _, arrivals: iter([arrivals.cancelled.wait(60)][:0])
    with pytest.raises(ww.DeadlineError) as caught:
        publish(weights_for(silent.model, 1), everyone, 1, deadline=1.5)
    assert time.monotonic() - started < 30
    assert "silent" in str(caught.value.engine)
    assert caught.value.phase == op
    mend()
    silent._host.receiver._fetch = transports.fetch
    until(lambda: silent.status().update is None)
    for engine in everyone:
        assert engine.status().version is None
    assert_unharmed(silent, old, None)


def test_an_engine_alone_that_never_answers_to_seal_is_as_it_was(engines: Any) -> None:
    engine = engines()
    old = snapshot(engine.model)
    mend = hang(engine, "seal")
    with pytest.raises(ww.DeadlineError, match="no answer within") as caught:
        publish(weights_for(engine.model, 1), engine, 1, deadline=1.5)
    assert (caught.value.engine, caught.value.phase) == ("a", "seal")
    mend()
    until(lambda: engine.status().update is None)
    assert_unharmed(engine, old, None)


def test_a_commit_that_is_never_answered_poisons(engines: Any) -> None:
    engine = engines()
    mend = hang(engine, "commit")
    with pytest.raises(ww.PoisonedError, match="no answer within") as caught:
        publish(weights_for(engine.model, 1), engine, 1, deadline=1.5)
    assert (caught.value.engine, caught.value.phase) == ("a", "commit")
    with pytest.raises(ww.PoisonedError):
        engine.model(torch.zeros(1, 16))
    mend()
    assert engine.status().update is None
    publish(new := weights_for(engine.model, 2), engine, 2)
    assert same(engine.model, new)
    engine.model(torch.zeros(1, 16))


def test_a_pause_that_takes_too_long_changes_nothing(engines: Any) -> None:
    engine = engines()
    old, entered, leave = snapshot(engine.model), threading.Event(), threading.Event()

    class Slow(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            entered.set()
            leave.wait(60)
            return x

    engine.model.append(Slow())
    generating = threading.Thread(target=engine.model, args=(torch.zeros(1, 16),))
    generating.start()
    try:
        assert entered.wait(60)
        with pytest.raises(ww.DeadlineError) as caught:
            publish(weights_for(engine.model, 1), engine, 1, deadline=1.5)
        assert (caught.value.engine, caught.value.phase) == ("a", "pause")
        assert engine.status().update is None
    finally:
        leave.set()
        generating.join()
    assert_unharmed(engine, old, None)


# -- shared memory -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_memory(root: Path, kilobytes: int) -> Iterator[Path]:
    """A tmpfs of limited size; skipped where this user may not mount one."""
    root.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(root)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("mounting a tmpfs takes root")
    try:
        yield root
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)
        root.rmdir()


def use_as_shm(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transports._MAKERS, "shm", lambda weights: shm.Shm(root))
    monkeypatch.setitem(transports._FETCH, "shm", lambda *args: shm.fetch(*args, root=root))
    monkeypatch.setitem(transports._PROBE, "shm", lambda offer: shm.probe(offer, root=root))


def test_a_shared_memory_of_a_megabyte_means_smaller_buckets(
    engines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines("a", tiny(width=512))
    with small_memory(tmp_path / "small", 1024) as root:
        use_as_shm(root, monkeypatch)
        receipt = publish(new := weights_for(engine.model, 1), engine, 1)
        assert not list(root.iterdir())
    assert receipt.engines["a"].transport == "shm"
    assert same(engine.model, new)


def test_a_shared_memory_that_is_too_small_is_passed_over(
    engines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines()
    with small_memory(tmp_path / "small", 512) as root:
        use_as_shm(root, monkeypatch)
        with ww.Publisher(new := weights_for(engine.model, 1), engine) as publisher:
            told = publisher.explain()
            assert publisher.publish(1).engines["a"].transport == "gloo"
    assert told.engines["a"].name == "gloo"
    assert "has room for two buckets of" in (told.engines["a"].reasons["shm"] or "")
    assert same(engine.model, new)


@pytest.mark.parametrize("how", ["statvfs", "posix_fallocate", "rename"])
def test_a_shared_memory_that_fills_up_is_noticed(engines: Any, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    engine = engines()
    old, full = snapshot(engine.model), list(os.statvfs("/dev/shm"))
    full[4] = 0

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with ww.Publisher(new := weights_for(engine.model, 1), engine) as publisher:
        if how == "statvfs":
            monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(full))
        else:
            assert publisher.explain().engines["a"].name == "shm"
            monkeypatch.setattr(os, how, refuse)
            monkeypatch.setattr(shm, "_SMALL_UPDATE", 0 if how == "posix_fallocate" else shm._SMALL_UPDATE)
            with pytest.raises(ww.TransportError, match="No space left"):
                publisher.publish(1)
            assert same(engine.model, old)
            monkeypatch.undo()
            monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(full))
        assert publisher.publish(2).engines["a"].transport == "gloo"
    assert same(engine.model, new)


def until(ready: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("transport", IN_PROCESS)
def test_nothing_of_a_publish_is_left_for_the_garbage_collector(
    engines: Any, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    engine, made = engines(), []
    original = Run.__init__

    def init(self: Run, *args: Any, **how: Any) -> None:
        made.append(weakref.ref(self))
        original(self, *args, **how)

    monkeypatch.setattr(Run, "__init__", init)
    weights = weights_for(engine.model, 1)
    gc.collect()
    gc.disable()
    try:
        with ww.Publisher(weights, engine, transport=transport, baseline="host") as publisher:
            for version in (1, 2):
                publisher.publish(version)
            # Deltas are in pinned memory on some trainers, of which the next update wants what the oldest leave.
            assert [each() for each in made] == [None] * len(made)
    finally:
        gc.enable()
    assert len(made) == 2


# -- what is lent --------------------------------------------------------------------------------------------------


class Lending:
    """Memory that is lent from this process to itself, as `cuda-ipc` lends a GPU's."""

    name = "cuda-ipc"

    def __init__(self, weights: Any) -> None:
        pass

    @contextlib.contextmanager
    def offer(self, host: str) -> Iterator[str]:
        yield "cuda-ipc:"

    @contextlib.contextmanager
    def lend(self, tensors: Any) -> Iterator[str]:
        Lending.lent = tensors
        yield "cuda-ipc:"

    def close(self) -> None:
        pass


@pytest.fixture
def lending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transports._MAKERS, "cuda-ipc", Lending)
    monkeypatch.setitem(transports._PROBE, "cuda-ipc", lambda offer: None)
    monkeypatch.setitem(transports._OPEN, "cuda-ipc", lambda address, tensors: Lent(Lending.lent))


@pytest.mark.usefixtures("lending")
def test_where_nothing_travels_a_commit_is_asked_for_while_the_engine_begins(engines: Any) -> None:
    engine = engines()
    call, commit, asked = engine._host.call, engine.commit, threading.Event()

    async def answer(op: str, *args: Any) -> Any:
        replies = await call(op, *args)
        while op == "begin" and not asked.is_set():  # for ever, if it is waited for
            await asyncio.sleep(0.01)
        return replies

    def tell(*args: Any, **how: Any) -> Any:
        asked.set()
        return commit(*args, **how)

    engine._host.call, engine.commit = answer, tell
    new = weights_for(engine.model, 1)
    receipt = publish(new, engine, 1, deadline=20.0)
    assert same(engine.model, new)
    assert receipt.engines["a"].transport == "cuda-ipc"


@pytest.mark.usefixtures("lending")
@pytest.mark.parametrize("why", ["several servers", "several engines"])
def test_where_nobody_sees_to_the_order_a_commit_is_not_asked_for_before_the_engine_has_begun(
    engines: Any, why: str
) -> None:
    engine, others = engines(), [engines("b")] if why == "several engines" else []
    status, begin, commit = engine.status, engine.begin, engine.commit
    calls: list[str] = []

    def slow(*args: Any, **how: Any) -> Any:
        begun = begin(*args, **how)
        time.sleep(0.3)
        calls.append("begun")
        return begun

    def tell(*args: Any, **how: Any) -> Any:
        calls.append("commit")
        return commit(*args, **how)

    if why == "several servers":
        engine.status = lambda *args, **how: msgspec.structs.replace(status(*args, **how), one_server=False)
    engine.begin, engine.commit = slow, tell
    publish(weights_for(engine.model, 1), [engine, *others], 1, deadline=30.0)
    assert calls == ["begun", "commit"]


@pytest.mark.usefixtures("lending")
def test_a_commit_that_comes_before_its_beginning_is_asked_for_again(engines: Any) -> None:
    engine = engines()
    begin, commit, overtaken = engine.begin, engine.commit, threading.Event()
    refused: list[str] = []

    def late(*args: Any, **how: Any) -> Any:
        assert overtaken.wait(20)
        return begin(*args, **how)

    def early(*args: Any, **how: Any) -> Any:
        try:
            return commit(*args, **how)
        except ww.UpdateNotFound as error:
            refused.append(str(error.phase))
            raise
        finally:
            overtaken.set()

    engine.begin, engine.commit = late, early
    new = weights_for(engine.model, 1)
    publish(new, engine, 1, deadline=30.0)
    assert same(engine.model, new)
    assert refused == ["seal"]


@pytest.mark.usefixtures("lending")
def test_of_a_beginning_that_fails_while_its_commit_is_asked_for_the_reason_is_told(engines: Any) -> None:
    engine = engines()
    old, commit, asked = snapshot(engine.model), engine.commit, threading.Event()

    def busy(*args: Any, **how: Any) -> Any:
        assert asked.wait(20)
        raise ww.BusyError("held by another")

    def tell(*args: Any, **how: Any) -> Any:
        asked.set()
        return commit(*args, **how)

    begin, engine.begin, engine.commit = engine.begin, busy, tell
    with pytest.raises(ww.BusyError, match="held by another") as caught:
        publish(weights_for(engine.model, 1), engine, 1, deadline=30.0)
    assert (caught.value.engine, caught.value.phase) == ("a", "begin")
    engine.begin, engine.commit = begin, commit
    assert_unharmed(engine, old, None)


@pytest.mark.usefixtures("lending")
@pytest.mark.parametrize(
    ("gpus", "staging", "expected"),
    [
        ((None,), "copy", "lent"),
        ((None,), "none", "lent"),
        ((), "none", "lent"),  # an older engine's, which takes what is lent
        (("GPU-2",), "copy", "lent"),
        (("GPU-2",), "none", "none"),
        ((None, "GPU-2"), "none", "none"),
    ],
)
def test_live_weights_are_written_over_at_once_only_where_they_come_from_another_gpu(
    engines: Any, gpus: tuple[str | None, ...], staging: Any, expected: str
) -> None:
    engine = engines()
    status, asked = engine.status, list[str]()
    engine.status = lambda *args, **how: msgspec.structs.replace(status(*args, **how), gpus=gpus)

    def refuse(manifest: Manifest, **how: Any) -> Any:
        asked.append(manifest.staging)
        raise ww.BusyError("held by another")

    engine.begin = refuse
    with pytest.raises(ww.BusyError):
        publish(weights_for(engine.model, 1), engine, 1, staging=staging)
    assert asked == [expected]
