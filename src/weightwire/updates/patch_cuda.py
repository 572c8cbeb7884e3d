"""Changes from deltas, and the memory on a GPU that they go to: looked at, written, and put back, in Triton.

A tensor's elements may be in several places, and in each as a part only: a tensor-parallel rank's slice, or one matrix
of a fused one. So each place is a `Site`, and of the changes those that fall outside it are skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from weightwire.updates.boxes import Rows
from weightwire.updates.delta_cuda import Changes
from weightwire.updates.digest import word_facts
from weightwire.updates.factors_cuda import factors, key_of
from weightwire.updates.rice_cuda import moved
from weightwire.updates.tiles import Parts, brought, ends_of, parts_of, sent

__all__ = ["Patches", "Site", "Sites"]

_TILE = 1024
_LOOK, _WRITE, _UNDO = 0, 1, 2


class Site(NamedTuple):
    """Rows of the tensor of delta number `delta`, `rows.first` counted in its elements, that are in memory at
    `address`, from which `rows.second` counts, in elements too. A delta of all of the tensor."""

    delta: int
    dtype: torch.dtype
    rows: Rows
    address: int


class Sites:
    """Sites as a table: as good for the next deltas as for these, for as long as they stay where they are."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.lines = np.array([_line(site, number) for number, site in enumerate(sites)], np.int64).reshape(-1, 11)
        self.deltas = np.array([site.delta for site in sites], np.int64)
        self.firsts = np.array([site.rows.first for site in sites], np.int64)
        self.extents = np.array([_extent(site.rows) for site in sites], np.int64)
        self.widths = np.array([8 * site.dtype.itemsize for site in sites], np.int64)

    @classmethod
    def of_whole(cls, tensors: Sequence[torch.Tensor]) -> Sites:
        """Contiguous tensors, one for each delta."""
        rows = [Rows(0, 0, 1, tensor.numel(), max(tensor.numel(), 1), 0) for tensor in tensors]
        every = enumerate(zip(tensors, rows, strict=True))
        return cls([Site(number, tensor.dtype, row, tensor.data_ptr()) for number, (tensor, row) in every])

    def __len__(self) -> int:
        return len(self.lines)


