"""A bucket's pieces copied and scanned on the CPU, all by one call and in one pass.

For hundreds of small tensors an operation on each takes longer than their bytes. So what is known of the pieces is kept
as a table, to which each call only adds where the memory lies.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch

from weightwire.updates.buckets import Piece
from weightwire.updates.digest import Scan, as_scans, bytes_at, scan_table, sum_line, word_facts

__all__ = ["narrow", "pack", "spread"]

Tensors = Mapping[int, torch.Tensor] | Sequence[torch.Tensor]
"""By their number: contiguous, on the CPU, and held by whoever calls."""
Array = npt.NDArray[np.int64]


def pack(pieces: Sequence[Piece], tensors: Tensors, to: torch.Tensor) -> list[Scan]:
    """Each piece of its tensor into the memory of their bucket (uint8, 1-D), and a scan of it.

    >>> to = torch.zeros(12, dtype=torch.uint8)
    >>> scans = pack([Piece(0, 2, 2, 4, torch.float32)], [torch.arange(6.0)], to)
    >>> to.view(torch.float32)
    tensor([0., 2., 3.])
    """
    facts, own, packed = _places(pieces, tensors, to)
    return scan_table(_lines(facts, own, packed))


def spread(pieces: Sequence[Piece], data: torch.Tensor, tensors: Tensors) -> list[Scan]:
    """The other way: each piece out of the memory of their bucket to its place in its tensor.

    >>> target = torch.zeros(3)
    >>> scans = spread([Piece(0, 1, 2, 0, torch.float32)], torch.ones(2).view(torch.uint8), [target])
    >>> target
    tensor([0., 1., 1.])
    """
    facts, own, packed = _places(pieces, tensors, data)
    return scan_table(_lines(facts, packed, own))


def narrow(pieces: Sequence[Piece], tensors: Tensors, to: torch.Tensor) -> list[Scan]:
    """`pack` of pieces that are announced as bfloat16, from tensors of float32, rounded as torch does: to the nearest,
    of two the even one; a NaN becomes 0x7FC0, whatever torch makes of it. The scans are of what was packed.

    >>> to = torch.zeros(4, dtype=torch.uint8)
    >>> scans = narrow([Piece(0, 0, 2, 0, torch.bfloat16)], [torch.tensor([1.0, 1.001])], to)
    >>> to.view(torch.bfloat16)
    tensor([1., 1.], dtype=torch.bfloat16)
    """
    facts, own, packed = _places(pieces, tensors, to, wider=2)
    return as_scans(_narrow_runs(_lines(facts, own, packed)))


@functools.lru_cache(maxsize=256)
def _facts(pieces: tuple[Piece, ...]) -> Array:
    """Of each: where it begins in its tensor, its length, and where it begins in its bucket, in bytes, and what a scan
    has to know of its dtype."""
    sizes = ((piece, piece.dtype.itemsize) for piece in pieces)
    facts = [(p.start * size, p.count * size, p.offset, *word_facts(p.dtype)) for p, size in sizes]
    made = np.array(facts, np.int64).reshape(-1, 6)
    made.setflags(write=False)
    return made


def _places(
    pieces: Sequence[Piece], tensors: Tensors, data: torch.Tensor, wider: int = 1
) -> tuple[Array, Array, Array]:
    """What is known of each piece, its address in its tensor, and that in its bucket. Raises unless all of it lies
    within these. An element of a tensor takes so many times the bytes of a piece's."""
    facts, own = _facts(tuple(pieces)), [tensors[piece.tensor] for piece in pieces]
    start, size, offset = facts[:, :3].T
    nbytes = np.array([tensor.nbytes for tensor in own], np.int64) // wider
    inside = (facts[:, :3] >= 0).all(axis=1) & (start + size <= nbytes) & (offset + size <= data.numel())
    if not inside.all():
        raise ValueError(f"{np.count_nonzero(~inside)} of {len(own)} pieces go beyond their tensors or their bucket")
    addresses = np.array([tensor.data_ptr() for tensor in own], np.int64)
    return facts, addresses + wider * start, data.data_ptr() + offset


def _lines(facts: Array, sources: Array, targets: Array) -> Array:
    """As `scan_table` takes them."""
    return np.column_stack([sources, facts[:, 1], facts[:, 0], targets, facts[:, 3:]])


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _round(words: Any, to: Any) -> Any:
    for i in range(words.size):
        word = np.uint32(words[i])
        # Half of the last place that stays, less a trifle unless that is odd, carries into it.
        rounded = np.uint32(word + np.uint32(0x7FFF) + np.uint32((word >> 16) & 1)) >> 16
        to[i] = np.uint16(0x7FC0 if np.uint32(word & 0x7FFFFFFF) > np.uint32(0x7F800000) else rounded)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _narrow_runs(lines: Any) -> Any:
    sums = np.empty((lines.shape[0], 3), np.uint64)
    for i in range(lines.shape[0]):
        width, to = lines[i, 1], lines[i, 3]
        words = numba.carray(bytes_at(lines[i, 0]), 2 * width).view(np.uint32)
        narrowed = numba.carray(bytes_at(to), width)
        _round(words, narrowed.view(np.uint16))
        low, high, nonfinite = sum_line(lines[i], narrowed, narrowed[:0], to)
        sums[i, 0], sums[i, 1], sums[i, 2] = low, high, np.uint64(nonfinite)
    return sums
