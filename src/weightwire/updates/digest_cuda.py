"""The digest on a GPU, in Triton: the same numbers as `digest`, at the speed of the memory.

A launch goes through a table of lines, each a run of rows of one tensor, and adds what it finds to its sums. The
sums stay on the device until `digest.settle` reads many of them at once.

What words are multiplied by follows from where they are in their tensor, and takes most of the work. So lines that are
alike, as those of one matrix in every layer, are scanned two at a time with the same factors; of more together the
memory is the limit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from weightwire.updates.boxes import Box, rows_of, strides_of
from weightwire.updates.digest import PendingScans, word_facts
from weightwire.updates.factors_cuda import factors, key_of, of_threads
from weightwire.updates.tiles import COLUMNS, ROWS, Tiles, by_alignment, full_rows, sent_all, tiled

__all__ = ["Line", "Table", "byte_lines", "line_of", "lines_of", "scan_again", "scan_lines", "sum_lines", "table"]

_WORDS = {4: tl.uint32, 2: tl.uint16, 1: tl.uint8}
_WARPS = 4


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

    parts: list[_Part]
    lines: int
    device: torch.device


class _Part(NamedTuple):
    """Those that are scanned `together` at a time, in units of so many bytes."""

    unit: int
    vectors: bool
    together: int
    table: torch.Tensor
    tiles: Tiles


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


def _run_lines(runs: Sequence[tuple[int, int, int, torch.dtype]]) -> npt.NDArray[np.int64]:
    """`line_of` each of many, as the table that they make.

    >>> runs = [(4096, 3, 5, torch.bfloat16), (8192, 0, 2, torch.float32)]
    >>> _run_lines(runs).tolist() == [[*line_of(*run)] for run in runs]
    True
    """
    address, start, count = np.array([run[:3] for run in runs], np.int64).reshape(-1, 3).T
    dtypes = [run[3] for run in runs]
    known = {dtype: (dtype.itemsize, *word_facts(dtype)) for dtype in set(dtypes)}
    itemsize, *facts = np.array([known[dtype] for dtype in dtypes], np.int64).reshape(-1, 4).T
    return _of_runs(address, start * itemsize, count * itemsize, facts)


def byte_lines(addresses: npt.NDArray[np.int64], nbytes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """`line_of` each of many runs of bytes, from their first one on, as the table that they make.

    >>> byte_lines(np.array([4096]), np.array([5])).tolist() == [[*line_of(4096, 0, 5, torch.uint8)]]
    True
    """
    zero = np.zeros_like(nbytes)
    return _of_runs(addresses, zero, nbytes, [zero + fact for fact in word_facts(torch.uint8)])


def _of_runs(address: Any, start: Any, width: Any, facts: Sequence[Any]) -> npt.NDArray[np.int64]:
    return np.stack([address, np.ones_like(width), width, width, start, width, *facts], axis=1)


def table(lines: Sequence[Line] | npt.NDArray[np.int64], device: torch.device) -> Table:
    """Make lines ready. They may be launched again and again for as long as what they point to stays there."""
    fields = np.array(lines, np.int64).reshape(-1, len(Line._fields))
    numbers = np.arange(len(fields))
    present = (fields[:, 1] > 0) & (fields[:, 2] > 0)
    fields, numbers = _within_keys(fields[present], numbers[present])
    # Words of the full tensor where memory has them whole and aligned, else halves or bytes of them.
    bits = fields[:, 0] | fields[:, 2] | fields[:, 3] | fields[:, 4] | fields[:, 5]
    launches: list[tuple[int, bool, int]] = []
    tables: list[Any] = []
    for least, mine in by_alignment(bits, _KINDS):
        for together, made, places in _parts(fields[mine], numbers[mine], _KINDS[least][0]):
            launches.append((*_KINDS[least], together))
            tables += [made, places]
    here = sent_all(tables, device) if tables else []
    made, places = here[::2], [Tiles(each, len(each)) for each in here[1::2]]
    parts = [_Part(*each) for each in zip(*zip(*launches, strict=True), made, places, strict=True)]
    return Table(parts, len(lines), device)


_KINDS = {16: (4, True), 4: (4, False), 2: (2, False), 1: (1, False)}
"""By what all of a line's places are multiples of: the bytes of a unit, and whether they can be read 16 at a time."""
_KEY_BYTES = 4 << 32


