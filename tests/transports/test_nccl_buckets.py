"""What the trainer's half sends over NCCL, without NCCL: which buckets are packed, and where."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from weightwire.landing import Landing
from weightwire.receiver import Arrivals
from weightwire.transports import nccl, nccl_group
from weightwire.updates.buckets import cut
from weightwire.updates.manifest import Manifest, TensorSpec

LARGE, SMALL = 2 << 20, 1000


class Group:
    """Notes what it is given; `breaks` at a broadcast."""

    def __init__(self, breaks: int = -1) -> None:
        self.open, self.sent, self.breaks = 0, [], breaks

    def _start_coalescing(self) -> None:
        self.open += 1

    def _end_coalescing(self) -> Any:
        self.open -= 1
        return SimpleNamespace(is_completed=lambda: True)

    def broadcast(self, tensors: list[torch.Tensor], _: Any) -> None:
        if len(self.sent) == self.breaks:
            raise RuntimeError("NCCL broke")
        self.sent.append(tensors[0].clone())


def sender_of(group: Group, nbytes: int) -> Any:
    owner: Any = SimpleNamespace(_group=nccl._Group("k", [], group), _device=torch.device("cpu"))
    meeting: Any = SimpleNamespace(store=None, places=lambda key, links: ([], 1))
    return nccl._Sender(owner, meeting, [], [], nbytes, lambda ready, what: None, 1.0)


@pytest.mark.parametrize("sizes", [[LARGE] * n + [SMALL] * 5 for n in range(5)] + [[SMALL] * 3 + [LARGE] * 4 + [SMALL]])
def test_buckets_are_packed_after_any_number_that_were_not(monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    specs = tuple(TensorSpec(name=f"w{n}", dtype="uint8", shape=(size,)) for n, size in enumerate(sizes))
    tensors = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    buckets = cut(Manifest(version=1, tensors=specs, bucket_bytes=LARGE))
    group, found = Group(), [torch.zeros_like(tensor) for tensor in tensors]
    sender = sender_of(group, LARGE)
    for bucket in buckets:
        group.sent.clear()
        if bucket.apart:
            sender.send_parts(bucket, [piece.of(tensors[piece.tensor]) for piece in bucket.pieces])
            parts = group.sent
        else:
            data = sender.buffer(bucket)
            for piece in bucket.pieces:
                piece.within(data).copy_(piece.of(tensors[piece.tensor]))
            sender.send(bucket)
            parts = [piece.within(group.sent[0]) for piece in bucket.pieces]
        for piece, part in zip(bucket.pieces, parts, strict=True):
            piece.of(found[piece.tensor]).copy_(part)
    assert all(torch.equal(one, other) for one, other in zip(found, tensors, strict=True))
    assert len(sender._buffers) <= 3


def test_a_broadcast_that_fails_leaves_no_launch_open() -> None:
    group = Group(breaks=1)
    with pytest.raises(RuntimeError, match="NCCL broke"):
        nccl_group.broadcast(group, [torch.zeros(2), torch.zeros(2)])
    assert group.open == 0


def test_what_nccl_does_not_know_travels_as_bytes() -> None:
    group = Group()
    nccl_group.broadcast(group, [torch.zeros(2, dtype=getattr(torch, name)) for name in ("bfloat16", "int16", "int64")])
    assert [(sent.dtype, sent.numel()) for sent in group.sent] == [
        (torch.bfloat16, 2),
        (torch.uint8, 4),
        (torch.uint8, 16),
    ]


def fetched(monkeypatch: pytest.MonkeyPatch, group: Group, count: int, places: Any) -> Any:
    """What is fetched of `count` large buckets, from a group that has them all at once."""
    specs = tuple(TensorSpec(name=f"w{n}", dtype="uint8", shape=(LARGE,)) for n in range(count))
    buckets = cut(Manifest(version=1, tensors=specs, bucket_bytes=LARGE))
    arrivals = Arrivals(
        update="", rank=0, tensors=specs, buckets=buckets, lease=60.0, cancelled=threading.Event(), places=places
    )
    monkeypatch.setattr(Arrivals, "landing", lambda self: Landing(self.buckets, self.places, torch.device("cpu")))
    monkeypatch.setattr(nccl, "_wait", lambda work, arrivals, pause: None)
    monkeypatch.setattr(nccl, "_joined", [nccl._Group("key", None, group)])
    return nccl.fetch("nccl:host:1/key/1/2/kept", arrivals)


@pytest.mark.parametrize(
    ("placed", "depths"), [(True, [8, 9, 10, 11, 12, 12, 12, 12, 12, 12, 12, 12]), (False, [3, *range(4, 13), 12, 12])]
)
def test_as_much_is_asked_for_ahead_as_has_memory(
    monkeypatch: pytest.MonkeyPatch, placed: bool, depths: list[int]
) -> None:
    """How many buckets have been asked for once each is used; where all have places, as many as a GPU may queue."""
    own, group = torch.zeros(12, LARGE, dtype=torch.uint8), Group()
    coming = fetched(monkeypatch, group, 12, lambda bucket: [own[bucket.index] if placed else None])
    assert [(index, len(group.sent)) for index, _ in coming] == [*enumerate(depths)]


def test_no_memory_is_asked_for_that_is_not_used_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where some buckets have places and some have not, in turn."""
    own, group = torch.zeros(20, LARGE, dtype=torch.uint8), Group()
    asked: list[int] = []
    group.broadcast = lambda tensors, _: asked.append(tensors[0].data_ptr())  # type: ignore[method-assign]
    coming = fetched(monkeypatch, group, 20, lambda bucket: [own[bucket.index] if bucket.index % 3 else None])
    for index, landed in coming:
        assert asked[index] == landed.parts[0].data_ptr()
        assert asked[index] not in asked[index + 1 :]  # else what comes next is written over what is used now
    assert len(asked) == 20
