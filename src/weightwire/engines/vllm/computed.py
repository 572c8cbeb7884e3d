"""Parameters that a model's loader computes: out of several tensors, or by more than slicing, casting and copying.

What such a loader does is not written down and replayed but done again: the tensors that it needs are kept whole as
they arrive, and once all are there it is run on them, on the twin, with staged memory in the place of the parameters
that it fills. What comes out is staged like all else. The loader sees what it sees when an engine starts: tensors on
the host, parameters on the engine's device. So it computes the same, bit for bit. Only torch's default dtype is
another, which is the whole process's; vLLM's loaders do not go by it.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from weightwire.errors import BusyError, UnsupportedError
from weightwire.updates.manifest import Manifest, TensorSpec

__all__ = ["Group", "Ingredients", "batched", "bytes_of", "groups_of", "in_turn", "named", "standing_in"]

Allocate = Callable[[str], torch.Tensor]
_BATCH_BYTES = 64 << 20  # a loader goes through all of the model each time it is run
_running: WeakKeyDictionary[torch.nn.Module, threading.Lock] = WeakKeyDictionary()


@contextlib.contextmanager
def in_turn(twin: torch.nn.Module, seconds: float = -1) -> Iterator[None]:
    """Who runs a twin's loader does it in here: an update may begin while one that was aborted still runs it. With
    `seconds`, as on the thread that generates, `BusyError` when others are in here for longer."""
    running = _running.setdefault(twin, threading.Lock())
    if not running.acquire(timeout=seconds):
        raise BusyError("the loader of an update that was aborted is still running", next_step="Publish again.")
    try:
        yield
    finally:
        running.release()


class Group(NamedTuple):
    """These parameters are computed from these tensors (by their numbers), and from no others; nor is any other
    parameter from one of them."""

    parameters: tuple[str, ...]
    tensors: tuple[int, ...]


def groups_of(needs: Mapping[str, Collection[int]]) -> list[Group]:
    """The smallest ones of parameters that are computed from these tensors, in the order of their last tensors.

    >>> groups_of({"a": {3}, "b": {0, 1}, "c": {1, 2}})
    [Group(parameters=('b', 'c'), tensors=(0, 1, 2)), Group(parameters=('a',), tensors=(3,))]
    """
    found: list[tuple[set[str], set[int]]] = []
    for parameter, needed in needs.items():
        names, tensors = {parameter}, set(needed)
        for other in [group for group in found if group[1] & tensors]:
            found.remove(other)
            names, tensors = names | other[0], tensors | other[1]
        found.append((names, tensors))
    groups = [Group(tuple(sorted(names)), tuple(sorted(tensors))) for names, tensors in found]
    return sorted(groups, key=lambda group: max(group.tensors))


def bytes_of(groups: Sequence[Group], specs: Sequence[TensorSpec]) -> int:
    """What their tensors take, which no two share."""
    return sum(specs[number].nbytes for group in groups for number in group.tensors)


def batched(groups: Sequence[Group], specs: Sequence[TensorSpec]) -> list[Group]:
    """The same with small groups joined, so that a loader is not run for every vector of a model."""
    joined: list[Group] = []
    size = _BATCH_BYTES
    for group in groups:
        nbytes = bytes_of([group], specs)
        if size + nbytes < _BATCH_BYTES:
            last = joined.pop()
            group = Group(last.parameters + group.parameters, tuple(sorted(last.tensors + group.tensors)))
            nbytes += size
        joined.append(group)
        size = nbytes
    return joined


def named(manifest: Manifest) -> list[tuple[str, int]]:
    """What a loader is given, in this order: each name, aliases too, and the number of its tensor."""
    numbers = {spec.name: number for number, spec in enumerate(manifest.tensors)}
    return [*numbers.items(), *((alias, numbers[name]) for alias, name in manifest.aliases.items())]


class Ingredients:
    """The tensors of an update that parameters are computed from, on the host until their loader has run. Where there
    are groups there is a twin."""

    def __init__(self, twin: torch.nn.Module | None, manifest: Manifest, groups: Sequence[Group]) -> None:
        self._twin, self._manifest = twin, manifest
        self._group = {number: group for group in groups for number in group.tensors}
        self._tensors: dict[int, torch.Tensor] = {}
        self._missing = Counter({group: sum(self._specs[n].numel for n in group.tensors) for group in groups})
        self.parameters = [name for group in groups for name in group.parameters]
        self.nbytes = bytes_of(groups, self._specs)
        """Bytes on the host, if all are there before the first loader runs."""

    @property
    def _specs(self) -> Sequence[TensorSpec]:
        return self._manifest.tensors

    def __contains__(self, tensor: int) -> bool:
        return tensor in self._group

    def write(self, tensor: int, start: int, data: torch.Tensor, allocate: Allocate) -> Sequence[str]:
        """As `target.Staging.write`. Gives the parameters that are staged by now because of it, in the memory that
        `allocate` gives for a name. Raises `UnsupportedError` when their loader fails."""
        if tensor not in self._group:
            return ()
        self._kept(tensor).view(-1)[start : start + data.numel()].copy_(data)
        group = self._group[tensor]
        self._missing[group] -= data.numel()
        if self._missing[group]:
            return ()
        self._load(group, allocate)
        return group.parameters

    def discard(self) -> None:
        self._tensors.clear()

    def _kept(self, tensor: int) -> torch.Tensor:
        if tensor not in self._tensors:
            spec = self._specs[tensor]
            self._tensors[tensor] = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
        return self._tensors[tensor]

    def _load(self, group: Group, allocate: Allocate) -> None:
        arrived = {number: self._kept(number) for number in group.tensors}
        for number in group.tensors:
            del self._tensors[number]
        weights = [(name, arrived[number]) for name, number in named(self._manifest) if number in arrived]
        staged = {name: allocate(name) for name in group.parameters}
        twin: Any = self._twin
        try:
            with in_turn(twin), standing_in(twin, staged), torch.no_grad():
                twin.load_weights(iter(weights))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UnsupportedError(
                f"the model's own loader failed to make {', '.join(group.parameters[:5])}: {error!r:.300}",
                next_step="Nothing was changed. This architecture cannot be updated exactly yet.",
            ) from error


@contextlib.contextmanager
def standing_in(twin: torch.nn.Module, staged: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Meanwhile these parameters of the twin have this memory. All of them that are one tensor stay one."""
    instead: dict[int, torch.nn.Parameter] = {}
    for name, shadow in twin.named_parameters():
        if name in staged:
            # Of the class and with the attributes, its loader among them, that vLLM gave to the empty one.
            other = torch.nn.Parameter(staged[name], requires_grad=False)
            other.__class__ = type(shadow)
            other.__dict__.update(shadow.__dict__)
            instead[id(shadow)] = other
    places = [
        (module, own, parameter)
        for module in twin.modules()
        for own, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in instead
    ]
    try:
        for module, own, parameter in places:
            module._parameters[own] = instead[id(parameter)]
        yield
    finally:
        for module, own, parameter in places:
            module._parameters[own] = parameter
