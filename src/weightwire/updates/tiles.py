"""Tiles: how a GPU kernel shares out a list of rows of very different sizes among equal programs.

A table has one line for each run of rows; a tile is some of a line's rows, and of these some columns. Which line a tile
belongs to is written down beforehand, so that a kernel need not search.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = ["COLUMNS", "ROWS", "Tiles", "tiles"]

COLUMNS = 1024
ROWS = 16


class Tiles(NamedTuple):
    """For each tile its line in the table and its first row and column there: int32 `(n, 3)`, on the device."""

    places: torch.Tensor
    count: int  # type: ignore[assignment]  # hides tuple.count


def tiles(counts: Any, widths: Any, device: torch.device) -> Tiles:
    """Tiles of `ROWS` times `COLUMNS` units over lines of `counts[i]` rows of `widths[i]` units.

    >>> tiles([17, 1], [1024, 3000], torch.device("cpu")).places.tolist()
    [[0, 0, 0], [0, 16, 0], [1, 0, 0], [1, 0, 1024], [1, 0, 2048]]
    """
    down = -(-np.asarray(counts, np.int64) // ROWS)
    across = -(-np.asarray(widths, np.int64) // COLUMNS)
    each = down * across
    line = np.repeat(np.arange(len(each), dtype=np.int64), each)
    within = np.arange(int(each.sum()), dtype=np.int64) - np.repeat(np.cumsum(each) - each, each)
    row, column = np.divmod(within, across[line])
    places = np.stack([line, row * ROWS, column * COLUMNS], axis=1).astype(np.int32)
    return Tiles(torch.from_numpy(places).to(device, non_blocking=True), len(places))
