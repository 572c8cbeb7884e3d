"""Boxes: rectangular parts of a tensor, and the row-major intervals that cut them.

Shards, tensor-parallel slices and split buckets are all the same question: which part of this rectangle lies in that
run of elements? A box is `(start, shape)`, one entry a dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["NOTHING", "Box", "Part", "Rows", "intersect", "rectangles", "rows_of", "strides_of"]


class Box(NamedTuple):
    """A rectangle in a tensor: where it starts and how far it goes, in elements per dimension."""

    start: tuple[int, ...]
    shape: tuple[int, ...]


class Part(NamedTuple):
    """What lies in `box` of a tensor of `shape`, its elements as one row, in row-major order.

    >>> half = Part((2, 4), Box((0, 2), (2, 2)))
    >>> half.numel, half.start, half.is_run, half.places(np.arange(4)).tolist()
    (4, 2, False, [2, 3, 6, 7])
    >>> Part.whole((2, 4)).is_run, NOTHING.numel
    (True, 0)
    """

    shape: tuple[int, ...]
    box: Box

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Part:
        return cls(shape, Box((0,) * len(shape), shape))

    @property
    def numel(self) -> int:
        return math.prod(self.box.shape)

    @property
    def start(self) -> int:
        """The row-major index in the tensor of the first element."""
        return sum(a * b for a, b in zip(self.box.start, strides_of(self.shape), strict=True))

    @property
    def is_run(self) -> bool:
        """Whether its elements follow each other in the tensor too."""
        inner = len(self.shape)
        while inner and self.box.shape[inner - 1] == self.shape[inner - 1]:
            inner -= 1
        return all(size == 1 for size in self.box.shape[: max(inner - 1, 0)]) or not self.numel

    def places(self, own: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The row-major indices in the tensor of elements, given by their numbers in the row; both ascend."""
        if self.is_run:
            return own + self.start
        there = np.full_like(own, self.start)
        for size, step, there_step in zip(
            self.box.shape, strides_of(self.box.shape), strides_of(self.shape), strict=True
        ):
            there += own // step % size * there_step
        return there

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Of runs of its elements that are runs in the tensor too: number in the row, index in the tensor, length.

        >>> list(Part((2, 4), Box((0, 2), (2, 2))).runs()), list(Part.whole((2, 4)).runs())
        ([(0, 2, 2), (2, 6, 2)], [(0, 0, 8)])
        """
        for rows in rows_of(self.box.shape, strides_of(self.box.shape), strides_of(self.shape)):
            for i in range(rows.count):
                yield rows.first + i * rows.first_pitch, self.start + rows.second + i * rows.second_pitch, rows.width


NOTHING = Part((0,), Box((0,), (0,)))


class Rows(NamedTuple):
    """`count` rows of `width` consecutive elements, seen from two sides: where the first begins there and how far apart
    they are, in elements."""

    first: int
    second: int
    count: int  # type: ignore[assignment]  # hides tuple.count
    width: int
    first_pitch: int
    second_pitch: int


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides, in elements.

    >>> strides_of((4, 3, 2))
    (6, 2, 1)
    """
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def intersect(a: Box, b: Box) -> Box | None:
    """What two boxes share, or None.

    >>> intersect(Box((0, 0), (4, 4)), Box((2, 3), (4, 4)))
    Box(start=(2, 3), shape=(2, 1))
    """
    start = tuple(max(x, y) for x, y in zip(a.start, b.start, strict=True))
    shape = tuple(
        min(p + n, q + m) - s for p, n, q, m, s in zip(a.start, a.shape, b.start, b.shape, start, strict=True)
    )
    return Box(start, shape) if all(size > 0 for size in shape) else None


def rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The row-major elements `start..stop` of a tensor as boxes, in order; at most `2 * ndim - 1` of them.

    >>> list(rectangles((3, 4), 2, 9))
    [Box(start=(0, 2), shape=(1, 2)), Box(start=(1, 0), shape=(1, 4)), Box(start=(2, 0), shape=(1, 1))]
    """
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    row = 1
    for size in shape[1:]:
        row *= size
    first, last = start // row, (stop - 1) // row
    head, tail = start - first * row, stop - last * row
    if first == last:
        yield from _in_row(shape, first, head, tail)
        return
    if head:
        yield from _in_row(shape, first, head, row)
        first += 1
    whole = last + (tail == row) - first
    if whole:
        yield Box((first, *(0 for _ in shape[1:])), (whole, *shape[1:]))
    if tail != row:
        yield from _in_row(shape, last, 0, tail)


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[Box]:
    for inner in rectangles(shape[1:], start, stop):
        yield Box((row, *inner.start), (1, *inner.shape))


def rows_of(shape: Sequence[int], first: Sequence[int], second: Sequence[int]) -> Iterator[Rows]:
    """One rectangle in two places, each with strides of its own, as the fewest rows: what a copy kernel wants to know.

    >>> list(rows_of((4, 3, 2), (6, 2, 1), (12, 2, 1)))
    [Rows(first=0, second=0, count=4, width=6, first_pitch=6, second_pitch=12)]
    >>> list(rows_of((4, 6), (6, 1), (6, 1)))
    [Rows(first=0, second=0, count=1, width=24, first_pitch=24, second_pitch=24)]
    """
    if 0 in shape:
        return
    # Dimensions that continue each other on both sides are one.
    dims: list[tuple[int, int, int]] = []
    for size, a, b in zip(shape, first, second, strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1:] == (size * a, size * b):
            size *= dims.pop()[0]
        dims.append((size, a, b))
    width = dims.pop()[0] if dims and dims[-1][1:] == (1, 1) else 1
    count, a, b = dims.pop() if dims else (1, width, width)
    yield from _steps(dims, Rows(0, 0, count, width, a, b))


def _steps(dims: Sequence[tuple[int, int, int]], rows: Rows) -> Iterator[Rows]:
    if not dims:
        yield rows
        return
    size, a, b = dims[0]
    for i in range(size):
        yield from _steps(dims[1:], rows._replace(first=rows.first + i * a, second=rows.second + i * b))
