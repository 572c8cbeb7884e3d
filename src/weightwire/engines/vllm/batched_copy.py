"""Many copies within the memory of a GPU as one launch, in Triton, at the speed of the memory.

Sources may lie in another process, or on another GPU of the same host that this one can reach.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from weightwire.updates.boxes import Rows
from weightwire.updates.tiles import COLUMNS, ROWS, Tiles, by_alignment, full_rows, sent_all, tiled

__all__ = ["BatchedCopy", "Move"]

_UNITS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


class Move(NamedTuple):
    """`rows` rows of `width` bytes, `source_pitch` bytes apart from address `source` on, go to `target`."""

    source: int
    target: int
    rows: int
    width: int
    source_pitch: int
    target_pitch: int

    @classmethod
    def of(cls, rows: Rows, source: int, target: int, itemsize: int) -> Move:
        """What `updates.boxes.rows_of` found, with `source` and `target` the addresses it counts from."""
        return cls(
            source + rows.first * itemsize,
            target + rows.second * itemsize,
            rows.count,
            rows.width * itemsize,
            rows.first_pitch * itemsize,
            rows.second_pitch * itemsize,
        )


class BatchedCopy:
    """Copies made ready to be run on `device`, any number of times, while nothing that they point to moves. They must
    not overlap."""

    def __init__(self, moves: Iterable[Move], device: torch.device) -> None:
        fields = np.array([*moves], np.int64).reshape(-1, len(Move._fields))
        fields = fields[(fields[:, 2] > 0) & (fields[:, 3] > 0)]
        self.nbytes = int((fields[:, 2] * fields[:, 3]).sum())
        bits = np.bitwise_or.reduce(fields[:, [0, 1, 3, 4, 5]], axis=1)
        self._parts = [_part(fields[mine], unit, device) for unit, mine in by_alignment(bits, _UNITS)]

    def run(self) -> None:
        """Queue them on the current stream."""
        for unit, made, places in self._parts:
            _copy[(places.count,)](
                made, places.places, WORD=_UNITS[unit], FIELDS=made.shape[1], ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8
            )


def _part(fields: Any, unit: int, device: torch.device) -> tuple[int, torch.Tensor, Tiles]:
    source, target, rows, width, source_pitch, target_pitch = fields.T
    rows, width, (source_pitch, target_pitch), limit = full_rows(rows, width, (source_pitch, target_pitch), unit)
    made = np.stack([source, target, width, source_pitch, target_pitch, limit], axis=1)
    table, places = sent_all([made, tiled(rows, width)], device)
    return unit, table, Tiles(places, len(places))


@triton.jit  # type: ignore[untyped-decorator]
def _copy(  # type: ignore[no-untyped-def]
    table, places, WORD: tl.constexpr, FIELDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    tile = tl.program_id(0).to(tl.int64) * 3
    line = table + tl.load(places + tile).to(tl.int64) * FIELDS
    first_row = tl.load(places + tile + 1).to(tl.int64)
    first_column = tl.load(places + tile + 2).to(tl.int64)
    source = tl.load(line)
    target = tl.load(line + 1)
    width = tl.load(line + 2)
    source_pitch = tl.load(line + 3)
    target_pitch = tl.load(line + 4)
    limit = tl.load(line + 5)
    column = first_column + tl.arange(0, COLUMNS)
    for i in range(ROWS):
        row = first_row + i
        inside = (column < width) & (row * width + column < limit)
        read = (source + row * source_pitch).to(tl.pointer_type(WORD), bitcast=True)
        write = (target + row * target_pitch).to(tl.pointer_type(WORD), bitcast=True)
        tl.store(write + column, tl.load(read + column, mask=inside), mask=inside)
