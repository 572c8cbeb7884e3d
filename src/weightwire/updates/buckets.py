"""Buckets: how an update's tensors are cut into the runs of bytes that travel.

Both sides make the same cut from the manifest alone, so nothing but the bytes themselves is sent. Tensors are packed
in manifest order, each piece aligned; a tensor larger than a bucket is split between elements.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from weightwire.updates.manifest import Manifest, TensorSpec

__all__ = ["ALIGNMENT", "Bucket", "Piece", "cut"]

ALIGNMENT = 64
"""Bytes. Every piece starts at a multiple, so that it can be viewed as any dtype and read in whole cache lines."""


class Piece(NamedTuple):
    """Elements `start .. start + count` (row-major) of tensor number `tensor`, at byte `offset` of its bucket."""

    tensor: int
    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody misses here
    offset: int


class Bucket(NamedTuple):
    index: int  # type: ignore[assignment]
    nbytes: int
    pieces: tuple[Piece, ...]


def cut(manifest: Manifest) -> tuple[Bucket, ...]:
    """The buckets of an update, none larger than `manifest.bucket_bytes`.

    >>> spec = TensorSpec(name="w", dtype="float32", shape=(1500,))
    >>> [b.pieces for b in cut(Manifest(version=1, tensors=(spec,), bucket_bytes=4096))]
    [(Piece(tensor=0, start=0, count=1024, offset=0),), (Piece(tensor=0, start=1024, count=476, offset=0),)]
    """
    return _cut(manifest.wire, manifest.bucket_bytes)


@functools.lru_cache(maxsize=8)
def _cut(tensors: tuple[TensorSpec, ...], limit: int) -> tuple[Bucket, ...]:
    buckets: list[Bucket] = []
    pieces: list[Piece] = []
    used = 0

    def close() -> None:
        nonlocal used
        if pieces:
            buckets.append(Bucket(len(buckets), used, tuple(pieces)))
            pieces.clear()
        used = 0

    for number, spec in enumerate(tensors):
        start = 0
        while start < spec.numel:
            offset = -(-used // ALIGNMENT) * ALIGNMENT
            room = (limit - offset) // spec.itemsize
            # A tensor that fits into a fresh bucket is kept whole; only larger ones are split.
            if room < spec.numel - start and pieces and (room < 1 or spec.nbytes <= limit):
                close()
                continue
            count = min(room, spec.numel - start)
            pieces.append(Piece(number, start, count, offset))
            used = offset + count * spec.itemsize
            start += count
    close()
    return tuple(buckets)