class Patches:
    """The changes of deltas at their sites, which must not overlap in memory and stay where they are."""

    def __init__(self, changes: Changes, sites: Sites) -> None:
        self._device = changes.keys.device
        self._keys, self._steps = changes.keys, changes.steps
        self._sites = len(sites)
        self._launches: list[tuple[int, torch.Tensor, Parts, torch.Tensor]] = []
        firsts = np.array(changes.origins, np.int64)[sites.deltas] + sites.firsts
        bounds = sent(np.stack([firsts, firsts + sites.extents]), self._device)
        begins, ends = brought(torch.searchsorted(self._keys, bounds))
        for width in np.unique(sites.widths).tolist():
            mine = (sites.widths == width) & (begins < ends)
            if mine.any():
                lines = sites.lines[mine]
                lines[:, 0], lines[:, 1], lines[:, 3] = begins[mine], ends[mine], firsts[mine]
                self._launches.append(self._ready(width, lines))

    def look(self) -> torch.Tensor:
        """Note what stands where changes go. Of each site: what they add to both sums of its digest, and how many NaN
        and Inf they bring (int64, on the device). Changes no memory but its own."""
        sums = torch.zeros(self._sites, 3, dtype=torch.int64, device=self._device)
        self._visit(_LOOK, sums)
        return sums

    def write(self) -> None:
        """Write the new values over those noted, on the current stream."""
        self._visit(_WRITE, self._steps)

    def undo(self) -> None:
        """Write the noted values back, whatever part of `write` had been done."""
        self._visit(_UNDO, self._steps)

    def _ready(self, width: int, lines: Any) -> tuple[int, torch.Tensor, Parts, torch.Tensor]:
        counts = lines[:, 1] - lines[:, 0]
        ends = ends_of(counts)
        lines[:, 2] = ends[:-1]
        olds = torch.empty(int(ends[-1]), dtype=torch.int32, device=self._device)
        return width, sent(lines, self._device), parts_of(-(-counts // _TILE), self._device), olds

    def _visit(self, mode: int, sums: torch.Tensor) -> None:
        with torch.cuda.device(self._device if self._device.type == "cuda" else -1):
            for width, lines, parts, olds in self._launches:
                _visit[(len(parts.of),)](
                    lines, parts.of, parts.number, self._keys, self._steps, olds, sums, MODE=mode, WIDTH=width,
                    FIELDS=lines.shape[1], TILE=_TILE,
                )  # fmt: skip


def _extent(rows: Rows) -> int:
    return (rows.count - 1) * rows.first_pitch + rows.width


def _line(site: Site, number: int) -> tuple[int, ...]:
    """As `_visit` reads it, without what depends on the deltas."""
    itemsize, rows = site.dtype.itemsize, site.rows
    exponent = word_facts(site.dtype)[0] & ((1 << 8 * itemsize) - 1)
    return (
        0, 0, 0, 0, rows.first_pitch, rows.width, site.address + rows.second * itemsize, rows.second_pitch,
        rows.first, exponent, number,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _visit(  # type: ignore[no-untyped-def]
    lines, ofs, numbers, keys, steps, olds, sums, MODE: tl.constexpr, WIDTH: tl.constexpr, FIELDS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Some changes at one site. A tile: its line, and its number there. A line: its first change and the one after its
    last; where its old values begin in `olds`; its first key, the pitch and width of its rows; their address and pitch
    in memory; the index of its first element in the full tensor; all exponent bits; its number."""
    tile = tl.program_id(0).to(tl.int64)
    line = lines + tl.load(ofs + tile) * FIELDS
    begin = tl.load(line)
    change = begin + tl.load(numbers + tile) * TILE + tl.arange(0, TILE)
    inside = change < tl.load(line + 1)
    place = tl.load(keys + change, mask=inside, other=0) - tl.load(line + 3)
    row = place // tl.load(line + 4)
    column = place - row * tl.load(line + 4)
    inside = inside & (column < tl.load(line + 5))
    if WIDTH == 16:
        live = tl.load(line + 6).to(tl.pointer_type(tl.uint16), bitcast=True)
    else:
        live = tl.load(line + 6).to(tl.pointer_type(tl.uint32), bitcast=True)
    live += row * tl.load(line + 7) + column
    noted = olds + tl.load(line + 2) + change - begin
    if MODE == 2:
        tl.store(live, tl.load(noted, mask=inside, other=0).to(live.dtype.element_ty), mask=inside)
    elif MODE == 1:
        step = tl.load(steps + change, mask=inside, other=0)
        old = tl.load(noted, mask=inside, other=0).to(tl.uint32, bitcast=True)
        tl.store(live, moved(old, step, WIDTH).to(live.dtype.element_ty), mask=inside)
    else:
        old = tl.load(live, mask=inside, other=0).to(tl.uint32)
        tl.store(noted, old.to(tl.int32, bitcast=True), mask=inside)
        new = moved(old, tl.load(steps + change, mask=inside, other=0), WIDTH)
        byte = (tl.load(line + 8) + place) * (WIDTH // 8)
        # New less old modulo 2^64, which is what the sum is modulo.
        more = (new.to(tl.uint64) - old.to(tl.uint64)) << (8 * (byte & 3)).to(tl.uint64)
        more = tl.where(inside, more, 0)
        low, high = factors((byte >> 2).to(tl.uint32), key_of(byte >> 2))
        exponent = tl.load(line + 9).to(tl.uint32)
        bad = inside & ((new & exponent) == exponent)
        sums += tl.load(line + 10) * 3
        tl.atomic_add(sums, tl.sum(more * low).to(tl.int64, bitcast=True), sem="relaxed")
        tl.atomic_add(sums + 1, tl.sum(more * high).to(tl.int64, bitcast=True), sem="relaxed")
        tl.atomic_add(sums + 2, tl.sum(bad.to(tl.int64)), sem="relaxed")
