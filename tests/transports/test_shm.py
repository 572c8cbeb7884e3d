"""Shared memory by itself: two segments, filled again and again, and what a reader makes of a bad one."""

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


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every update counts as a large one."""
    monkeypatch.setattr(shm, "_SMALL_UPDATE", -1)


def test_every_bucket_arrives_as_it_was_sent_though_each_segment_is_mapped_once(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert len(maps) == 2


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


def test_an_engine_that_has_swept_its_names_is_asked_why(root: Path) -> None:
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
