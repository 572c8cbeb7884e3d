"""The digest on a GPU, in Triton: the same numbers as `digest`, at the speed of the memory.

A launch goes through a table of lines, each a run of rows of one tensor, and adds what it finds to its sums. The
sums stay on the device until `digest.settle` reads many of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from weightwire.updates.boxes import Box, rows_of, strides_of
from weightwire.updates.digest import Pending, word_facts
from weightwire.updates.tiles import COLUMNS, ROWS, Tiles, tiles

__all__ = ["Line", "Table", "line_of", "lines_of", "scan_lines", "table"]

_UNITS = {4: tl.uint32, 2: tl.uint16, 1: tl.uint8}


class Line(NamedTuple):
    """`rows` rows of `width` bytes, from `address` on and `pitch` bytes apart in memory, which are bytes `start ..` of
    their full tensor and `step` bytes apart there. `exponent`, `lowest` and `stride` are as `digest` tests words."""

    address: int
    rows: int
    width: int
    pitch: int
    start: int
    step: int
    exponent: int
    lowest: int
    stride: int


class Table(NamedTuple):
    """Lines made ready for launches: on the device, those that can be read in the same units together."""

    parts: list[tuple[int, torch.Tensor, Tiles]]
    lines: int
    device: torch.device


def line_of(address: int, start: int, count: int, dtype: torch.dtype) -> Line:
    """The line of elements `start .. start + count` (row-major) of a tensor, which lie together at `address`.

    >>> line_of(4096, 3, 5, torch.uint8)
    Line(address=4096, rows=1, width=5, pitch=5, start=3, step=5, exponent=0, lowest=0, stride=1)
    """
    width = count * dtype.itemsize
    return Line(address, 1, width, width, start * dtype.itemsize, width, *word_facts(dtype))


def lines_of(address: int, box: Box, strides: Sequence[int], full: Sequence[int], dtype: torch.dtype) -> list[Line]:
    """The lines of a box of a tensor of the full shape `full`, which lies at `address` with `strides` of its own, in
    elements.

    >>> lines_of(4096, Box((1, 0), (2, 4)), (8, 1), (3, 4), torch.uint8)
    [Line(address=4096, rows=2, width=4, pitch=8, start=4, step=4, exponent=0, lowest=0, stride=1)]
    """
    itemsize, facts, places = dtype.itemsize, word_facts(dtype), strides_of(full)
    start = sum(at * stride for at, stride in zip(box.start, places, strict=True))
    return [
        Line(
            address + rows.first * itemsize,
            rows.count,
            rows.width * itemsize,
            rows.first_pitch * itemsize,
            (start + rows.second) * itemsize,
            rows.second_pitch * itemsize,
            *facts,
        )
        for rows in rows_of(box.shape, strides, places)
    ]


def table(lines: Sequence[Line], device: torch.device) -> Table:
    """Make lines ready. They may be launched again and again for as long as what they point to stays there."""
    fields = np.array(lines, np.int64).reshape(-1, len(Line._fields))
    # Words of the full tensor where memory has them whole and aligned, else halves or bytes of them.
    places = fields[:, 0] | fields[:, 2] | fields[:, 3] | fields[:, 4] | fields[:, 5]
    parts = []
    for unit in _UNITS:
        mine = places % unit == 0
        if unit < max(_UNITS):
            mine &= places % (unit * 2) != 0
        chosen = np.flatnonzero(mine & (fields[:, 1] > 0) & (fields[:, 2] > 0))
        if len(chosen):
            parts.append(_part(fields[chosen], chosen, unit, device))
    return Table(parts, len(lines), device)


def _part(fields: Any, numbers: Any, unit: int, device: torch.device) -> tuple[int, torch.Tensor, Tiles]:
    address, rows, width, pitch, start, step, exponent, lowest, stride = fields.T
    width = width // unit
    limit = rows * width
    # What is one run in memory is cut into rows of our own, so that every tile is full.
    run = (rows == 1) | ((pitch == width * unit) & (step == width * unit))
    rows = np.where(run, -(-limit // COLUMNS), rows)
    width = np.where(run, COLUMNS, width)
    pitch = np.where(run, COLUMNS * unit, pitch)
    step = np.where(run, COLUMNS * unit, step)
    made = np.stack([address, width, pitch, limit, start, step, exponent, lowest, stride, numbers], axis=1)
    return unit, torch.from_numpy(made).to(device, non_blocking=True), tiles(rows, width, device)


def scan_lines(ready: Table) -> list[Pending]:
    """A scan of each line of a table, on the current stream."""
    sums = torch.zeros(ready.lines, 3, dtype=torch.int64, device=ready.device)
    for unit, made, places in ready.parts:
        _scan[(places.count,)](
            made, places.places, sums, UNIT=unit, WORD=_UNITS[unit], FIELDS=made.shape[1], ROWS=ROWS, COLUMNS=COLUMNS
        )
    return [Pending([row]) for row in sums.unbind()]


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit  # type: ignore[untyped-decorator]
def _scan(  # type: ignore[no-untyped-def]
    table,
    places,
    sums,
    UNIT: tl.constexpr,
    WORD: tl.constexpr,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64) * 3
    line = table + tl.load(places + tile).to(tl.int64) * FIELDS
    first_row = tl.load(places + tile + 1).to(tl.int64)
    first_column = tl.load(places + tile + 2).to(tl.int64)
    address = tl.load(line)
    width = tl.load(line + 1)
    pitch = tl.load(line + 2)
    limit = tl.load(line + 3)
    start = tl.load(line + 4)
    step = tl.load(line + 5)
    exponent = tl.load(line + 6).to(tl.uint32)
    lowest = tl.load(line + 7).to(tl.uint32)
    stride = tl.load(line + 8)
    number = tl.load(line + 9)
    column = first_column + tl.arange(0, COLUMNS)
    low = tl.zeros((COLUMNS,), tl.uint64)
    high = tl.zeros((COLUMNS,), tl.uint64)
    suspect = tl.zeros((COLUMNS,), tl.uint32)
    for i in range(ROWS):
        row = first_row + i
        inside = (column < width) & (row * width + column < limit)
        data = (address + row * pitch).to(tl.pointer_type(WORD), bitcast=True)
        word = tl.load(data + column, mask=inside, other=0).to(tl.uint32)
        at = start + row * step + column * UNIT
        if UNIT < 4:
            word = word << ((at & 3) * 8).to(tl.uint32)
        place = at >> 2
        key = _mix((place >> 32).to(tl.uint32) ^ tl.full((), 0x9E3779B9, tl.uint32))
        mixed = _mix(place.to(tl.uint32) ^ key)
        again = mixed * tl.full((), 0x31848BAB, tl.uint32)
        low += word.to(tl.uint64) * (mixed | 1).to(tl.uint64)
        high += word.to(tl.uint64) * ((again ^ (again >> 14)) | 1).to(tl.uint64)
        full = ((word & exponent) + lowest) & (exponent + lowest)
        # An element of two words has its exponent in the second.
        full = tl.where((stride == 1) | ((place & 1) == 1), full, 0)
        suspect += (full >> 31) + (full >> 23 & 1) + (full >> 15 & 1) + (full >> 7 & 1)
    sums += number * 3
    tl.atomic_add(sums, tl.sum(low).to(tl.int64, bitcast=True), sem="relaxed")
    tl.atomic_add(sums + 1, tl.sum(high).to(tl.int64, bitcast=True), sem="relaxed")
    found = tl.sum(suspect.to(tl.int64))
    if found > 0:
        tl.atomic_add(sums + 2, found, sem="relaxed")
