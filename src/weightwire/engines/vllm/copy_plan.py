"""The copy plan: for each tensor of a checkpoint, the slices of live parameters its elements go to.

`recording` makes it. Where a loader does more than slice, cast and copy, the plan says which tensors a parameter is
computed from, by whatever operations, so that the loader can be run on these alone (`computed`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from weightwire.engines.vllm.computed import Group
from weightwire.updates.boxes import Box, Part, intersect, rectangles, strides_of
from weightwire.updates.manifest import TensorSpec

__all__ = ["Copy", "Fill", "Place", "Plan", "Run"]


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
    of each parameter that is nothing but whole tensors laid end to end, bit for bit, in this order. Parameters in
    `computed` have no copies; `reads` says which parts of tensors are used for them."""

    copies: list[list[Copy]]
    fills: dict[str, list[Fill]] = field(default_factory=lambda: defaultdict(list))
    covered: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    runs: dict[str, list[Run]] = field(default_factory=dict)
    computed: list[Group] = field(default_factory=list)
    reads: dict[int, list[Box]] = field(default_factory=dict)
    parameters: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    """The twin's own, by name, which have shapes and dtypes and no memory."""
    _takes_all: bool | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def takes(self) -> list[list[Box]]:
        """Which parts of each tensor go anywhere (`target.Staging.takes`)."""
        return [
            [*self.reads.get(number, ()), *(copy.source for copy in copies)]
            for number, copies in enumerate(self.copies)
        ]

    def takes_of(self, specs: Sequence[TensorSpec]) -> list[list[Box]] | None:
        """The same, of the tensors that it was made for; None where that is all of each, as it mostly is on one rank:
        it would be said, and read again, by hundreds of boxes."""
        if self._takes_all is None:
            boxes = zip(specs, self.takes, strict=True)
            self._takes_all = all(Part.whole(spec.shape).box in taken for spec, taken in boxes)
        return None if self._takes_all else self.takes

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
