"""Buckets: how an update's tensors are cut into the runs of bytes that travel.

Both sides make the same cut from the manifest alone, so nothing but the bytes themselves is sent. Tensors are packed
in manifest order, each piece aligned; a tensor larger than a bucket is split between elements.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from weightwire.updates.manifest import Manifest, TensorSpec

__all__ = ["ALIGNMENT", "Bucket", "Piece", "copy_pieces", "cut"]

ALIGNMENT = 64
"""Bytes. Every piece starts at a multiple, so that it can be viewed as any dtype and read in whole cache lines."""


class Piece(NamedTuple):
    """Elements `start .. start + count` (row-major) of tensor number `tensor`, at byte `offset` of its bucket."""

    tensor: int
    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody misses here
    offset: int

    def within(self, data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Its elements in the memory of its bucket (uint8, 1-D).

        >>> Piece(0, 5, 2, 4).within(torch.tensor([0, 0, 0, 0, 1, 0, 2, 0], dtype=torch.uint8), torch.int16)
        tensor([1, 2], dtype=torch.int16)
        """
        return data[self.offset : self.offset + self.count * dtype.itemsize].view(dtype)


class Bucket(NamedTuple):
    index: int  # type: ignore[assignment]
    nbytes: int
    pieces: tuple[Piece, ...]


def copy_pieces(bucket: Bucket, data: torch.Tensor, tensors: Sequence[torch.Tensor], *, fill: bool) -> None:
    """Copy a bucket's pieces, of tensors of bytes (uint8, 1-D, on one device), between them and `data`, the bucket's
    memory: out of it, or into it with `fill`, where nothing is waited for and the tensors must stay. Where they lie
    side by side just as in the bucket, it is one copy: for hundreds of them, one each takes longer than their bytes.

    >>> bucket, memory = Bucket(0, 67, (Piece(0, 0, 2, 0), Piece(1, 0, 3, 64))), torch.zeros(80, dtype=torch.uint8)
    >>> copy_pieces(bucket, torch.arange(67, dtype=torch.uint8), [memory[:2], memory[64:67]], fill=False)
    >>> memory[:2].tolist(), memory[64:].tolist()
    ([0, 1], [64, 65, 66, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    """
    if not bucket.pieces:
        return
    if (memory := _laid_out_alike(bucket, tensors)) is not None:
        own, there = [memory], [data[: bucket.nbytes]]
    else:
        own = [tensors[number][start : start + count] for number, start, count, _ in bucket.pieces]
        there = [data[at : at + count] for _, _, count, at in bucket.pieces]
    if fill:
        torch._foreach_copy_(there, own, non_blocking=True)
    else:
        torch._foreach_copy_(own, there)  # what arrives may lie in memory that is written again at once


def _laid_out_alike(bucket: Bucket, tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The memory of which all pieces are parts, at the same distances as in the bucket."""
    number, start, _, _ = bucket.pieces[0]
    first = tensors[number]
    address = first.data_ptr() + start
    memory = first.untyped_storage()
    inside = address + bucket.nbytes <= memory.data_ptr() + memory.nbytes()
    if inside and all(tensors[n].data_ptr() + begin == address + offset for n, begin, _, offset in bucket.pieces):
        return first.as_strided((bucket.nbytes,), (1,), first.storage_offset() + start)
    return None


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
