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

__all__ = ["ALIGNMENT", "Bucket", "Piece", "cut", "fill_bucket"]

ALIGNMENT = 64
"""Bytes. Every piece starts at a multiple, so that it can be viewed as any dtype and read in whole cache lines."""


_APART_BYTES = 1 << 20  # on average; to see to a piece by itself takes as long as to copy that much


class Piece(NamedTuple):
    """Elements `start .. start + count` (row-major) of tensor number `tensor`, at byte `offset` of its bucket."""

    tensor: int
    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody misses here
    offset: int
    dtype: torch.dtype

    def within(self, data: torch.Tensor) -> torch.Tensor:
        """Its elements in the memory of its bucket (uint8, 1-D).

        >>> Piece(0, 5, 2, 4, torch.int16).within(torch.tensor([0, 0, 0, 0, 1, 0, 2, 0], dtype=torch.uint8))
        tensor([1, 2], dtype=torch.int16)
        """
        return data[self.offset : self.offset + self.count * self.dtype.itemsize].view(self.dtype)

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Its elements in all of its tensor's, 1-D."""
        return flat if self.count == flat.numel() else flat[self.start : self.start + self.count]


class Bucket(NamedTuple):
    index: int  # type: ignore[assignment]
    nbytes: int
    pieces: tuple[Piece, ...]

    @property
    def apart(self) -> bool:
        """Whether its pieces are large enough for each to travel by itself, where that saves a copy.

        >>> Bucket(0, 8 << 20, (Piece(0, 0, 8 << 20, 0, torch.uint8),)).apart, Bucket(0, 0, ()).apart
        (True, False)
        """
        return self.nbytes > len(self.pieces) * _APART_BYTES


def fill_bucket(bucket: Bucket, data: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """Copy a bucket's pieces, of tensors of bytes (uint8, 1-D, on one device), into `data`, the bucket's memory. It is
    not waited for, and the tensors must stay. Where they lie side by side just as in the bucket, it is one copy: for
    hundreds of them, one each takes longer than their bytes.

    >>> memory, data = torch.arange(80, dtype=torch.uint8), torch.zeros(67, dtype=torch.uint8)
    >>> bucket = Bucket(0, 67, (Piece(0, 0, 2, 0, torch.uint8), Piece(1, 0, 3, 64, torch.uint8)))
    >>> fill_bucket(bucket, data, [memory[:2], memory[64:67]])
    >>> data[:2].tolist(), data[64:].tolist()
    ([0, 1], [64, 65, 66])
    """
    if not bucket.pieces:
        return
    if (memory := _laid_out_alike(bucket, tensors)) is not None:
        data[: bucket.nbytes].copy_(memory, non_blocking=True)
        return
    own = [piece.of(tensors[piece.tensor]) for piece in bucket.pieces]
    torch._foreach_copy_([piece.within(data) for piece in bucket.pieces], own, non_blocking=True)


def _laid_out_alike(bucket: Bucket, tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The memory of which all pieces are parts, at the same distances as in the bucket."""
    start = bucket.pieces[0].start
    first = tensors[bucket.pieces[0].tensor]
    address = first.data_ptr() + start
    memory = first.untyped_storage()
    inside = address + bucket.nbytes <= memory.data_ptr() + memory.nbytes()
    if inside and all(tensors[p.tensor].data_ptr() + p.start == address + p.offset for p in bucket.pieces):
        return first.as_strided((bucket.nbytes,), (1,), first.storage_offset() + start)
    return None


def cut(manifest: Manifest) -> tuple[Bucket, ...]:
    """The buckets of an update, none larger than `manifest.bucket_bytes`.

    >>> spec = TensorSpec(name="w", dtype="float32", shape=(1500,))
    >>> [bucket.pieces[0][:4] for bucket in cut(Manifest(version=1, tensors=(spec,), bucket_bytes=4096))]
    [(0, 0, 1024, 0), (0, 1024, 476, 0)]
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
        start, dtype = 0, getattr(torch, spec.dtype)
        while start < spec.numel:
            offset = -(-used // ALIGNMENT) * ALIGNMENT
            room = (limit - offset) // spec.itemsize
            # A tensor that fits into a fresh bucket is kept whole; only larger ones are split.
            if room < spec.numel - start and pieces and (room < 1 or spec.nbytes <= limit):
                close()
                continue
            count = min(room, spec.numel - start)
            pieces.append(Piece(number, start, count, offset, dtype))
            used = offset + count * spec.itemsize
            start += count
    close()
    return tuple(buckets)