def _within_keys(fields: Any, numbers: Any) -> tuple[Any, Any]:
    # The high half of a word's index is a key, which a kernel works out once for a line.
    crossing = (
        fields[:, 4] // _KEY_BYTES
        != (fields[:, 4] + (fields[:, 1] - 1) * fields[:, 5] + fields[:, 2] - 1) // _KEY_BYTES
    )
    if not crossing.any():
        return fields, numbers
    made, of = [*fields[~crossing]], [*numbers[~crossing]]
    for line, number in zip(fields[crossing].tolist(), numbers[crossing], strict=True):
        for part in _cut(Line(*line)):
            made.append(np.array(part, np.int64))
            of.append(number)
    return np.array(made), np.array(of)


def _cut(line: Line) -> Iterator[Line]:
    for row in range(line.rows):
        address, start, left = line.address + row * line.pitch, line.start + row * line.step, line.width
        while left:
            width = min(left, _KEY_BYTES - start % _KEY_BYTES)
            yield line._replace(address=address, rows=1, width=width, pitch=width, start=start, step=width)
            address, start, left = address + width, start + width, left - width


def _parts(fields: Any, numbers: Any, unit: int) -> Iterator[tuple[int, Any, Any]]:
    """Those that are scanned so many together, their table, and its tiles."""
    address, rows, width, pitch, start, step, exponent, lowest, stride = fields.T
    rows, width, (pitch, step), limit = full_rows(rows, width, (pitch, step), unit)
    alike = np.stack([rows, width, limit, start, step, exponent, lowest, stride], axis=1)
    each = np.stack([address, pitch, numbers], axis=1)
    for members in _groups(alike, _FEW):
        first = members[:, 0]
        made = np.concatenate([alike[first, 1:], each[members].reshape(len(members), -1)], axis=1)
        yield members.shape[1], made, tiled(rows[first], width[first])


