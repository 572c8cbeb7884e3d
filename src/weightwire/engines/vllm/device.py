"""A whole model's staged copy on a GPU, and its way into the live parameters: one batched copy.

What arrives is put where it belongs in spare memory of the parameters' own shapes while the engine generates, or comes
there by itself, where that is in one piece. What the trainer lends out of its own memory on the same GPU stays there:
it is read once for its digest, and once more at commit; only parameters that are cast, or that the model's loader
computes, are staged then. With `staging="none"` what arrives goes into the live parameters themselves.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from weightwire.engines.vllm.batched_copy import BatchedCopy, Move
from weightwire.engines.vllm.computed import Ingredients
from weightwire.engines.vllm.copy_plan import Copy, Plan
from weightwire.engines.vllm.layout import refuse_infinite
from weightwire.errors import UnsupportedError, VerificationError
from weightwire.updates.boxes import Box, Rows, rows_of, strides_of
from weightwire.updates.buckets import Bucket, Piece
from weightwire.updates.digest import Scan, Scans, settle
from weightwire.updates.digest_cuda import Line, Table, line_of, lines_of, scan_lines, sum_lines, table
from weightwire.updates.manifest import Manifest, TensorSpec, dtype_name
from weightwire.updates.receipt import Proof
from weightwire.updates.tiles import brought, ends_of

__all__ = [
    "DeviceStaging",
    "Digests",
    "Held",
    "Region",
    "Tables",
    "Version",
    "parameters_of",
    "scanned",
    "synchronize",
    "table_of",
    "totals",
    "warm_up",
    "whole_of",
]

_ALIGNMENT = 256  # bytes, as torch's own memory has


class Region(NamedTuple):
    """One copy of a plan, in memory: from `source`, with strides in elements of the checkpoint tensor's dimensions. Or
    all of a computed parameter, which is of no tensor that was `sent`; it has a number among its like."""

    spec: TensorSpec
    number: int
    copy: Copy
    live: torch.Tensor
    source: int
    strides: Sequence[int]
    sent: bool = True

    @property
    def target(self) -> int:
        return self.live.data_ptr() + self.copy.offset * self.live.itemsize

    @property
    def is_whole(self) -> bool:
        """Whether it holds every element of a tensor that was sent, bit for bit."""
        return (
            self.sent
            and self.copy.source.shape == self.spec.shape
            and self.live.dtype == getattr(torch, self.spec.dtype)
        )

    def moves(self) -> list[Move]:
        rows = rows_of(self.copy.source.shape, self.strides, self.copy.strides)
        return [Move.of(part, self.source, self.target, self.live.itemsize) for part in rows]

    def lines(self, address: int, strides: Sequence[int]) -> list[Line]:
        return lines_of(address, self.copy.source, strides, self.spec.shape, self.live.dtype)


class Layout(NamedTuple):
    """Where parameters are in one piece of memory of `nbytes`: the byte at which each begins."""

    nbytes: int
    begins: Mapping[str, int]


class Run(NamedTuple):
    """Elements of a parameter as they lie in memory, from this one on."""

    parameter: str
    begin: int
    count: int  # type: ignore[assignment]


class _Memory(Mapping[str, torch.Tensor]):
    """Parameters in one piece of memory, each of the shape, strides and dtype of those that are live. Made when asked
    for: to make some hundreds takes longer than to receive the first buckets, and mostly nobody asks."""

    def __init__(self, layout: Layout, live: Mapping[str, Sequence[torch.Tensor]], device: torch.device) -> None:
        # In one piece, which the allocator then finds in the same place at the next update.
        self._memory = torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
        self._layout, self._live = layout, live
        self._made: dict[str, torch.Tensor] = {}
        self._flat: dict[torch.dtype, torch.Tensor] = {}
        self.where = (self._memory.data_ptr(), layout)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._made:
            live, begin = self._live[name][0], self._layout.begins[name]
            run = self._memory[begin : begin + live.nbytes]
            self._made[name] = run.view(live.dtype).as_strided(live.shape, live.stride())
        return self._made[name]

    def runs(self, wanted: Sequence[Run]) -> list[torch.Tensor]:
        """These elements as they lie in memory. By as few calls of torch as can be: in each a thread lets go of the
        interpreter, and while others use it waits to have it back, or keeps the engine's own from it."""
        dtypes = [self._live[name][0].dtype for name, _, _ in wanted]
        found: dict[int, torch.Tensor] = {}
        for dtype in {*dtypes}:
            if dtype not in self._flat:
                self._flat[dtype] = self._memory.view(dtype)
            firsts = {
                number: self._layout.begins[name] // dtype.itemsize + begin
                for number, (name, begin, _) in enumerate(wanted)
                if dtypes[number] == dtype
            }
            numbers = sorted(firsts, key=firsts.__getitem__)
            runs = _cut_out(self._flat[dtype], [(firsts[number], wanted[number].count) for number in numbers])
            found |= zip(numbers, runs, strict=True)
        return [found[number] for number in range(len(wanted))]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout.begins)

    def __len__(self) -> int:
        return len(self._layout.begins)


