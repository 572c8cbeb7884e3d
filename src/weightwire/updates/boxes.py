"""Boxes: rectangular parts of a tensor, and the row-major intervals that cut them.

Shards, tensor-parallel slices and split buckets are all the same question: which part of this rectangle lies in that
run of elements? A box is `(start, shape)`, one entry a dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

__all__ = ["Box", "intersect", "rectangles", "strides_of"]


class Box(NamedTuple):
    """A rectangle in a tensor: where it starts and how far it goes, in elements per dimension."""

    start: tuple[int, ...]
    shape: tuple[int, ...]


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
