"""Buckets over NCCL from one GPU to another, both in this process: no vLLM.

pytest -m gpu tests/gpu/test_nccl.py        # needs two GPUs
"""

from __future__ import annotations

import functools
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch

from support.gpu import gpu, two_gpus
from weightwire.receiver import Arrivals
from weightwire.transports.base import Link
from weightwire.transports.nccl import Nccl, fetch
from weightwire.updates.buckets import Bucket, cut
from weightwire.updates.manifest import Manifest, TensorSpec

pytestmark = [*gpu[:1], two_gpus]

T = TypeVar("T")
SECONDS = 60.0
SHAPES = [(3 << 20,), (2 << 20,), (1 << 20,), *[(1000 + n,) for n in range(20)]]
SPECS = tuple(TensorSpec(name=f"w{n}", dtype="bfloat16", shape=shape) for n, shape in enumerate(SHAPES))
MANIFEST = Manifest(version=1, tensors=SPECS, bucket_bytes=4 << 20)


class Weights:
    device = torch.device("cuda", 0)

    def whole(self) -> None:
        return None


def wait(ready: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + SECONDS
    while not ready():
        assert time.monotonic() < until, what
        time.sleep(0.001)


def send(transport: Nccl, tensors: list[torch.Tensor], begin: Callable[[str], T], *, packed: bool) -> T:
    """Gives what `begin` gives for the address."""
    torch.cuda.set_device(0)
    link = Link(engine="e", update=secrets.token_hex(16), ranks=1, put=lambda index, body: None)
    sender = transport.sender([link], cut(MANIFEST), wait, SECONDS)
    try:
        (address,) = sender.addresses
        assert address is not None
        begun = begin(address)
        for bucket in cut(MANIFEST):
            parts = [piece.of(tensors[piece.tensor]) for piece in bucket.pieces]
            if bucket.apart and not packed:
                sender.send_parts(bucket, parts)
                continue
            data = sender.buffer(bucket)
            for piece, part in zip(bucket.pieces, parts, strict=True):
                piece.within(data).copy_(part)
            sender.send(bucket)
        sender.finish()
        return begun
    finally:
        sender.close()


def receive(address: str, own: dict[int, torch.Tensor]) -> list[torch.Tensor]:
    """What came, tensor by tensor; those in `own` come there by themselves."""
    torch.cuda.set_device(1)

    def places(bucket: Bucket) -> list[torch.Tensor | None]:
        return [piece.of(own[piece.tensor]) if piece.tensor in own else None for piece in bucket.pieces]

    arrivals = Arrivals(
        update="",
        rank=0,
        tensors=SPECS,
        buckets=cut(MANIFEST),
        lease=SECONDS,
        cancelled=threading.Event(),
        places=places,
    )
    found = [torch.zeros(shape, dtype=torch.bfloat16, device="cuda:1") for shape in SHAPES]
    for index, landed in fetch(address, arrivals):
        for piece, part in zip(arrivals.buckets[index].pieces, landed.parts, strict=True):
            piece.of(found[piece.tensor]).copy_(part)
    torch.cuda.synchronize(1)
    return found


@pytest.mark.parametrize("packed", [False, True], ids=["from where they are", "packed"])
@pytest.mark.parametrize("placed", [(), (0,), (0, 1, 2, 5), range(23)], ids=len)
def test_what_comes_is_what_was_sent(placed: range, packed: bool) -> None:
    assert {bucket.apart for bucket in cut(MANIFEST)} == {True, False}
    transport = Nccl(Weights())
    with ThreadPoolExecutor() as pool, transport.offer("localhost"):
        try:
            for _ in range(3):  # the second and third time in the group that there is
                tensors = [torch.randn(shape, device="cuda:0").bfloat16() for shape in SHAPES]
                own = {n: torch.zeros(SHAPES[n], dtype=torch.bfloat16, device="cuda:1") for n in placed}
                torch.cuda.synchronize(0)
                begin = functools.partial(lambda own, address: pool.submit(receive, address, own), own)
                found = send(transport, tensors, begin, packed=packed).result(SECONDS)
                for number, (sent, got) in enumerate(zip(tensors, found, strict=True)):
                    assert torch.equal(got.cpu(), sent.cpu()), number
                for number, tensor in own.items():
                    if number < 2:  # the others come together with small ones
                        assert torch.equal(tensor.cpu(), tensors[number].cpu()), number
        finally:
            transport.close()