@dataclass(slots=True)
class Tables:
    """What was made ready for the last update, kept because the next mostly has the same addresses."""

    key: object = None
    regions: list[Region] = field(default_factory=list)
    whole_of: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Of each region the number of the tensor of which it holds everything, or -1."""
    copies: BatchedCopy | None = None
    live: Table | None = None
    live_of: list[int] = field(default_factory=list)
    parts: Table | None = None
    parts_of: list[int] = field(default_factory=list)
    buckets: dict[object, BatchedCopy] = field(default_factory=dict)
    """The way of each bucket into staged memory, by where it arrives."""
    buckets_of: object = None
    layouts: dict[Sequence[str], Layout] = field(default_factory=dict)
    """By the names that are staged."""
    layouts_of: object = None
    names: tuple[Plan, Mapping[str, torch.dtype], tuple[set[str], set[str], tuple[str, ...]]] | None = None
    """As `DeviceStaging._names` found them, and of what."""
    places: dict[Piece, Run | None] = field(default_factory=dict)
    """Where all of a piece is; None where it is in several places, or elsewhere. Of the same plan as the layouts."""


Digests = npt.NDArray[np.uint64]
"""Rows (low, high)."""


class Version(NamedTuple):
    """What was committed and proven: the digest of each tensor of the manifest, and of each region of the plan."""

    tensors: Digests
    regions: Digests


@dataclass(slots=True)
class Held:
    """What this rank's live parameters hold, as far as it was proven: what a delta can start from. By plan: another
    manifest's plan is another object."""

    plan: Plan | None = None
    version: Version | None = None
    places: Any = None
    """Where its regions are in memory, as `DeviceDelta` found it."""

    def take(self, plan: Plan | None, version: Version | None) -> None:
        self.plan, self.version = plan, version


