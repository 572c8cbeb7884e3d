"""What of a model is filled by one tensor of a checkpoint, for updates whose tensors are not known beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from weightwire.engines.vllm import recording, skeleton
from weightwire.errors import ShapeMismatch
from weightwire.updates.boxes import Box
from weightwire.updates.manifest import Manifest, TensorSpec

__all__ = ["Places", "alone"]


class Places:
    """Which parameters of the model each tensor of a checkpoint fills on this rank, asked of vLLM's own loader one
    tensor at a time, and once for each."""

    def __init__(self, vllm_config: Any) -> None:
        self._twin = skeleton.build(vllm_config)
        self._wanted = {name: parameter.numel() for name, parameter in self._twin.named_parameters()}
        self._known: dict[TensorSpec, tuple[list[Box], Mapping[str, int]]] = {}

    def of(self, spec: TensorSpec) -> list[Box]:
        """The parts of it that go anywhere here. Raises `UnknownTensor` or `ShapeMismatch`."""
        if spec not in self._known:
            plan = recording.record(self._twin, alone(spec))
            self._refuse_kind(spec, plan.covered)
            self._known[spec] = plan.takes[0], dict(plan.covered)
        return self._known[spec][0]

    def missing(self, specs: Sequence[TensorSpec]) -> list[str]:
        """The parameters that these do not fill."""
        left = dict(self._wanted)
        for spec in specs:
            for name, count in self._known[spec][1].items():
                left[name] -= count
        return [name for name, count in left.items() if count > 0]

    def _refuse_kind(self, spec: TensorSpec, parameters: Mapping[str, int]) -> None:
        for name in parameters:
            dtype = self._twin.get_parameter(name).dtype
            if dtype.is_floating_point != getattr(torch, spec.dtype).is_floating_point:
                raise ShapeMismatch(f"{spec.name} is {spec.dtype}, and {name} of the engine is {dtype}")


def alone(spec: TensorSpec) -> Manifest:
    """A manifest of one tensor, to ask about it."""
    return Manifest(version=0, tensors=(spec,), partial=True)
