"""A bucket's pieces copied and scanned on the CPU, all by one call and in one pass.

For hundreds of small tensors an operation on each takes longer than their bytes. So what is known of the pieces is kept
as a table, to which each call only adds where the memory lies.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch

from weightwire.updates.buckets import Piece
from weightwire.updates.digest import Scan, bytes_at, scan_table, sum_rows, word_facts

__all__ = ["Lying", "narrow", "pack", "spread"]


class Lying:
    """Where contiguous tensors on the CPU lie.

    >>> Lying([torch.zeros(3), torch.zeros(2, 2)]).nbytes.tolist()
    [12, 16]
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._held = tensors
        self.addresses = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
        self.nbytes = np.array([tensor.nbytes for tensor in tensors], np.int64)


def pack(pieces: Sequence[Piece], tensors: Lying, to: torch.Tensor) -> list[Scan]:
    """Each piece of its tensor into the memory of their bucket (uint8, 1-D), and a scan of it.

    >>> to = torch.zeros(12, dtype=torch.uint8)
    >>> source = torch.arange(6.0)
    >>> scans = pack([Piece(0, 2, 2, 4, torch.float32)], Lying([source]), to)
    >>> to.view(torch.float32)
    tensor([0., 2., 3.])
    """
    table = _table(tuple(pieces))
    rows = _within(table, tensors.nbytes, to)
    return scan_table(_lines(table, tensors.addresses[rows] + table[:, 1], to.data_ptr() + table[:, 3]))


def spread(pieces: Sequence[Piece], data: torch.Tensor, tensors: Lying) -> list[Scan]:
    """The other way: each piece out of the memory of their bucket to its place in its tensor.

    >>> target = torch.zeros(3)
    >>> scans = spread([Piece(0, 1, 2, 0, torch.float32)], torch.ones(2).view(torch.uint8), Lying([target]))
    >>> target
    tensor([0., 1., 1.])
    """
    table = _table(tuple(pieces))
    rows = _within(table, tensors.nbytes, data)
    return scan_table(_lines(table, data.data_ptr() + table[:, 3], tensors.addresses[rows] + table[:, 1]))


def narrow(pieces: Sequence[Piece], tensors: Lying, to: torch.Tensor) -> list[Scan]:
    """`pack` of pieces that are announced as bfloat16, from tensors of float32, rounded as torch does: to the nearest,
    of two the even one. The scans are of what was packed.

    >>> to = torch.zeros(4, dtype=torch.uint8)
    >>> scans = narrow([Piece(0, 0, 2, 0, torch.bfloat16)], Lying([torch.tensor([1.0, 1.001])]), to)
    >>> to.view(torch.bfloat16)
    tensor([1., 1.], dtype=torch.bfloat16)
    """
    table = _table(tuple(pieces))
    rows = _within(table, tensors.nbytes // 2, to)
    lines = _lines(table, tensors.addresses[rows] + 2 * table[:, 1], to.data_ptr() + table[:, 3])
    return scan_table(lines, _narrow_runs)


@functools.lru_cache(maxsize=256)
def _table(pieces: tuple[Piece, ...]) -> npt.NDArray[np.int64]:
    """Of each: its tensor, where it begins there, its length and where it begins in its bucket, in bytes, and what a
    scan has to know of its dtype."""
    facts = [
        (p.tensor, p.start * (size := p.dtype.itemsize), p.count * size, p.offset, *word_facts(p.dtype)) for p in pieces
    ]
    return np.array(facts, np.int64).reshape(-1, 7)


def _within(table: npt.NDArray[np.int64], nbytes: npt.NDArray[np.int64], data: torch.Tensor) -> npt.NDArray[np.int64]:
    """The tensors' numbers. Raises unless all of it lies within these and within the bucket."""
    rows, starts, counts, offsets = table[:, 0], table[:, 1], table[:, 2], table[:, 3]
    inside = (starts + counts <= nbytes[rows]) & (offsets + counts <= data.numel())
    if not inside.all():
        raise ValueError(f"{np.count_nonzero(~inside)} of {len(rows)} pieces go beyond their tensors or their bucket")
    return rows


def _lines(
    table: npt.NDArray[np.int64], sources: npt.NDArray[np.int64], targets: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    lines = table.copy()
    lines[:, 0], lines[:, 1], lines[:, 2], lines[:, 3] = sources, table[:, 2], table[:, 1], targets
    return lines


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
        low, high, nonfinite = sum_rows(
            narrowed, narrowed[:0], to, 1, width, width, lines[i, 2], 0,
            np.uint32(lines[i, 4]), np.uint32(lines[i, 5]), lines[i, 6],
        )  # fmt: skip
        sums[i, 0], sums[i, 1], sums[i, 2] = low, high, np.uint64(nonfinite)
    return sums