def _groups(alike: Any, few: int) -> Iterator[Any]:
    """Which lines are scanned together, of a table of all that has to be alike: pairs, if that many lines and
    more are in pairs, and those left over.

    >>> [groups.tolist() for groups in _groups(np.array([[1], [2], [1], [1], [3], [3]]), 2)]
    [[[0, 2], [4, 5]], [[3], [1]]]
    """
    order = np.lexsort(alike.T[::-1])
    begins = np.flatnonzero(np.append(True, (alike[order[1:]] != alike[order[:-1]]).any(axis=1)))
    counts = np.diff(np.append(begins, len(order)))
    number = np.arange(len(order)) - np.repeat(begins, counts)
    paired = number < np.repeat(counts // 2 * 2, counts)
    if paired.sum() < few:
        paired[:] = False
    for together, mine in ((2, paired), (1, ~paired)):
        if mine.any():
            yield order[mine].reshape(-1, together)


_FEW = 8
"""For fewer lines a launch of their own costs more than it saves."""


def scan_lines(ready: Table) -> PendingScans:
    """A scan of each line of a table, on its device's current stream."""
    return PendingScans(sum_lines(ready))


def sum_lines(ready: Table) -> torch.Tensor:
    """`scan_lines`, as a table of int64: low, high and nonfinite of each line."""
    sums = torch.zeros(ready.lines, 3, dtype=torch.int64, device=ready.device)
    with torch.cuda.device(ready.device if ready.device.type == "cuda" else -1):
        _launch(ready, sums)
    return sums


def _launch(ready: Table, sums: torch.Tensor) -> None:
    for unit, vectors, together, made, places in ready.parts:
        _scan[(places.count,)](
            made, places.places, sums, UNIT=unit, WORD=_WORDS[unit], VECTORS=vectors, TOGETHER=together,
            FIELDS=made.shape[1], ROWS=ROWS, COLUMNS=COLUMNS, THREADS=32 * _WARPS, num_warps=_WARPS,
        )  # fmt: skip


def scan_again(runs: Sequence[tuple[int, int, int, torch.dtype]], device: torch.device) -> PendingScans:
    """Scan runs of elements (`line_of`'s arguments) that were mostly scanned before: what an update scans is where it
    was at the last one, and tables of the last few hundred launches are kept."""
    # A table is sent on the stream that scans by it; another would not wait for that.
    key = (*runs, device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None)
    ready = _tables.pop(key, None) or table(_run_lines(runs), device)
    _tables[key] = ready
    while len(_tables) > _KEPT_TABLES:
        del _tables[next(iter(_tables))]
    return scan_lines(ready)


_tables: dict[object, Table] = {}
_KEPT_TABLES = 512


@triton.jit  # type: ignore[untyped-decorator]
def _words(member, row, column, left, shift, UNIT: tl.constexpr, WORD: tl.constexpr, FULL: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row of a line, as far as it has columns left: its words, shifted to where they are in a word of the full
    tensor if they are parts of one."""
    data = (tl.load(member) + row * tl.load(member + 1)).to(tl.pointer_type(WORD), bitcast=True)
    if FULL:
        # Without a mask it is read 16 bytes at a time.
        return tl.load(tl.multiple_of(data, 16) + column)
    word = tl.load(data + column, mask=column < left, other=0).to(tl.uint32)
    return word if UNIT == 4 else word << shift


@triton.jit  # type: ignore[untyped-decorator]
def _places(at, column, UNIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the units of a row that begins with byte `at` of the full tensor: the low halves of the indices of their
    words, and by how many bits they are shifted there."""
    if UNIT == 4:
        return (at >> 2).to(tl.uint32) + column.to(tl.uint32), (column * 0).to(tl.uint32)
    byte = (at & 3).to(tl.int32) + column * UNIT
    return (at >> 2).to(tl.uint32) + (byte >> 2).to(tl.uint32), ((byte & 3) * 8).to(tl.uint32)


@triton.jit
def _full(word, exponent, lowest):  # type: ignore[no-untyped-def]
    """In the sign's bit of each element: whether its exponent is all ones."""
    return ((word & exponent) + lowest) & (exponent + lowest)


@triton.jit  # type: ignore[untyped-decorator]
def _sums(  # type: ignore[no-untyped-def]
    line, first, column, UNIT: tl.constexpr, WORD: tl.constexpr, FULL: tl.constexpr, TOGETHER: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Of some rows of the lines of a group: both sums of the first, then of the second, and whether there may be NaN or
    Inf in one of them."""
    width, limit, start, step = tl.load(line), tl.load(line + 1), tl.load(line + 2), tl.load(line + 3)
    exponent, lowest = tl.load(line + 4).to(tl.uint32), tl.load(line + 5).to(tl.uint32)
    key = key_of(start >> 2)
    REPEATS: tl.constexpr = COLUMNS // THREADS // 4
    low = tl.zeros((THREADS,), tl.uint64)
    high = tl.zeros((THREADS,), tl.uint64)
    other_low = tl.zeros((THREADS,), tl.uint64)
    other_high = tl.zeros((THREADS,), tl.uint64)
    suspect = tl.zeros((COLUMNS,), tl.uint32)
    for i in range(ROWS):
        row = first + i
        left = tl.minimum(width, limit - row * width)
        place, shift = _places(start + row * step, column, UNIT)
        one, other = factors(place, key)
        word = _words(line + 7, row, column, left, shift, UNIT, WORD, FULL)
        low += of_threads(word.to(tl.uint64) * one, REPEATS, THREADS)
        high += of_threads(word.to(tl.uint64) * other, REPEATS, THREADS)
        suspect |= _full(word, exponent, lowest)
        if TOGETHER == 2:
            word = _words(line + 10, row, column, left, shift, UNIT, WORD, FULL)
            other_low += of_threads(word.to(tl.uint64) * one, REPEATS, THREADS)
            other_high += of_threads(word.to(tl.uint64) * other, REPEATS, THREADS)
            suspect |= _full(word, exponent, lowest)
    return tl.sum(low), tl.sum(high), tl.sum(other_low), tl.sum(other_high), tl.max(suspect) > 0


@triton.jit  # type: ignore[untyped-decorator]
def _nonfinite(line, member, first, column, UNIT: tl.constexpr, WORD: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many NaN and Inf there are in some rows of a line. An element of two words has its exponent in the second."""
    width, limit, start, step = tl.load(line), tl.load(line + 1), tl.load(line + 2), tl.load(line + 3)
    exponent, lowest = tl.load(line + 4).to(tl.uint32), tl.load(line + 5).to(tl.uint32)
    found = column * 0
    for i in range(ROWS):
        row = first + i
        place, shift = _places(start + row * step, column, UNIT)
        word = _words(member, row, column, tl.minimum(width, limit - row * width), shift, UNIT, WORD, False)
        full = _full(word, exponent, lowest)
        full = tl.where((tl.load(line + 6) == 1) | ((place & 1) == 1), full, 0)
        found += ((full >> 31) + (full >> 23 & 1) + (full >> 15 & 1) + (full >> 7 & 1)).to(tl.int32)
    return tl.sum(found.to(tl.int64))


@triton.jit
def _add(sums, low, high):  # type: ignore[no-untyped-def]
    tl.atomic_add(sums, low.to(tl.int64, bitcast=True), sem="relaxed")
    tl.atomic_add(sums + 1, high.to(tl.int64, bitcast=True), sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator]
def _scan(  # type: ignore[no-untyped-def]
    table,
    places,
    sums,
    UNIT: tl.constexpr,
    WORD: tl.constexpr,
    VECTORS: tl.constexpr,
    TOGETHER: tl.constexpr,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """One tile of one or two lines that are alike. A group of them: the width of a row, and units in all; where their
    bytes begin in the full tensor, and how far apart rows are there; what `digest.word_facts` says. And of each line
    its address, how far apart its rows are in memory, and its number."""
    tile = tl.program_id(0).to(tl.int64) * 3
    line = table + tl.load(places + tile).to(tl.int64) * FIELDS
    first = tl.load(places + tile + 1).to(tl.int64)
    begin = tl.multiple_of(tl.load(places + tile + 2), COLUMNS)
    column = begin + tl.arange(0, COLUMNS)
    width = tl.load(line)
    inside = begin + COLUMNS <= tl.minimum(width, tl.load(line + 1) - (first + ROWS - 1) * width)
    if inside & VECTORS:
        low, high, other_low, other_high, suspect = _sums(
            line, first, column, UNIT, WORD, VECTORS, TOGETHER, ROWS, COLUMNS, THREADS
        )
    else:
        low, high, other_low, other_high, suspect = _sums(
            line, first, column, UNIT, WORD, False, TOGETHER, ROWS, COLUMNS, THREADS
        )
    _add(sums + tl.load(line + 9) * 3, low, high)
    if TOGETHER == 2:
        _add(sums + tl.load(line + 12) * 3, other_low, other_high)
    if suspect:
        # Seldom: a second look says how many there are.
        found = _nonfinite(line, line + 7, first, column, UNIT, WORD, ROWS)
        tl.atomic_add(sums + tl.load(line + 9) * 3 + 2, found, sem="relaxed")
        if TOGETHER == 2:
            found = _nonfinite(line, line + 10, first, column, UNIT, WORD, ROWS)
            tl.atomic_add(sums + tl.load(line + 12) * 3 + 2, found, sem="relaxed")
