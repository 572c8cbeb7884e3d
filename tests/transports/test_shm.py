"""Shared memory by itself: two segments, filled again and again, or one for each bucket of a small update; and what a
reader makes of a bad one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from weightwire.errors import TransportError
from weightwire.receiver import Arrivals
from weightwire.transports import shm
from weightwire.transports.base import Link
from weightwire.updates.buckets import Bucket

UPDATE = "0123456789abcdef" * 2
SECONDS = 60.0


def buckets_of(*sizes: int) -> list[Bucket]:
    return [Bucket(index, nbytes, ()) for index, nbytes in enumerate(sizes)]


def arrivals_of(buckets: list[Bucket], *, lease: float = SECONDS) -> Arrivals:
    return Arrivals(update=UPDATE, rank=0, tensors=(), buckets=buckets, lease=lease, cancelled=threading.Event())


def wait(ready: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not ready():
        assert time.monotonic() < deadline, what
        time.sleep(0.0005)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every update counts as a large one."""
    monkeypatch.setattr(shm, "_SMALL_UPDATE", 0)
    monkeypatch.setattr(shm, "_SMALL_BUCKET", 0)


@pytest.mark.parametrize("mapped", [0, 2])
def test_every_bucket_arrives_as_it_was_sent_though_each_segment_is_mapped_once(
    root: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, mapped: int
) -> None:
    if mapped:
        request.getfixturevalue("large")
    buckets = buckets_of(300, 5000, 4096, 5000, 1, 4999, 5000)
    sent = [torch.randint(0, 256, (bucket.nbytes,), dtype=torch.uint8) for bucket in buckets]
    maps: list[int] = []
    map_segment = shm._map
    monkeypatch.setattr(shm, "_map", lambda fd: (maps.append(fd), map_segment(fd))[1])
    sender = shm.Shm(root).sender(
        [Link(engine="e", update=UPDATE, ranks=1, put=lambda *_: None)], buckets, wait, SECONDS
    )
    got: dict[int, torch.Tensor] = {}
    reader = threading.Thread(
        target=lambda: got.update({i: d.clone() for i, d in shm.fetch("shm:", arrivals_of(buckets), root)})
    )
    reader.start()
    try:
        for bucket, data in zip(buckets, sent, strict=True):
            sender.buffer(bucket).copy_(data)
            sender.send(bucket)
        sender.finish()
    finally:
        reader.join(SECONDS)
        sender.close()
    assert sorted(got) == list(range(len(buckets)))
    assert all(torch.equal(got[i], data) for i, data in enumerate(sent))
    assert len(maps) == mapped


@pytest.mark.parametrize("size", [0, 99])
def test_a_segment_that_is_too_small_is_an_error(root: Path, size: int) -> None:
    name = shm._name(root, UPDATE, 0, 0)
    name.write_bytes(b"x" * size)
    with pytest.raises(TransportError, match=f"holds {size} bytes, 100 were announced"):
        list(shm.fetch("shm:", arrivals_of(buckets_of(100)), root))
    shm.sweep(UPDATE, root)


def test_a_silent_trainer_is_an_error_when_the_lease_is_over(root: Path) -> None:
    with pytest.raises(TransportError, match="sent nothing for"):
        list(shm.fetch("shm:", arrivals_of(buckets_of(100), lease=0.05), root))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_small_update_waits_for_nobody_until_its_end(root: Path, ranks: int) -> None:
    buckets = buckets_of(300, 5000, 4096)
    asked: list[str] = []

    def wait_and_tell(ready: Callable[[], bool], what: str) -> None:
        asked.append(what)
        assert not ready()
        for rank in range(ranks):
            arrivals = Arrivals(
                update=UPDATE, rank=rank, tensors=(), buckets=buckets, lease=SECONDS, cancelled=threading.Event()
            )
            assert not ready()
            assert [data[0].item() for _, data in shm.fetch("shm:", arrivals, root)] == [1, 2, 3]
        assert ready()

    links = [Link(engine="e", update=UPDATE, ranks=ranks, put=lambda *_: None)]
    sender = shm.Shm(root).sender(links, buckets, wait_and_tell, SECONDS)
    for number, bucket in enumerate(buckets, start=1):
        sender.buffer(bucket).fill_(number)
        sender.send(bucket)
    assert not asked
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in root.iterdir())
    sender.finish()
    assert asked == ["the last buckets to be read"]
    assert [path.stat().st_size for path in root.iterdir()] == [0]  # the sign that the update goes on
    sender.close()


def test_what_nobody_reads_goes_with_the_sender(root: Path) -> None:
    buckets = buckets_of(300, 5000)
    links = [Link(engine="e", update=UPDATE, ranks=2, put=lambda *_: None)]
    sender = shm.Shm(root).sender(links, buckets, wait, SECONDS)
    for bucket in buckets:
        sender.buffer(bucket).fill_(1)
        sender.send(bucket)
    assert len(list(root.iterdir())) == 5
    sender.close()


def test_a_small_update_is_broken_off_by_the_first_bucket_after_an_engine_swept_its_names(root: Path) -> None:
    buckets = buckets_of(300, 5000, 300)
    links = [Link(engine=name, update=name * 32, ranks=1, put=lambda *_: None) for name in "ab"]

    def refuse(ready: Callable[[], bool], what: str) -> None:
        raise TransportError(what)

    sender = shm.Shm(root).sender(links, buckets, refuse, SECONDS)
    sender.buffer(buckets[0])
    sender.send(buckets[0])
    shm.sweep("b" * 32, root)
    sender.buffer(buckets[1])
    with pytest.raises(TransportError, match="to say why it ended"):
        sender.send(buckets[1])
    assert list(root.iterdir()) == []
    sender.close()


def test_a_root_that_takes_nothing_is_an_error_that_leaves_nothing(root: Path) -> None:
    (root / f"weightwire-{'b' * 32}-sign").touch()
    links = [Link(engine=name, update=name * 32, ranks=1, put=lambda *_: None) for name in "ab"]
    with pytest.raises(TransportError, match="nothing can be put into"):
        shm.Shm(root).sender(links, buckets_of(300), wait, SECONDS)


def test_an_engine_that_has_swept_its_names_is_asked_why(root: Path, large: None) -> None:
    (bucket,) = buckets_of(4096)
    asked: list[str] = []

    def wait_or_say_why(ready: Callable[[], bool], what: str) -> None:
        if not ready():
            asked.append(what)
            raise TransportError("the update was refused")

    links = [Link(engine="e", update=UPDATE, ranks=1, put=lambda *_: None)]
    sender = shm.Shm(root).sender(links, [bucket], wait_or_say_why, SECONDS)
    sender.buffer(bucket)
    shm.sweep(UPDATE, root)
    with pytest.raises(TransportError, match="refused"):
        sender.send(bucket)
    assert asked == ["the engine to say why it ended the update"]
    sender.close()
