"""Small models and weights for them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["same", "snapshot", "tiny", "weights_for"]


def tiny(dtype: torch.dtype = torch.float32, *, width: int = 16, layers: int = 2) -> torch.nn.Module:
    """A few linear layers: `2 * layers` tensors, of which the weights are `width` by `width`."""
    return torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers))).to(dtype)


def weights_for(module: torch.nn.Module, seed: int, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Random weights under the names of a module's state, the same for the same seed; tied ones are tied again."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[int, torch.Tensor] = {}
    weights = {}
    for name, live in module.state_dict().items():
        if live.data_ptr() not in made:
            made[live.data_ptr()] = torch.randn(live.shape, generator=generator).to(dtype or live.dtype)
        weights[name] = made[live.data_ptr()]
    return weights


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a module's state as it is now."""
    return {name: live.detach().clone() for name, live in module.state_dict().items()}


def same(module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether a module holds these weights and no others, bit for bit, NaN and signs of zero included."""
    live = module.state_dict()
    return live.keys() == weights.keys() and all(
        live[name].dtype == tensor.dtype and live[name].shape == tensor.shape and _bits(live[name]) == _bits(tensor)
        for name, tensor in weights.items()
    )


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
