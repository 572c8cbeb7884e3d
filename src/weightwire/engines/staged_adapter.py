"""An adapter on its way in: the part of staging one that engines have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weightwire.updates.manifest import TensorSpec

__all__ = ["StagedAdapter"]


class StagedAdapter:
    """Its tensors whole, by name, in host memory. Whoever derives from it puts the digest of what the engine then holds
    into `_held`. See `target.AdapterStaging`."""

    takes = None

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._specs = specs
        self._tensors: dict[str, torch.Tensor] = {}
        self._held = ""

    def write(self, tensor: int, start: int, data: torch.Tensor) -> None:
        spec = self._specs[tensor]
        if spec.name not in self._tensors:
            self._tensors[spec.name] = torch.empty(spec.shape, dtype=data.dtype)
        self._tensors[spec.name].view(-1)[start : start + data.numel()].copy_(data)

    def lend(self, tensor: int, data: torch.Tensor) -> None:
        self.write(tensor, 0, data.reshape(-1))

    def commit(self) -> None:
        pass  # it is in the engine since `check`

    def held(self) -> str:
        return self._held

    def discard(self) -> None:
        self._tensors = {}
