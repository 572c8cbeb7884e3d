"""The copy plan: for each tensor of a checkpoint, the slices of live parameters its elements go to.

It is recorded by running the model's `load_weights` once, on the twin from `skeleton`, with meta tensors of the
announced shapes, under a dispatch mode that notes every `copy_` from an incoming tensor into a parameter. So the
loaders themselves say what they do; what does more than view, cast and copy is noticed and refused by name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from weightwire.errors import ManifestError, MissingTensor, ShapeMismatch, UnknownTensor, UnsupportedError
from weightwire.updates.boxes import Box, intersect, rectangles, strides_of
from weightwire.updates.manifest import Manifest, TensorSpec

__all__ = ["Copy", "Fill", "Place", "Plan", "Run", "record"]


class Copy(NamedTuple):
    """The box `source` of a checkpoint tensor goes to `parameter`, from element `offset` on with these strides."""

    source: Box
    parameter: str
    offset: int
    strides: tuple[int, ...]

    def is_run(self, shape: Sequence[int]) -> bool:
        """Whether it lays a whole tensor of this shape end to end."""
        ordered = all(n == 1 or a == b for n, a, b in zip(shape, self.strides, strides_of(shape), strict=True))
        return ordered and self.source.shape == tuple(shape)


class Run(NamedTuple):
    """The whole of tensor number `tensor`, in elements `offset .. offset + numel` of a parameter."""

    offset: int
    numel: int
    tensor: int


class Place(NamedTuple):
    """A rectangle of `shape` that lies from element `first` on, with `strides`, in what arrived, and goes to
    `parameter`, from element `second` on, with strides `steps`."""

    parameter: str
    shape: tuple[int, ...]
    first: int
    strides: tuple[int, ...]
    second: int
    steps: tuple[int, ...]


class Fill(NamedTuple):
    """A constant that the loader puts beside what it loads (vocabulary padding)."""

    value: float
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(slots=True)
class Plan:
    """`copies[t]` for tensor number t of the manifest; `fills` and `covered` (elements written) by parameter; `runs`
    of each parameter that is nothing but whole tensors laid end to end, bit for bit, in this order."""

    copies: list[list[Copy]]
    fills: dict[str, list[Fill]] = field(default_factory=lambda: defaultdict(list))
    covered: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    runs: dict[str, list[Run]] = field(default_factory=dict)

    @property
    def takes(self) -> list[list[Box]]:
        """Which parts of each tensor go anywhere (`target.Staging.takes`)."""
        return [[copy.source for copy in copies] for copies in self.copies]

    def places(self, spec: TensorSpec, number: int, start: int, count: int) -> Iterator[Place]:
        """Where elements `start .. start + count` (row-major) of a tensor go, given as one run of elements."""
        strides = strides_of(spec.shape)
        for run in rectangles(spec.shape, start, start + count):
            for copy in self.copies[number]:
                part = intersect(run, copy.source)
                if part is None:
                    continue
                first = sum(p * s for p, s in zip(part.start, strides, strict=True)) - start
                second = copy.offset + sum(
                    (p - c) * s for p, c, s in zip(part.start, copy.source.start, copy.strides, strict=True)
                )
                yield Place(copy.parameter, part.shape, first, strides, second, copy.strides)

    def write(
        self, spec: TensorSpec, number: int, start: int, data: torch.Tensor, staged: Mapping[str, torch.Tensor]
    ) -> dict[str, int]:
        """Put elements `start ..` of a tensor (1-D `data`) where they belong in contiguous parameters; gives how many
        each parameter got."""
        written: dict[str, int] = defaultdict(int)
        for place in self.places(spec, number, start, data.numel()):
            source = data.as_strided(place.shape, place.strides, data.storage_offset() + place.first)
            target = staged[place.parameter]
            target.as_strided(place.shape, place.steps, target.storage_offset() + place.second).copy_(source)
            written[place.parameter] += source.numel()
        return written


def record(twin: torch.nn.Module, manifest: Manifest) -> Plan:
    """The plan for a manifest, or the error that says why there is none. Touches nothing but the twin."""
    recorder = _Recorder(twin, manifest)
    current = [""]

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in recorder.incoming.items():
            current[0] = name
            yield name, tensor

    load = twin.load_weights
    try:
        with recorder, torch.no_grad():
            load(weights())  # type: ignore[operator]
    except ManifestError:
        raise
    except Exception as error:
        raise _explain(error, current[0], recorder) from error
    recorder.check()
    recorder.plan.runs = _runs(recorder.plan, manifest.tensors, dict(twin.named_parameters()))
    return recorder.plan


def _runs(plan: Plan, specs: Sequence[TensorSpec], parameters: Mapping[str, torch.Tensor]) -> dict[str, list[Run]]:
    found: dict[str, set[Run]] = defaultdict(set)
    others = set(plan.fills)
    for number, (spec, copies) in enumerate(zip(specs, plan.copies, strict=True)):
        for copy in copies:
            if copy.is_run(spec.shape) and getattr(torch, spec.dtype) == parameters[copy.parameter].dtype:
                found[copy.parameter].add(Run(copy.offset, spec.numel, number))
            else:
                others.add(copy.parameter)
    ordered = {name: sorted(runs) for name, runs in found.items() if name not in others}
    return {name: runs for name, runs in ordered.items() if _fills_up(runs, parameters[name].numel())}


def _fills_up(runs: Sequence[Run], numel: int) -> bool:
    ends = [run.offset + run.numel for run in runs]
    return [run.offset for run in runs] == [0, *ends[:-1]] and ends[-1] == numel


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, twin: torch.nn.Module, manifest: Manifest) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.manifest = manifest
        self.plan = Plan([[] for _ in manifest.tensors])
        self.incoming: dict[str, torch.Tensor] = {}
        self._parameters: dict[int, str] = {}
        self._tensors: dict[int, int] = {}
        self._computed: dict[str, str] = {}
        self._keep: list[torch.Tensor] = []  # a storage's address names it only while it lives
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, parameter in twin.named_parameters():
            self._parameters[_storage(parameter)] = name
            self.shapes[name] = tuple(parameter.shape)
        numbers = {spec.name: number for number, spec in enumerate(manifest.tensors)}
        for name, number in [*numbers.items(), *((a, numbers[n]) for a, n in manifest.aliases.items())]:
            spec = manifest.tensors[number]
            tensor = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")
            self.incoming[name] = tensor
            self._tensors[_storage(tensor)] = number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        target = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if target is None:
            return result
        parameter = self._parameters.get(_storage(target))
        if func is torch.ops.aten.copy_.default:
            if parameter is not None:
                self._copied(parameter, target, args[1])
        elif func in _FILLS:
            if parameter is not None and target.numel():
                value = 0.0 if len(args) < 2 else float(args[1])
                shape, strides = tuple(target.shape), target.stride()
                self.plan.fills[parameter].append(Fill(value, int(target.storage_offset()), shape, strides))
                self.plan.covered[parameter] += target.numel()
        elif func in _CASTS:
            self._cast(target, result)
        elif parameter is not None and func._schema.is_mutable:
            self._computed[parameter] = str(func)
        return result

    def _cast(self, source: torch.Tensor, result: torch.Tensor) -> None:
        # A cast of a whole tensor has the same elements at the same places; of anything else we no longer know.
        number = self._tensors.get(_storage(source))
        if number is not None and source.numel() == self.manifest.tensors[number].numel and source.is_contiguous():
            self._tensors[_storage(result)] = number
            self._keep.append(result)

    def _copied(self, parameter: str, target: torch.Tensor, source: torch.Tensor) -> None:
        number = self._tensors.get(_storage(source))
        if number is None:
            self._computed[parameter] = "a copy of something computed"
            return
        box = _box(self.manifest.tensors[number].shape, source)
        if box is None:
            self._computed[parameter] = f"a rearrangement of {self.manifest.tensors[number].name}"
            return
        strides = _spread(self.manifest.tensors[number].shape, source, target)
        self.plan.copies[number].append(Copy(box, parameter, int(target.storage_offset()), strides))
        self.plan.covered[parameter] += target.numel()

    def check(self) -> None:
        """Every tensor went somewhere, and every parameter was filled by copies alone."""
        if self._computed:
            what = "; ".join(f"{name}: {why}" for name, why in list(self._computed.items())[:3])
            raise UnsupportedError(
                f"the loader of {len(self._computed)} parameters does more than copy ({what})",
                next_step="This architecture cannot be updated exactly yet.",
            )
        unused = [s.name for s, copies in zip(self.manifest.tensors, self.plan.copies, strict=True) if not copies]
        if unused:
            raise UnknownTensor(
                f"the engine has no place for {_some(unused)}",
                next_step="Leave it out. A tied output head is sent once, as the input embedding.",
            )
        missing = [n for n, shape in self.shapes.items() if self.plan.covered[n] < _count(shape)]
        if missing and not self.manifest.partial:
            raise MissingTensor(
                f"nothing was sent for {_some(missing)}",
                next_step="Send every parameter of the model, or publish with partial=True.",
            )


_FILLS = {torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default}
_CASTS = {torch.ops.aten._to_copy.default, torch.ops.aten.clone.default}


def _explain(error: Exception, name: str, recorder: _Recorder) -> ManifestError:
    # A loader refuses a wrong shape with an assertion or a runtime error, and an unknown name with the others.
    text = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
    if isinstance(error, (KeyError, ValueError, AttributeError)):
        return UnknownTensor(f"the engine has no place for {name}: {text}")
    shape = tuple(recorder.incoming[name].shape) if name in recorder.incoming else ()
    return ShapeMismatch(f"{name} with shape {shape} does not fit: {text}")


def _box(shape: tuple[int, ...], view: torch.Tensor) -> Box | None:
    """The box of a contiguous tensor of `shape` that `view` shows, or None when it shows something else."""
    if not shape:
        return Box((), ())
    full = strides_of(shape)
    start, offset = [], view.storage_offset()
    for stride in full:
        start.append(offset // stride)
        offset %= stride
    extent = [1] * len(shape)
    dimension = 0
    for size, stride in zip(view.shape, view.stride(), strict=True):
        if size == 1:
            continue
        while dimension < len(shape) and (full[dimension] != stride or shape[dimension] == 1):
            dimension += 1
        if dimension == len(shape):
            return None
        extent[dimension] = size
        dimension += 1
    fits = all(s + e <= n for s, e, n in zip(start, extent, shape, strict=True))
    return Box(tuple(start), tuple(extent)) if fits else None


def _spread(shape: tuple[int, ...], source: torch.Tensor, target: torch.Tensor) -> tuple[int, ...]:
    """The target's strides along the dimensions of the source's full tensor."""
    if target.shape != source.shape:
        target = target.expand(source.shape)
    full = strides_of(shape)
    strides = [0] * len(shape)
    dimension = 0
    for size, stride, step in zip(source.shape, source.stride(), target.stride(), strict=True):
        if size == 1:
            continue
        while full[dimension] != stride or shape[dimension] == 1:
            dimension += 1
        strides[dimension] = step
        dimension += 1
    return tuple(strides)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
