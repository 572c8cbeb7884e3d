"""Weights spread over the trainer's ranks as DTensors: FSDP2, HSDP, tensor parallelism, and mixtures of them.

No rank ever sees a full tensor. Each run that is asked for is cut into what each rank holds of it, and every rank sends
just that to rank 0: a few MiB at a time by way of the CPU or, where each rank has a GPU of its own, a bucket at a time
from GPU to GPU. `sources.deepspeed` does so with what ZeRO holds. For deltas each rank reads what it holds by itself,
which `parts` shares out among replicas.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import torch
from torch.distributed.tensor import DTensor

from weightwire.errors import SourceError, UnsupportedError, WeightwireError
from weightwire.sources.base import spec_of, without_aliases
from weightwire.sources.peft import PeftAdapter
from weightwire.sources.ranks import Ranks
from weightwire.sources.tensors import state_of
from weightwire.updates.adapter import check_adapter
from weightwire.updates.boxes import NOTHING, Box, Part, intersect, rectangles, strides_of
from weightwire.updates.digest import NO_DIGEST, Pending, Scan, scan_box, scan_boxes_any
from weightwire.updates.manifest import TensorSpec

__all__ = ["FsdpPeftSource", "FsdpSource", "Held", "held", "held_run", "holders"]

_MESSAGE_BYTES = 4 << 20
_ALIGNMENT = 16  # bytes; of every dtype, and of what a GPU copies at once


class FsdpSource:
    """A module whose state is sharded over all ranks of the default process group. Collective, as is every method.

    Plain tensors among the state are taken to be the same on every rank. A rank that does not come within `timeout`
    seconds is a `SourceError` on the others. `state` says what to read, by name, if that is not all of the module.
    """

    lora: Mapping[str, Any] | None = None
    gathers = False
    """Whether ranks gather what is on their GPUs over NCCL, as of the last `metadata`."""

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        timeout: float = 600.0,
        state: Callable[[], Mapping[str, torch.Tensor]] | None = None,
    ) -> None:
        self._state = state or (lambda: state_of(module))
        self.ranks = Ranks.over_default_group(timeout)
        self.aliases: Mapping[str, str] = {}
        self._specs: list[TensorSpec] = []
        self._holders: list[dict[Box, int]] = []
        self._held: list[Held] = []
        self._memory = torch.device("cpu")  # where messages are made

    def metadata(self) -> Sequence[TensorSpec]:
        """Look the parameters up anew, and agree with the other ranks on what they are and who holds what.

        `UnsupportedError` names a tensor that the ranks do not hold in rectangles, `SourceError` one that they do not
        know alike.
        """
        mine: dict[str, Held] = {}
        listed: bytes | None = None
        error: WeightwireError | None = None
        try:
            mine = {name: self._hold(name, tensor) for name, tensor in self._state().items()}
            listed = msgspec.json.encode(_listing(mine)) if self.ranks.rank == 0 else None
        except Exception as failed:
            error = _as_error(failed, "the module's state")
        self.ranks.agree(error)
        listing = msgspec.json.decode(self.ranks.share(listed), type=_Listing)
        self.ranks.agree(_difference(mine, listing))
        self._held = [mine[spec.name] for spec in listing.specs]
        boxes = self._boxes(self._held)
        self._holders = [
            holders(spec, of_ranks, each.shape)
            for spec, of_ranks, each in zip(listing.specs, boxes, self._held, strict=True)
        ]
        self._specs, self.aliases = listing.specs, listing.aliases
        gpu = self._gpu()
        self.gathers, self._memory = self.ranks.on_gpus(gpu), gpu or torch.device("cpu")
        return self._specs

    def read(self, tensor: int, start: int, out: torch.Tensor) -> Scan:
        """See `Source.read`. Only rank 0's `out` is filled; of the others' the length alone matters."""
        stop = start + out.numel()
        mine: list[torch.Tensor] = []
        scan = Scan(NO_DIGEST, 0)
        error: WeightwireError | None = None
        try:
            for block in self._messages(tensor, start, stop, self.ranks.rank):
                # Where the weights are on the CPU these are views, else copies of at most one run in all.
                mine.append(self._held[tensor].part(block.box).to("cpu"))
                scan += scan_box(mine[-1], block.box, self._held[tensor].shape)
        except Exception as failed:
            known = tensor < len(self._specs)
            error = _as_error(failed, repr(self._specs[tensor].name) if known else f"tensor number {tensor}")
        # Nobody sends before everybody can.
        self.ranks.agree(error)
        try:
            if self.ranks.rank == 0:
                self._assemble(tensor, start, out, mine)
            else:
                for part in mine:
                    self.ranks.send(_bytes_of(part.contiguous()), 0)
        except Exception as failed:
            # The others are in the middle of it and wait for this rank.
            self.ranks.close()
            raise _as_error(failed, repr(self._specs[tensor].name)) from failed
        return scan

    def gather(self, runs: Callable[[], Sequence[tuple[int, int, torch.Tensor]]]) -> None:
        """See `SpreadSource.gather`: one message from each rank, whose memory is free again afterwards."""
        rank = self.ranks.rank
        nbytes = [0] * self.ranks.size
        parts: list[_Gathered] = []
        mine, what = torch.empty(0, dtype=torch.uint8), "a bucket"
        error: WeightwireError | None = None
        try:
            for tensor, start, out in runs():
                for block in self._blocks(tensor, start, start + out.numel()):
                    parts.append(_Gathered(tensor, start, out, block, nbytes[block.rank]))
                    size = math.prod(block.box.shape) * self._specs[tensor].itemsize
                    nbytes[block.rank] += -(-size // _ALIGNMENT) * _ALIGNMENT
            mine = torch.empty(nbytes[rank] if rank else 0, dtype=torch.uint8, device=self._memory)
            for part in parts:
                if rank == part.block.rank != 0:
                    what = repr(self._specs[part.tensor].name)
                    self._in_message(mine, part).copy_(self._held[part.tensor].part(part.block.box))
        except Exception as failed:
            error = _as_error(failed, what)
        # Nobody sends before everybody can.
        self.ranks.agree(error)
        try:
            messages = self.ranks.to_leader(mine, nbytes)
            for part in parts if rank == 0 else ():
                if (holder := part.block.rank) == 0:
                    data = self._held[part.tensor].part(part.block.box)
                else:
                    data = self._in_message(messages[holder], part)
                self._place(part.tensor, part.start, part.out, part.block).copy_(data)
        except Exception as failed:
            self.ranks.close()
            raise _as_error(failed, "a bucket") from failed

    def scan_own(self) -> list[Scan | Pending]:
        """Of each tensor what this rank is to send of it; over all ranks they add up to the whole."""
        mine = self._own_boxes()
        held = zip(self._held, mine, strict=True)
        scans = iter(scan_boxes_any([(each.part(box), box, each.shape) for each, box in held if box is not None]))
        return [Scan(NO_DIGEST, 0) if box is None else next(scans) for box in mine]

    def parts(self, tensor: int) -> Mapping[int, Part]:
        """See `SpreadSource.parts`; replicas have it in the lowest rank."""
        shape = self._held[tensor].shape
        return {rank: Part(shape, box) for box, rank in self._holders[tensor].items()}

    def own(self) -> Mapping[str, torch.Tensor]:
        """See `SpreadSource.own`."""
        return {
            spec.name: held.local.new_empty(0) if box is None else held.part(box)
            for spec, held, box in zip(self._specs, self._held, self._own_boxes(), strict=True)
        }

    def _own_boxes(self) -> list[Box | None]:
        """Of each tensor what this rank is to send, if anything."""
        return [{holder: box for box, holder in boxes.items()}.get(self.ranks.rank) for boxes in self._holders]

    def read_part(self, tensor: int, start: int, out: torch.Tensor) -> Scan:
        """See `SpreadSource.read_part`."""
        part = self.parts(tensor).get(self.ranks.rank, NOTHING)
        scan = Scan(NO_DIGEST, 0)
        done = 0
        for within in rectangles(part.box.shape, start, start + min(out.numel(), part.numel)):
            box = Box(tuple(a + b for a, b in zip(part.box.start, within.start, strict=True)), within.shape)
            mine = self._held[tensor].part(box).to("cpu")
            out[done : done + mine.numel()].view(mine.shape).copy_(mine)
            scan += scan_box(mine, box, part.shape)
            done += mine.numel()
        return scan

    def release(self) -> None:
        self._held = []

    @property
    def device(self) -> torch.device:
        return next((self._hold(name, t).local.device for name, t in self._state().items()), torch.device("cpu"))

    def whole(self) -> None:
        return None

    def _assemble(self, tensor: int, start: int, out: torch.Tensor, mine: Sequence[torch.Tensor]) -> None:
        if out.device.type != "cpu":
            # What the others send comes by way of the CPU.
            assembled = torch.empty(out.shape, dtype=out.dtype)
            self._assemble(tensor, start, assembled, mine)
            out.copy_(assembled)
            return
        own = iter(mine)
        for block in self._messages(tensor, start, start + out.numel(), None):
            place = self._place(tensor, start, out, block)
            if block.rank == 0:
                place.copy_(next(own))
            elif place.is_contiguous():
                self.ranks.receive(_bytes_of(place), block.rank)
            else:
                arrived = torch.empty(block.box.shape, dtype=out.dtype)
                self.ranks.receive(_bytes_of(arrived), block.rank)
                place.copy_(arrived)

    def _messages(self, tensor: int, start: int, stop: int, rank: int | None) -> Iterator[_Block]:
        """The messages of which a run is made, in the order in which all ranks know them; of one rank, or of all."""
        limit = _MESSAGE_BYTES // self._specs[tensor].itemsize
        for block in self._blocks(tensor, start, stop):
            if rank in (None, block.rank):
                for box in _split(block.box, limit):
                    yield block._replace(box=box)

    def _blocks(self, tensor: int, start: int, stop: int) -> Iterator[_Block]:
        """What each rank holds of a run."""
        for within in rectangles(self._held[tensor].shape, start, stop):
            for box, holder in self._holders[tensor].items():
                if (shared := intersect(within, box)) is not None:
                    yield _Block(holder, within, shared)

    def _place(self, tensor: int, start: int, out: torch.Tensor, block: _Block) -> torch.Tensor:
        """Where a block goes in `out`, the elements of a tensor from `start` on."""
        first = sum(a * b for a, b in zip(block.within.start, strides_of(self._held[tensor].shape), strict=True))
        run = out[first - start : first - start + math.prod(block.within.shape)]
        return _part(run.view(block.within.shape), block.within.start, block.box)

    def _in_message(self, message: torch.Tensor, part: _Gathered) -> torch.Tensor:
        """Where a rank's message has a block."""
        shape = part.block.box.shape
        dtype = getattr(torch, self._specs[part.tensor].dtype)
        return message[part.at : part.at + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def _gpu(self) -> torch.device | None:
        """The one GPU on which everything is that this rank holds, if so."""
        devices = {each.local.device for each in self._held if each.local.numel()}
        (one,) = devices if len(devices) == 1 else (torch.device("cpu"),)
        return one if one.type == "cuda" else None

    def _hold(self, name: str, tensor: torch.Tensor) -> Held:
        """What this rank holds of one tensor of the state."""
        return held(name, tensor)

    def _boxes(self, mine: Sequence[Held]) -> list[list[Box | None]]:
        """For each tensor, what each rank holds of it."""
        width = max((len(each.shape) for each in mine), default=0)
        table = torch.zeros(len(mine), 1 + 2 * width, dtype=torch.int64)
        for row, each in zip(table, mine, strict=True):
            if each.box is not None:
                row[: 1 + 2 * len(each.shape)] = torch.tensor((1, *each.box.start, *each.box.shape))
        tables = [gathered.tolist() for gathered in self.ranks.gather(table)]
        return [[_box_in(rows[number], len(each.shape)) for rows in tables] for number, each in enumerate(mine)]


class FsdpPeftSource(FsdpSource):
    """An adapter of a module that PEFT has adapted and that is sharded over all ranks; see `sources.peft.PeftAdapter`.

    Collective, as is every method. Raises on all ranks what `weightwire.updates.adapter.check_adapter` does.
    """

    def __init__(self, module: torch.nn.Module, adapter: str | None = None, *, timeout: float = 600.0) -> None:
        # Found only in there, where an error on one rank becomes the same on all.
        self._find_adapter = functools.cache(lambda: PeftAdapter(module, adapter))
        super().__init__(module, timeout=timeout, state=lambda: self._find_adapter().tensors())
        try:
            self.metadata()
        except BaseException:
            self.ranks.close()
            raise
        self.release()

    def metadata(self) -> Sequence[TensorSpec]:
        """See `FsdpSource.metadata`."""
        specs = super().metadata()
        error: WeightwireError | None = None
        try:
            if self.aliases:
                tied, name = next(iter(self.aliases.items()))
                raise UnsupportedError(
                    f"{tied!r} and {name!r} are one tensor", next_step="Train an adapter without tied weights."
                )
            self.lora = self._find_adapter().config()
            check_adapter(specs, self.lora)
        except Exception as failed:
            error = _as_error(failed, "the adapter")
        self.ranks.agree(error)
        return specs


class Held(NamedTuple):
    """What this rank holds of one tensor: `local`, which is `box` of it; no box where it holds none of it.

    `shape` is that in which boxes are counted, on every rank the same: the tensor's, or another of as many elements.
    """

    spec: TensorSpec
    shape: tuple[int, ...]
    box: Box | None
    local: torch.Tensor

    def part(self, box: Box) -> torch.Tensor:
        """The view of a box within that which is held."""
        return _part(self.local, self.box.start if self.box else (), box)


class _Listing(msgspec.Struct):
    """Rank 0's view of the module, which all follow: an empty shard cannot tell that it is tied to another."""

    specs: list[TensorSpec]
    aliases: dict[str, str]


class _Block(NamedTuple):
    """One message: rank `rank` sends `box`, which lies in the contiguous part `within` of the tensor."""

    rank: int
    within: Box
    box: Box


class _Gathered(NamedTuple):
    """A block of a run that is gathered, `at` so many bytes in its rank's message."""

    tensor: int
    start: int
    out: torch.Tensor
    block: _Block
    at: int


def held_run(size: int, cuts: Sequence[tuple[int, int, int]]) -> tuple[int, int] | None:
    """Start and length of what is left of one dimension after it was sharded; None if that is not one run.

    Each cut is (ranks, our coordinate among them, split factor), from left to right. Chunks are those of `torch.chunk`.
    A split factor over 1 is FSDP2's `_StridedShard`: each of so many chunks is shared out, as tensor parallelism will
    cut once more.

    >>> held_run(10, [(4, 1, 1)]), held_run(10, [(4, 3, 1)]), held_run(2, [(4, 3, 1)])
    ((3, 3), (9, 1), (0, 0))
    >>> held_run(8, [(2, 1, 2), (2, 0, 1)]), held_run(8, [(2, 1, 2)])
    ((2, 2), None)
    """
    runs = [(0, size)]
    for ranks, coordinate, factor in cuts:
        runs = [run for i in range(factor) for run in _chunk(_chunk(runs, factor, i), ranks, coordinate)]
    if not runs:
        return 0, 0
    start, stop = runs[0][0], runs[-1][1]
    return (start, stop - start) if stop - start == sum(b - a for a, b in runs) else None


def holders(spec: TensorSpec, boxes: Sequence[Box | None], shape: Sequence[int] | None = None) -> dict[Box, int]:
    """The distinct boxes of a tensor and for each the first rank that holds it: of replicas, one is sent.

    `shape` is that in which boxes are counted, if it is not the tensor's. `UnsupportedError` unless together they are
    the whole tensor, each element once.

    >>> spec = TensorSpec(name="w", dtype="float32", shape=(4, 2))
    >>> holders(spec, [Box((0, 0), (2, 2)), Box((0, 0), (2, 2)), Box((2, 0), (2, 2)), None])
    {Box(start=(0, 0), shape=(2, 2)): 0, Box(start=(2, 0), shape=(2, 2)): 2}
    """
    first: dict[Box, int] = {}
    for rank, box in enumerate(boxes):
        if box is not None and all(box.shape):
            first.setdefault(box, rank)
    # However often a dimension is cut, the boxes are the cells of a grid: cuts of one dimension know nothing of others.
    cells = 1
    for dim, size in enumerate(spec.shape if shape is None else shape):
        sides = sorted({(box.start[dim], box.shape[dim]) for box in first})
        ends = [start + length for start, length in sides]
        cells *= len(sides) if [start for start, _ in sides] + [size] == [0, *ends] else 0
    if spec.numel and (not first or cells != len(first)):
        raise UnsupportedError(
            f"{spec.name!r} of shape {spec.shape} is not spread over the ranks in rectangles that make up the whole: "
            f"{[tuple(box) if box else None for box in boxes]}",
            next_step="Reshard it with Shard or Replicate, or publish a full state dict from one rank.",
        )
    return first


def held(name: str, tensor: torch.Tensor) -> Held:
    """What this rank holds of a DTensor, or of a plain tensor, which is all of it. `UnsupportedError` for a layout
    that is no rectangle."""
    spec = spec_of(name, tensor)
    if tensor.device.type == "meta":
        raise SourceError(f"{name!r} is on the meta device and has no data", next_step="Load the model first.")
    if not isinstance(tensor, DTensor):
        return Held(spec, spec.shape, Box((0,) * tensor.ndim, spec.shape), tensor.detach())
    local = tensor.to_local().detach()
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return Held(spec, spec.shape, None, local)
    cuts = _cuts(tensor, coordinate)
    runs = [held_run(size, cuts[dim]) for dim, size in enumerate(tensor.shape)] if cuts is not None else [None]
    known = [run for run in runs if run is not None]
    box = Box(tuple(start for start, _ in known), tuple(length for _, length in known))
    fits = box.shape == tuple(local.shape) or not (all(box.shape) or local.numel())
    if len(known) != len(runs) or not fits:
        mesh = tuple(tensor.device_mesh.shape)
        raise UnsupportedError(
            f"{name!r} of shape {spec.shape} has the layout {tensor.placements} over a mesh of {mesh}, here with "
            f"{tuple(local.shape)} elements; which part that is cannot be worked out",
            next_step="Reshard it with Shard or Replicate, or publish a full state dict from one rank.",
        )
    return Held(spec, spec.shape, box, local)


def _cuts(tensor: DTensor, coordinate: Sequence[int]) -> list[list[tuple[int, int, int]]] | None:
    """For each dimension the cuts that `held_run` takes; None for a placement that is no cut."""
    # torch from 2.10 on can note that mesh dimensions cut in another order than they are written in.
    for entry in getattr(tensor._spec, "shard_order", None) or ():
        if list(entry.mesh_dims) != sorted(entry.mesh_dims):
            return None
    cuts: list[list[tuple[int, int, int]]] = [[] for _ in tensor.shape]
    for mesh_dim, placement in enumerate(tensor.placements):
        # `_StridedShard` is private, and whether it is a kind of `Shard` depends on the version of torch.
        placed: Any = placement
        if placement.is_replicate():
            continue
        if placement.is_partial() or not hasattr(placed, "dim"):
            return None
        ranks = tensor.device_mesh.size(mesh_dim)
        cuts[placed.dim].append((ranks, coordinate[mesh_dim], getattr(placed, "split_factor", 1)))
    return cuts


def _chunk(runs: Sequence[tuple[int, int]], count: int, index: int) -> list[tuple[int, int]]:
    """Chunk `index` of the elements in `runs` (each start, stop), cut into `count` as `torch.chunk` does."""
    total = sum(stop - start for start, stop in runs)
    step = -(-total // count)
    first, last = index * step, (index + 1) * step
    taken: list[tuple[int, int]] = []
    for start, stop in runs:
        low, high = start + max(first, 0), min(start + last, stop)
        if low < high:
            taken.append((low, high))
        first, last = first - (stop - start), last - (stop - start)
    return taken


def _split(box: Box, limit: int) -> Iterator[Box]:
    """A box as boxes of at most `limit` elements, such that a box that is one run in memory gives runs."""
    if math.prod(box.shape) <= limit:
        yield box
        return
    dim = next(i for i, size in enumerate(box.shape) if size > 1)
    step = max(1, limit // math.prod(box.shape[dim + 1 :]))
    start, size = box.start[dim], box.shape[dim]
    for first in range(start, start + size, step):
        length = min(step, start + size - first)
        yield from _split(
            Box(
                (*box.start[:dim], first, *box.start[dim + 1 :]),
                (*box.shape[:dim], length, *box.shape[dim + 1 :]),
            ),
            limit,
        )


def _part(tensor: torch.Tensor, origin: Sequence[int], box: Box) -> torch.Tensor:
    """The view of `box` in a tensor whose first element lies at `origin`."""
    return tensor[tuple(slice(s - o, s - o + n) for s, o, n in zip(box.start, origin, box.shape, strict=True))]


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    # A contiguous tensor may have any strides where it has one element, and `view` would keep them.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _box_in(row: Sequence[int], ndim: int) -> Box | None:
    return Box(tuple(row[1 : 1 + ndim]), tuple(row[1 + ndim : 1 + 2 * ndim])) if row[0] else None


def _listing(mine: Mapping[str, Held]) -> _Listing:
    unique, aliases = without_aliases({name: each.local for name, each in mine.items()})
    return _Listing([mine[name].spec for name in unique], aliases)


def _difference(mine: Mapping[str, Held], listing: _Listing) -> WeightwireError | None:
    """Where this rank's module is not rank 0's."""
    for spec in listing.specs:
        here = mine[spec.name].spec if spec.name in mine else None
        if here != spec:
            return SourceError(
                f"{spec.name!r} is {_kind(here)} here and {_kind(spec)} on rank 0",
                next_step="Every rank must pass the same module; a pipeline's stages cannot be one source.",
            )
    known = {spec.name for spec in listing.specs} | listing.aliases.keys()
    for name in mine:
        if name not in known:
            return SourceError(
                f"{name!r} is not known on rank 0",
                next_step="Every rank must pass the same module; a pipeline's stages cannot be one source.",
            )
    return None


def _kind(spec: TensorSpec | None) -> str:
    return "missing" if spec is None else f"{spec.dtype} of shape {spec.shape}"


def _as_error(error: Exception, what: str) -> WeightwireError:
    if isinstance(error, WeightwireError):
        return error
    failed = SourceError(f"{what} could not be read: {type(error).__name__}: {error}")
    failed.__cause__ = error
    return failed
