"""How a copy plan is recorded: by running the model's `load_weights` once, on the twin from `skeleton`.

It is given meta tensors of the announced shapes, under a dispatch mode that notes every `copy_` from an incoming tensor
into a parameter, and follows each tensor through whatever else is done to it. So the loaders themselves say what they
do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import msgspec
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from weightwire.engines.vllm.computed import Group, batched, groups_of, in_turn, named, standing_in
from weightwire.engines.vllm.copy_plan import Copy, Fill, Plan, Run
from weightwire.errors import MissingTensor, ShapeMismatch, UnknownTensor, UnsupportedError, WeightwireError
from weightwire.updates.boxes import Box, strides_of
from weightwire.updates.manifest import Manifest, TensorSpec

__all__ = ["record"]

_WAIT_SECONDS = 0.05  # on the thread that generates


def record(twin: torch.nn.Module, manifest: Manifest) -> Plan:
    """The plan for a manifest, or the error that says why there is none. Touches nothing but the twin."""
    with in_turn(twin, _WAIT_SECONDS):
        recorder = _recorded(twin, manifest)
        recorder.finish()
        plan = recorder.plan
        for group in plan.computed:
            _refuse_entangled(twin, manifest, group, recorder)
        plan.runs = _runs(plan, manifest.tensors)
    return plan


def _recorded(twin: torch.nn.Module, manifest: Manifest) -> _Recorder:
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
    except WeightwireError:
        raise
    except Exception as error:
        raise _explain(error, current[0], recorder) from error
    return recorder


def _refuse_entangled(twin: torch.nn.Module, manifest: Manifest, group: Group, whole: _Recorder) -> None:
    """Raise unless a loader that is given only what the parameters of a group are computed from fills them as it does
    when it is given everything."""
    specs = tuple(manifest.tensors[number] for number in group.tensors)
    aliases = {a: n for a, n in manifest.aliases.items() if n in {spec.name for spec in specs}}
    # In other parameters' place, as it will be run: what it writes to those that it has taken along is not seen here.
    own = {name: whole.plan.parameters[name] for name in group.parameters}
    others = {name: torch.empty(each.shape, dtype=each.dtype, device="meta") for name, each in own.items()}
    try:
        with standing_in(twin, others):
            apart = _recorded(twin, msgspec.structs.replace(manifest, tensors=specs, aliases=aliases))
    except WeightwireError as error:
        raise UnsupportedError(f"{_some(group.parameters)} cannot be loaded without the rest: {error}") from error
    if unlike := [name for name in group.parameters if apart.how(name) != whole.how(name)]:
        raise UnsupportedError(
            f"{_some(unlike)} is loaded otherwise with the rest than without it",
            next_step="This architecture cannot be updated exactly yet.",
        )


def _runs(plan: Plan, specs: Sequence[TensorSpec]) -> dict[str, list[Run]]:
    found: dict[str, set[Run]] = defaultdict(set)
    others = set(plan.fills)
    for number, (spec, copies) in enumerate(zip(specs, plan.copies, strict=True)):
        for copy in copies:
            if copy.is_run(spec.shape) and getattr(torch, spec.dtype) == plan.parameters[copy.parameter].dtype:
                found[copy.parameter].add(Run(copy.offset, spec.numel, number))
            else:
                others.add(copy.parameter)
    ordered = {name: sorted(runs) for name, runs in found.items() if name not in others}
    return {name: runs for name, runs in ordered.items() if _fills_up(runs, plan.parameters[name].numel())}


def _fills_up(runs: Sequence[Run], numel: int) -> bool:
    ends = [run.offset + run.numel for run in runs]
    return [run.offset for run in runs] == [0, *ends[:-1]] and ends[-1] == numel


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows incoming tensors, by their storages. `written` has the regions of each parameter that were set."""

    def __init__(self, twin: torch.nn.Module, manifest: Manifest) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.manifest = manifest
        self.plan = Plan([[] for _ in manifest.tensors], parameters=dict(twin.named_parameters()))
        self.incoming: dict[str, torch.Tensor] = {}
        self.written: dict[str, set[tuple[int, tuple[int, ...], tuple[int, ...]]]] = defaultdict(set)
        self._parameters = {_storage(parameter): name for name, parameter in self.plan.parameters.items()}
        self._tensors: dict[int, int] = {}  # of which all elements are at their places
        self._made_of: dict[int, frozenset[tuple[int, Box]]] = defaultdict(frozenset)
        # The shapes of those that hold all of what they are made of.
        self._images: dict[int, tuple[int, ...] | None] = {}
        self._computed: dict[str, str] = {}
        self._keep: list[torch.Tensor] = []  # a storage's address names it only while it lives
        for name, number in named(manifest):
            spec = manifest.tensors[number]
            tensor = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")
            self.incoming[name] = tensor
            self._made(tensor, frozenset({(number, _whole(spec.shape))}))
            self._tensors[_storage(tensor)] = number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given, made = _tensors_in((args, *kwargs.values())), _tensors_in(result)
        changed = _changed(func, args, kwargs)
        if changed or not {_storage(tensor) for tensor in made} <= {_storage(tensor) for tensor in given}:
            self._note_use(func, given, made, changed)  # it is no view
        for target in changed:
            parameter = self._parameters.get(_storage(target))
            if parameter is not None:
                self._note_write(func, args, parameter, target)
            self._tensors.pop(_storage(target), None)
        return result

    def _note_use(
        self, func: Any, given: list[torch.Tensor], made: list[torch.Tensor], changed: list[torch.Tensor]
    ) -> None:
        known, targets = {_storage(tensor) for tensor in given}, {_storage(tensor) for tensor in changed}
        read = [tensor for tensor in given if func not in _OVERWRITES or _storage(tensor) not in targets]
        sources = _NOTHING.union(*(self._parts_of(tensor) for tensor in read))
        for storage in targets:
            self._made_of[storage] |= sources
        for tensor in made:
            if _storage(tensor) not in known:
                self._made(tensor, sources)
        if func in _CASTS and self._cast(given[0], made[0]):
            return
        for tensor in read:
            if (parameter := self._parameters.get(_storage(tensor))) is not None:
                self._computed.setdefault(parameter, "its loader reads it")

    def _made(self, tensor: torch.Tensor, sources: frozenset[tuple[int, Box]]) -> None:
        storage, ordered = _storage(tensor), _ordered(tensor)
        self._keep.append(tensor)
        self._tensors.pop(storage, None)
        self._made_of[storage] = sources
        numel = sum(self.manifest.tensors[number].numel for number in {number for number, _ in sources})
        is_image = numel == tensor.numel() and ordered.is_contiguous()
        self._images[storage] = tuple(ordered.shape) if is_image else None

    def _parts_of(self, tensor: torch.Tensor) -> frozenset[tuple[int, Box]]:
        """The parts of incoming tensors that are used where this one is. Of one that is as large as all that it was
        made of, a part is taken for as much of each of them; such boxes count elements in a row."""
        storage, view = _storage(tensor), _ordered(tensor)
        if (number := self._tensors.get(storage)) is not None:
            shape = self.manifest.tensors[number].shape
            return frozenset({(number, _box(shape, view) or _whole(shape))})
        made_of, image = self._made_of[storage], self._images.get(storage)
        box = None if image is None else _box(image, view)
        if image is None or box is None or box.shape == image:
            return made_of
        first = sum(at * stride for at, stride in zip(box.start, strides_of(image), strict=True))
        numels = {number: self.manifest.tensors[number].numel for number, _ in made_of}
        share = [(number, -(-numel * _count(box.shape) // _count(image))) for number, numel in numels.items()]
        return frozenset((number, Box((first,), (count,))) for number, count in share)

    def _cast(self, source: torch.Tensor, result: torch.Tensor) -> bool:
        # A cast of a whole tensor has the same elements at the same places; of anything else we no longer know.
        number = self._tensors.get(_storage(source))
        if number is None or not self._holds(source, number):
            return False
        if source.numel() != self.manifest.tensors[number].numel or not source.is_contiguous():
            return False
        self._tensors[_storage(result)] = number
        return True

    def _holds(self, cast: torch.Tensor, number: int) -> bool:
        """Whether no element of a tensor was rounded by casts to this one's dtype."""
        dtype = getattr(torch, self.manifest.tensors[number].dtype)
        return torch.promote_types(dtype, cast.dtype) == cast.dtype

    def _note_write(self, func: Any, args: Any, parameter: str, target: torch.Tensor) -> None:
        shape, strides = tuple(target.shape), tuple(target.stride())
        if func in _OVERWRITES and target.numel():
            self.written[parameter].add((int(target.storage_offset()), shape, strides))
        if func is torch.ops.aten.copy_.default:
            self._copied(parameter, target, args[1])
        elif func not in _OVERWRITES:
            self._computed[parameter] = str(func)
        elif target.numel():
            value = 0.0 if len(args) < 2 else float(args[1])
            self.plan.fills[parameter].append(Fill(value, int(target.storage_offset()), shape, strides))
            self.plan.covered[parameter] += target.numel()

    def _copied(self, parameter: str, target: torch.Tensor, source: torch.Tensor) -> None:
        number = self._tensors.get(_storage(source))
        if number is None or not (source.dtype == target.dtype or self._holds(source, number)):
            self._computed[parameter] = "a copy of something computed"
            return
        box = _box(self.manifest.tensors[number].shape, source)
        if box is None:
            self._computed[parameter] = f"a rearrangement of {self.manifest.tensors[number].name}"
            return
        strides = _spread(self.manifest.tensors[number].shape, source, target)
        self.plan.copies[number].append(Copy(box, parameter, int(target.storage_offset()), strides))
        self.plan.covered[parameter] += target.numel()

    def how(self, parameter: str) -> object:
        """What was seen of a loader's work on a parameter."""
        return self.written[parameter], self._computed.get(parameter)

    def finish(self) -> None:
        """Settle what is computed. Every tensor went somewhere, and every parameter was filled."""
        self._set_computed_apart()
        plan, specs = self.plan, self.manifest.tensors
        unused = [s.name for n, s in enumerate(specs) if not plan.copies[n] and n not in plan.reads]
        if unused:
            raise UnknownTensor(
                f"the engine has no place for {_some(unused)}",
                next_step="Leave it out. A tied output head is sent once, as the input embedding."
                + (" What is loaded together is sent together." if self.manifest.partial else ""),
            )
        missing = [name for name, parameter in plan.parameters.items() if plan.covered[name] < parameter.numel()]
        if missing and not self.manifest.partial:
            raise MissingTensor(
                f"nothing was sent for {_some(missing)}",
                next_step="Send every parameter of the model, or publish with partial=True.",
            )

    def _set_computed_apart(self) -> None:
        plan, specs = self.plan, self.manifest.tensors
        parts = {name: self._made_of[storage] for storage, name in self._parameters.items() if name in self._computed}
        needs = {name: {number for number, _ in made_of} for name, made_of in parts.items()}
        for name, why in self._computed.items():
            numel = plan.parameters[name].numel()
            plan.covered[name] = _union(self.written[name], numel)
            some = plan.covered[name] < numel
            if not needs[name] or (some and why.startswith("aten")):
                raise UnsupportedError(
                    f"the loader of {name} does more than can be followed ({why})",
                    next_step="This architecture cannot be updated exactly yet.",
                )
            if some and self.manifest.partial:
                sent = [specs[number].name for number in sorted(needs[name])]
                raise UnsupportedError(
                    f"{name} is computed from more than was sent, which is {_some(sent)}",
                    next_step="Send all that it is computed from.",
                )
        plan.copies = [[copy for copy in copies if copy.parameter not in needs] for copies in plan.copies]
        plan.computed = batched(groups_of(needs), specs)
        for number, box in sorted(_NOTHING.union(*parts.values())):
            plan.reads.setdefault(number, []).append(box)


_NOTHING: frozenset[tuple[int, Box]] = frozenset()
_FILLS = {torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default}
_OVERWRITES = {torch.ops.aten.copy_.default, *_FILLS}
_CASTS = {torch.ops.aten._to_copy.default, torch.ops.aten.clone.default}


def _tensors_in(values: Any) -> list[torch.Tensor]:
    # Of torch's own function, which is for deeper things, half of the time would go into this.
    if isinstance(values, torch.Tensor):
        return [values]
    return [tensor for value in values for tensor in _tensors_in(value)] if isinstance(values, (tuple, list)) else []


def _changed(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Those that an operation writes to."""
    if not func._schema.is_mutable:
        return []
    values = [kwargs.get(a.name, args[k] if k < len(args) else None) for k, a in enumerate(func._schema.arguments)]
    pairs = zip(func._schema.arguments, values, strict=True)
    return _tensors_in([value for argument, value in pairs if argument.alias_info and argument.alias_info.is_write])


def _explain(error: Exception, name: str, recorder: _Recorder) -> WeightwireError:
    # A loader refuses a wrong shape with an assertion or a runtime error, and an unknown name with the others.
    text = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
    if isinstance(error, (KeyError, ValueError, AttributeError)):
        return UnknownTensor(f"the engine has no place for {name}: {text}")
    if isinstance(error, RuntimeError) and "meta tensor" in text:
        return UnsupportedError(
            f"the loader of {name} looks at its elements: {text}",
            next_step="This architecture cannot be updated exactly yet.",
        )
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


def _ordered(view: torch.Tensor) -> torch.Tensor:
    """The same with its dimensions in the order in which they lie in memory."""
    strides = view.stride()
    order = sorted(range(len(strides)), key=lambda dimension: -strides[dimension])
    return view if order == [*range(len(strides))] else view.permute(order)


def _whole(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape)


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


def _union(regions: Collection[tuple[int, tuple[int, ...], tuple[int, ...]]], numel: int) -> int:
    """How many elements of a parameter lie in any of these."""
    if len(regions) < 2:
        return sum(_count(shape) for _, shape, _ in regions)
    seen = torch.zeros(numel, dtype=torch.bool)
    for offset, shape, strides in regions:
        seen.as_strided(shape, strides, offset).fill_(True)
    return int(seen.sum())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
