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
    """Tiles of `ROWS` times `COLUMNS` units over lines of `counts[i]` rows of `widths[i]` units, none of them empty.

    >>> tiles(np.array([17, 1]), np.array([1024, 3000]), torch.device("cpu")).places.tolist()
    [[0, 0, 0], [0, 16, 0], [1, 0, 0], [1, 0, 1024], [1, 0, 2048]]
    """
    across = -(-widths // COLUMNS)
    each = -(-counts // ROWS) * across
    ends = np.cumsum(each)
    total = int(ends[-1])
    # Spread out on the device: there are hundreds of thousands of tiles to a few hundred lines.
    facts = torch.from_numpy(np.stack([each, ends - each, across]).astype(np.int64)).to(device)
    line = torch.repeat_interleave(torch.arange(len(each), device=device), facts[0], output_size=total)
    within = torch.arange(total, device=device) - facts[1][line]
    row = within // facts[2][line]
    column = within - row * facts[2][line]
    return Tiles(torch.stack([line, row * ROWS, column * COLUMNS], dim=1).to(torch.int32), total)
