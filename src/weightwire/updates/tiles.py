"""Tiles: how a GPU kernel shares out a list of rows of very different sizes among equal programs.

A table has one line for each run of rows; a tile is some of a line's rows, and of these some columns. Which line a tile
belongs to is written down beforehand, so that a kernel need not search.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = ["COLUMNS", "ROWS", "Tiles", "by_alignment", "full_rows", "sent", "tiles"]

COLUMNS = 1024
ROWS = 16


class Tiles(NamedTuple):
    """For each tile its line in the table and its first row and column there: int32 `(n, 3)`, on the device."""

    places: torch.Tensor
    count: int  # type: ignore[assignment]  # hides tuple.count


def sent(numbers: Any, device: torch.device) -> torch.Tensor:
    """A copy of a table on the device, queued on its current stream: from pageable memory everything queued there would
    be waited for.

    >>> sent(np.arange(3), torch.device("cpu"))
    tensor([0, 1, 2])
    """
    table = torch.from_numpy(np.ascontiguousarray(numbers))
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.clone()


def by_alignment(bits: Any, multiples: Iterable[int]) -> Iterator[tuple[int, Any]]:
    """For each of `multiples`, largest first, the lines of which all that is in `bits` is one of, and of none before.

    >>> [(multiple, lines.tolist()) for multiple, lines in by_alignment(np.array([12, 3, 8]), (8, 4, 2, 1))]
    [(8, [2]), (4, [0]), (1, [1])]
    """
    left = np.arange(len(bits))
    for multiple in multiples:
        mine = bits[left] % multiple == 0
        if mine.any():
            yield multiple, left[mine]
        left = left[~mine]


def full_rows(rows: Any, width: Any, pitches: Sequence[Any], unit: int) -> tuple[Any, Any, list[Any], Any]:
    """Rows, their width in units, pitches in bytes, and units in all, of lines of `width` bytes: what is one run by all
    its pitches is cut into rows of our own, so that every tile is full.

    >>> full_rows(np.array([2]), np.array([4096]), [np.array([4096])], 2)
    (array([4]), array([1024]), [array([2048])], array([4096]))
    """
    run = np.logical_and.reduce([(rows == 1) | (pitch == width) for pitch in pitches])
    width = width // unit
    limit = rows * width
    pitches = [np.where(run, COLUMNS * unit, pitch) for pitch in pitches]
    return np.where(run, -(-limit // COLUMNS), rows), np.where(run, COLUMNS, width), pitches, limit


def tiles(counts: Any, widths: Any, device: torch.device) -> Tiles:
    """Tiles of `ROWS` times `COLUMNS` units over lines of `counts[i]` rows of `widths[i]` units, none of them empty.

    >>> tiles(np.array([17, 1]), np.array([1024, 3000]), torch.device("cpu")).places.tolist()
    [[0, 0, 0], [0, 16, 0], [1, 0, 0], [1, 0, 1024], [1, 0, 2048]]
    """
    across = -(-widths // COLUMNS)
    each = -(-counts // ROWS) * across
    ends = np.cumsum(each)
    total = int(ends[-1])
    # Spread out on the device: there are hundreds of thousands of tiles to a few hundred lines.
    facts = sent(np.stack([each, ends - each, across]).astype(np.int64), device)
    line = torch.repeat_interleave(torch.arange(len(each), device=device), facts[0], output_size=total)
    within = torch.arange(total, device=device) - facts[1][line]
    row = within // facts[2][line]
    column = within - row * facts[2][line]
    return Tiles(torch.stack([line, row * ROWS, column * COLUMNS], dim=1).to(torch.int32), total)
