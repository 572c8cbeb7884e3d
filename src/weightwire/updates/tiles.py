"""Tiles: how a GPU kernel shares out a list of rows of very different sizes among equal programs.

A table has one line for each run of rows; a tile is some of a line's rows, and of these some columns. Which line a tile
belongs to is written down beforehand, so that a kernel need not search.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

__all__ = [
    "COLUMNS",
    "ROWS",
    "Parts",
    "Tiles",
    "brought",
    "by_alignment",
    "ends_of",
    "full_rows",
    "parts_of",
    "sent",
    "sent_all",
    "tiled",
]

Array = npt.NDArray[np.int64]

COLUMNS = 1024
ROWS = 16
_ALIGNMENT = 16  # of what kernels are given


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


def sent_all(tables: Sequence[Any], device: torch.device) -> list[torch.Tensor]:
    """`sent`, of many tables, contiguous, by one copy.

    >>> tables = np.arange(3, dtype=np.int32), np.zeros((1, 2), np.int64)
    >>> [table.tolist() for table in sent_all(tables, torch.device("cpu"))]
    [[0, 1, 2], [[0, 0]]]
    """
    begins = ends_of(np.array([table.nbytes for table in tables], np.int64), _ALIGNMENT).tolist()
    joined = np.zeros(begins[-1], np.uint8)
    for table, begin in zip(tables, begins, strict=False):
        joined[begin : begin + table.nbytes] = table.reshape(-1).view(np.uint8)
    memory = sent(joined, device)
    return [
        memory[begin : begin + table.nbytes].view(torch.from_numpy(table).dtype).view(table.shape)
        for table, begin in zip(tables, begins, strict=False)
    ]


def brought(table: torch.Tensor) -> npt.NDArray[Any]:
    """`sent`, the other way: a copy of a table on the host, once the current stream of its device has come so far. A
    copy to pageable memory keeps every other thread of the process from the GPU until then, an engine's too.

    >>> brought(torch.arange(3))
    array([0, 1, 2])
    """
    if table.device.type != "cuda":
        return table.numpy().copy()
    here = torch.empty(table.shape, dtype=table.dtype, device="cpu", pin_memory=True)
    here.copy_(table, non_blocking=True)
    torch.cuda.current_stream(table.device).synchronize()
    return here.numpy().copy()


class Parts(NamedTuple):
    """Wholes in parts, `each[i]` of them, the parts one after the other. Of every part the whole that it is `of` and
    its `number` there; `ends` and, on the device, `bounds`: between which parts each whole is."""

    each: Array
    ends: Array
    bounds: torch.Tensor
    of: torch.Tensor
    number: torch.Tensor

    def totals(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Of each row, int64 for every part, the sums of the wholes: `(rows, wholes)`; they wrap."""
        # One row at a time: of a table it sums each row by one program.
        sums = torch.zeros(len(rows), len(self.of) + 1, dtype=torch.int64, device=self.of.device)
        for row, to in zip(rows, sums, strict=True):
            torch.cumsum(row, 0, out=to[1:])
        return sums[:, self.bounds].diff(dim=1)


def parts_of(each: Array, device: torch.device) -> Parts:
    """`each[i]` parts of whole number `i`, spread out on the device: a few hundred wholes have hundreds of thousands.

    >>> parts = parts_of(np.array([2, 0, 3]), torch.device("cpu"))
    >>> parts.of.tolist(), parts.number.tolist(), parts.totals([torch.ones(5, dtype=torch.int64)]).tolist()
    ([0, 0, 2, 2, 2], [0, 1, 0, 1, 2], [[2, 0, 3]])
    """
    ends = ends_of(each)
    facts = sent(np.stack([ends, np.append(each, 0)]), device)
    total = int(ends[-1])
    of = torch.repeat_interleave(torch.arange(len(each), device=device), facts[1, :-1], output_size=total)
    return Parts(each, ends, facts[0], of, torch.arange(total, device=device) - facts[0][of])


def ends_of(sizes: Array, multiple: int = 1) -> Array:
    """Where each begins, one after the other and at multiples of that, and where the next one would.

    >>> ends_of(np.array([2, 0, 3])).tolist(), ends_of(np.array([2, 0, 3]), 16).tolist()
    ([0, 2, 2, 5], [0, 16, 16, 32])
    """
    return np.append(0, np.cumsum(-(-sizes // multiple) * multiple))


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


def tiled(counts: Any, widths: Any) -> npt.NDArray[np.int32]:
    """The places of tiles of `ROWS` times `COLUMNS` units over lines of `counts[i]` rows of `widths[i]` units, none of
    them empty.

    >>> tiled(np.array([17, 1]), np.array([1024, 3000])).tolist()
    [[0, 0, 0], [0, 16, 0], [1, 0, 0], [1, 0, 1024], [1, 0, 2048]]
    """
    # On the host: of a few thousand that takes less than the launches it would take on the device.
    across = -(-widths // COLUMNS)
    each = -(-counts // ROWS) * across
    of = np.repeat(np.arange(len(each), dtype=np.int32), each)
    number = np.arange(len(of), dtype=np.int32) - np.repeat(ends_of(each)[:-1].astype(np.int32), each)
    row, column = np.divmod(number, across.astype(np.int32)[of])
    return np.stack([of, row * ROWS, column * COLUMNS], axis=1)