class DeviceStaging:
    """One update on one rank. `live` has the tensors of each parameter of the plan, each memory once. What is live and
    proven in the end is noted in `held`. A plan with computed parameters needs the twin that it was recorded on.
    `queues`: whether all that the engine does after a commit comes behind it on the GPU."""

    def __init__(
        self,
        manifest: Manifest,
        plan: Plan,
        live: Mapping[str, Sequence[torch.Tensor]],
        device: torch.device,
        tables: Tables,
        held: Held,
        twin: torch.nn.Module | None = None,
        queues: bool = False,
    ) -> None:
        self._manifest, self._plan, self._live, self._device, self._tables = manifest, plan, live, device, tables
        self._held = held
        self._arrived = self._expected = np.zeros((0, 3), np.uint64)  # rows as those of `totals`
        self.takes = plan.takes_of(manifest.tensors)
        self._lent: dict[int, int] = {}
        self._staged: Mapping[str, torch.Tensor] = {}
        self._regions: list[Region] = []
        self._queues = queues
        self._copied: torch.cuda.Event | None = None
        self._ingredients = Ingredients(twin, manifest, plan.computed)
        self.computed = self._ingredients.parameters
        self._cast, cast, self._all = self._names()
        if manifest.staging == "none":
            if self.computed:
                raise UnsupportedError(
                    f"{self.computed[0]} is computed by the model's loader, which needs a staged copy",
                    next_step="Publish without staging='none'.",
                )
            if apart := [name for name in self._all if len(live[name]) > 1]:
                raise UnsupportedError(
                    f"{apart[0]} is in {len(live[apart[0]])} places of the live model, which needs a staged copy",
                    next_step="Publish without staging='none'.",
                )
            self._staged = {name: live[name][0] for name in self._all}
        self._own = {"copy": self._all, "lent": tuple(sorted(cast.union(self.computed))), "none": ()}[manifest.staging]
        self.nbytes = self._layout(self._own).nbytes

    def _names(self) -> tuple[set[str], set[str], tuple[str, ...]]:
        """Parameters that something is cast for; those that it, or another part of the same tensor, goes to; and all
        that are written. Found out once for a plan, while parameters keep their dtypes."""
        dtypes = {name: tensors[0].dtype for name, tensors in self._live.items()}
        found = self._tables.names
        if found is None or found[0] is not self._plan or found[1] != dtypes:
            copies = self._plan.copies
            specs = zip(self._manifest.tensors, copies, strict=True)
            cast = {c.parameter for s, own in specs for c in own if dtypes[c.parameter] != getattr(torch, s.dtype)}
            # Of a tensor that is cast on its way into one parameter, all is written.
            beside = {c.parameter for own in copies if any(c.parameter in cast for c in own) for c in own}
            named = {copy.parameter for own in copies for copy in own}.union(self.computed)
            found = self._tables.names = (self._plan, dtypes, (cast, beside, tuple(sorted(named))))
        return found[2]

    def write(self, tensor: int, start: int, data: torch.Tensor) -> None:
        self._ingredients.write(tensor, start, data, self._allocated)
        self._copy_in(tensor, start, data)

    def _copy_in(self, tensor: int, start: int, data: torch.Tensor) -> None:
        self._allocate()
        self._plan.write(self._manifest.tensors[tensor], tensor, start, data.to(self._device), self._staged)

    def write_bucket(self, bucket: Bucket, data: torch.Tensor) -> None:
        """As `target.TakesBuckets`."""
        self.write_parts(bucket, [piece.within(data) for piece in bucket.pieces])

    def write_parts(self, bucket: Bucket, parts: Sequence[torch.Tensor]) -> None:
        """By one launch where nothing is cast on the way."""
        self._allocate()
        copies, pieces = self._plan.copies, [*zip(bucket.pieces, parts, strict=True)]
        for piece, part in pieces:
            if piece.tensor in self._ingredients:
                self._ingredients.write(piece.tensor, piece.start, part, self._allocated)
        cast = any(c.parameter in self._cast for piece in bucket.pieces for c in copies[piece.tensor])
        if cast or any(part.device != self._device for part in parts):
            for piece, part in pieces:
                self._copy_in(piece.tensor, piece.start, part)
            return
        kept = self._kept_buckets
        key = (bucket.index, *(part.data_ptr() for part in parts))
        if key not in kept:
            kept[key] = BatchedCopy(self._moves(pieces), self._device)
        kept[key].run()

    def places(self, bucket: Bucket) -> Sequence[torch.Tensor | None]:
        """As `target.HasPlaces`."""
        self._allocate()
        kept = self._tables.places
        for piece in bucket.pieces:
            if piece not in kept:
                kept[piece] = self._find_place(piece)
        found = [kept[piece] for piece in bucket.pieces]
        wanted = [run for run in found if run is not None]
        if isinstance(self._staged, _Memory):
            made = iter(self._staged.runs(wanted))
        else:
            made = (
                self._staged[name].as_strided((count,), (1,), self._staged[name].storage_offset() + begin)
                for name, begin, count in wanted
            )
        return [None if run is None else next(made) for run in found]

    def _find_place(self, piece: Piece) -> Run | None:
        if piece.tensor in self._ingredients:
            return None
        counts: Counter[tuple[str, int]] = Counter()
        for parameter, rows in self._rows(piece):
            if rows.count == 1 and parameter not in self._cast:
                counts[parameter, rows.second - rows.first] += rows.width
        return next((Run(*where, count) for where, count in counts.items() if count == piece.count), None)

    def copy_all(self, room: int) -> bool:
        """As `target.TakesBuckets`."""
        if self._manifest.staging == "none":
            return True  # and it goes where it stays
        if self._layout(self._all).nbytes <= room:
            self._own = self._all
        return self._own is self._all

    def lend(self, tensor: int, data: torch.Tensor) -> None:
        """The whole of a tensor, in memory that stays as it is until `discard`. It may be on another GPU."""
        if tensor in self._ingredients:
            self._ingredients.write(tensor, 0, data.reshape(-1), self._allocated)
        if any(copy.parameter in self._cast for copy in self._plan.copies[tensor]):
            self._copy_in(tensor, 0, data.reshape(-1))
        else:
            self._lent[tensor] = data.data_ptr()

    def seal(self, scans: Sequence[Scan]) -> None:
        self._arrived = Scans.of(scans).rows
        # What arrived is checked as it arrives; what it became in the engine's dtype may not be finite.
        for name in self._cast.union(self.computed) & self._staged.keys() if self._manifest.finite else ():
            refuse_infinite(name, self._staged[name])
        # All of a region follows from the plan and from where things are.
        live = [tensor.data_ptr() for tensors in self._live.values() for tensor in tensors]
        key = (self._plan, self._lent, self._where, live)
        if self._tables.key != key:
            self._fill(key)
        self._regions = self._tables.regions
        # A tensor that goes somewhere as a whole has the digest it arrived with; of a part it is found out.
        self._expected = totals(scanned(self._tables.parts), self._tables.parts_of, len(self._regions))
        whole = self._tables.whole_of >= 0
        self._expected[whole] = self._arrived[self._tables.whole_of[whole]]
        # What was staged on this stream is there before the engine's own stream copies it.
        synchronize(self._device)

    def check(self, seconds: float) -> bool:
        return True

    def commit(self) -> None:
        self._held.take(None, None)
        if self._manifest.staging == "none" or self._tables.copies is None:
            return
        try:
            self._tables.copies.run()
        finally:
            if self._device.type == "cuda":
                self._copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                self._copied.record()
        # A thread of its own, as where an `LLM` is in the trainer's process, has another stream than its model steps.
        if not self._queues or threading.current_thread() is not threading.main_thread():
            self.finish()
            self._copied = None

    def finish(self) -> bool:
        """As `target.Queues`. What the trainer lent is its own again once this returns."""
        if self._copied is None:
            return False
        self._copied.synchronize()
        return True

    def proof(self) -> dict[str, Proof]:
        self.finish()
        found = totals(scanned(self._tables.live), self._tables.live_of, len(self._regions))
        wrong = parameters_of(self._regions, (found != self._expected).any(axis=1))
        if wrong:
            raise VerificationError(
                f"{len(wrong)} live parameters are not what was staged: {', '.join(wrong[:5])}",
                next_step="Publish a complete update.",
            )
        self._held.take(self._plan, Version(self._arrived[:, :2], self._expected[:, :2]))
        return {region.copy.parameter: "read back" for region in self._regions}

    def discard(self) -> None:
        with contextlib.suppress(RuntimeError):  # of a GPU that has failed
            self.finish()  # it reads what is about to be given back
        self._ingredients.discard()
        self._staged = {}
        self._lent = {}
        self._regions = []

    @cached_property
    def _kept_buckets(self) -> dict[object, BatchedCopy]:
        tables, manifest = self._tables, self._manifest
        of = (self._plan, manifest.bucket_bytes, self._where)
        most = 4 * (manifest.nbytes // manifest.bucket_bytes + 1)  # where buckets do not come to the same places again
        if tables.buckets_of != of or len(tables.buckets) > most:
            tables.buckets_of, tables.buckets = of, {}
        return tables.buckets

    @property
    def _where(self) -> object:
        """Where what is staged is, for comparison with what was made ready for."""
        if isinstance(self._staged, _Memory):
            return self._staged.where
        return [(name, tensor.data_ptr()) for name, tensor in self._staged.items()]

    def _layout(self, names: Sequence[str]) -> Layout:
        tables = self._tables
        if tables.layouts_of is not self._plan:
            tables.layouts_of, tables.layouts, tables.places = self._plan, {}, {}
        if names not in tables.layouts:
            sizes = np.array([self._live[name][0].nbytes for name in names], np.int64)
            *begins, nbytes = ends_of(sizes, _ALIGNMENT).tolist()
            tables.layouts[names] = Layout(nbytes, dict(zip(names, begins, strict=True)))
        return tables.layouts[names]

    def _allocate(self) -> None:
        if not self._staged:
            self._staged = _Memory(self._layout(self._own), self._live, self._device)

    def _allocated(self, name: str) -> torch.Tensor:
        self._allocate()
        return self._staged[name]

    def _moves(self, pieces: Sequence[tuple[Piece, torch.Tensor]]) -> Iterator[Move]:
        for piece, part in pieces:
            for parameter, rows in self._rows(piece):
                move = Move.of(rows, part.data_ptr(), self._staged[parameter].data_ptr(), piece.dtype.itemsize)
                if move.source != move.target:  # else it has come there by itself
                    yield move

    def _rows(self, piece: Piece) -> Iterator[tuple[str, Rows]]:
        """The parameters that a piece goes to, and which rows of it (first) to which of theirs (second)."""
        spec = self._manifest.tensors[piece.tensor]
        for place in self._plan.places(spec, piece.tensor, piece.start, piece.count):
            for rows in rows_of(place.shape, place.strides, place.steps):
                yield (
                    place.parameter,
                    rows._replace(first=rows.first + place.first, second=rows.second + place.second),
                )

    def _places(self, number: int, spec: TensorSpec, copy: Copy) -> list[Region]:
        if number in self._lent:
            strides = strides_of(spec.shape)
            start = sum(at * stride for at, stride in zip(copy.source.start, strides, strict=True))
            source = self._lent[number] + start * spec.itemsize
        else:
            staged = self._staged[copy.parameter]
            strides, source = copy.strides, staged.data_ptr() + copy.offset * staged.itemsize
        return [Region(spec, number, copy, live, source, strides) for live in self._live[copy.parameter]]

    def _computed_places(self, number: int, name: str) -> list[Region]:
        staged, (first, *_) = self._staged[name], self._live[name]
        spec = TensorSpec(name=name, dtype=dtype_name(first.dtype), shape=tuple(first.shape))
        copy = Copy(Box((0,) * first.dim(), spec.shape), name, 0, first.stride())
        return [Region(spec, number, copy, live, staged.data_ptr(), copy.strides, False) for live in self._live[name]]

    def _fill(self, key: object) -> None:
        tables = self._tables
        tables.key = None
        tables.regions = [
            region
            for number, (spec, copies) in enumerate(zip(self._manifest.tensors, self._plan.copies, strict=True))
            for copy in copies
            for region in self._places(number, spec, copy)
        ]
        for number, name in enumerate(self.computed):
            tables.regions += self._computed_places(number, name)
        tables.whole_of = whole_of(tables.regions)
        numbered = list(enumerate(tables.regions))
        live = [(n, line) for n, r in numbered for line in r.lines(r.target, r.copy.strides)]
        parts = [(n, line) for n, r in numbered if not r.is_whole for line in r.lines(r.source, r.strides)]
        tables.copies = BatchedCopy((move for r in tables.regions for move in r.moves()), self._device)
        tables.live, tables.live_of = table_of(live, self._device)
        tables.parts, tables.parts_of = table_of(parts, self._device)
        tables.key = key


def _cut_out(memory: torch.Tensor, runs: Sequence[tuple[int, int]]) -> Sequence[torch.Tensor]:
    """Of 1-D memory runs of elements (first, count), in the order of the first.

    >>> [run.tolist() for run in _cut_out(torch.arange(9), [(1, 2), (3, 1), (7, 2)])]
    [[1, 2], [3], [7, 8]]
    >>> [run.tolist() for run in _cut_out(torch.arange(9), [(1, 3), (2, 1)])]
    [[1, 2, 3], [2]]
    """
    ends = [0, *(first + count for first, count in runs)]
    gaps = [first - end for (first, _), end in zip(runs, ends, strict=False)]
    if min(gaps, default=0) < 0:  # some overlap
        return [memory.narrow(0, first, count) for first, count in runs]
    sizes = [size for gap, (_, count) in zip(gaps, runs, strict=True) for size in (gap, count)]
    return memory.split_with_sizes([*sizes, len(memory) - ends[-1]])[1::2]


def warm_up(device: torch.device) -> None:
    """Compile the kernels, before the first update wants them."""
    for _, dtype in ((8, torch.int64), (4, torch.int32), (2, torch.int16)):
        data = torch.zeros(64, dtype=dtype, device=device)
        end = data.data_ptr() + 32 * dtype.itemsize
        BatchedCopy([Move(data.data_ptr(), end, 1, dtype.itemsize, 0, 0)], device).run()
    # Lines that can be read 16 bytes at a time, and that cannot, alone and by twos.
    many = torch.zeros(9, 64, dtype=torch.bfloat16, device=device)
    for count, other in ((64, 56), (2, 6)):
        lines = [line_of(row.data_ptr(), 0, count, row.dtype) for row in many[:8]]
        settle(scan_lines(table([*lines, line_of(many[8].data_ptr(), 0, other, many.dtype)], device)))
    for start in (0, 1):
        data = torch.zeros(64, dtype=torch.bfloat16, device=device)
        settle(scan_lines(table([Line(data.data_ptr(), 1, 2 * (2 - start), 0, 2 * start, 0, 0, 0, 1)], device)))


def table_of(numbered: Sequence[tuple[int, Line]], device: torch.device) -> tuple[Table, list[int]]:
    """Lines ready to be scanned, and the number of the region that each belongs to, as `totals` takes them."""
    return table([line for _, line in numbered], device), [n for n, _ in numbered]


def scanned(ready: Table | None) -> torch.Tensor | None:
    """The sums of each line of a table, queued on the current stream; None of none."""
    return sum_lines(ready) if ready is not None and ready.lines else None


def totals(sums: torch.Tensor | None, of: Sequence[int], count: int) -> npt.NDArray[np.uint64]:
    """Scans of `count` regions, rows (low, high, nonfinite), of which these are the parts (`digest_cuda.sum_lines`);
    waits for them."""
    rows = np.zeros((count, 3), np.uint64)
    if sums is not None:
        np.add.at(rows, np.array(of, np.int64), brought(sums).view(np.uint64))  # modulo 2^64, as digests are
    return rows


def whole_of(regions: Sequence[Region]) -> npt.NDArray[np.int64]:
    """As in `Tables`."""
    return np.array([region.number if region.is_whole else -1 for region in regions], np.int64)


def parameters_of(regions: Sequence[Region], which: npt.NDArray[np.bool_]) -> list[str]:
    """The parameters that these regions are in."""
    return sorted({regions[n].copy.parameter for n in np.flatnonzero(which).tolist()})


def synchronize(device: torch.device) -> None:
    """Wait for what was queued on the current stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
