"""Weights of a DeepSpeed engine, ZeRO-1 to 3.

ZeRO-3 cuts each parameter, laid out as one row, into as many equal parts as there are ranks. Those parts are read where
they lie: nothing is gathered, so that a parameter that is larger than a bucket takes no more memory than a bucket, and
the trainer's own groups are not used. With ZeRO-1 and 2 every rank has the parameters whole.

DeepSpeed itself is not needed: what it puts onto a parameter is found by its attributes (`ds_shape`, `ds_tensor`).
"""

from __future__ import annotations

from typing import Any

import torch

from weightwire.errors import UnsupportedError
from weightwire.sources.base import spec_of
from weightwire.sources.fsdp import FsdpPeftSource, FsdpSource, Held, held
from weightwire.sources.tensors import state_of, wrappers
from weightwire.updates.boxes import Box
from weightwire.updates.manifest import TensorSpec

__all__ = ["DeepSpeedPeftSource", "DeepSpeedSource", "is_deepspeed"]

_FULL_STATE = "Publish a full state dict from one rank instead."


class _ZeroLayout:
    def _hold(self, name: str, tensor: torch.Tensor) -> Held:
        _refuse(name, tensor)
        return _held(name, tensor) if hasattr(tensor, "ds_tensor") else held(name, tensor)


class DeepSpeedSource(_ZeroLayout, FsdpSource):
    """What `deepspeed.initialize` returns first, the module in it, or a module made under `deepspeed.zero.Init`.

    Collective, as is every method. The weights are those in use between two steps: of mixed precision, the 16-bit ones.
    A parameter that is gathered at the moment (`deepspeed.zero.GatheredParameters`) is read as it is on rank 0.
    """


class DeepSpeedPeftSource(_ZeroLayout, FsdpPeftSource):
    """An adapter of a module that PEFT has adapted, in a DeepSpeed engine; see `sources.peft.PeftAdapter`."""


def is_deepspeed(module: torch.nn.Module) -> bool:
    """Whether a module is a DeepSpeed engine, or has parameters that ZeRO-3 has cut.

    >>> is_deepspeed(torch.nn.Linear(2, 2))
    False
    """
    families = {cls.__module__.partition(".")[0] for layer in wrappers(module) for cls in type(layer).__mro__}
    return "deepspeed" in families or any(hasattr(tensor, "ds_tensor") for tensor in state_of(module).values())


def _held(name: str, tensor: Any) -> Held:
    """What this rank holds of a parameter that ZeRO-3 has cut, in elements of the parameter as one row."""
    part, shape = tensor.ds_tensor, tuple(tensor.ds_shape)
    spec = TensorSpec(name=name, dtype=spec_of(name, part).dtype, shape=shape)
    if tensor.numel() == spec.numel:
        # It is gathered, for a while or, small as it is, for good. That is what the module computes with.
        whole = tensor.detach().reshape(-1)
        return Held(spec_of(name, tensor.detach().view(shape)), (spec.numel,), Box((0,), (spec.numel,)), whole)
    size = part.ds_numel
    if part.numel() != size or hasattr(part, "ds_quant_scale"):
        raise UnsupportedError(
            f"ZeRO has quantised {name!r}, or moved it to a disk: {part.numel()} elements are here instead of {size}",
            next_step="Keep partitions in memory, as they are. " + _FULL_STATE,
        )
    start = min(size * tensor.ds_zero_partition_rank, spec.numel)
    length = min(size, spec.numel - start)
    return Held(spec, (spec.numel,), Box((start,), (length,)), part.detach().view(-1)[:length])


def _refuse(name: str, tensor: Any) -> None:
    """What differs from rank to rank without being one part of a whole in a way that is known here."""
    if not getattr(tensor, "allreduce", True):
        raise UnsupportedError(f"{name!r} is an expert's, which not every rank has", next_step=_FULL_STATE)
    if getattr(tensor, "model_parallel", False) or getattr(tensor, "tensor_model_parallel", False):
        raise UnsupportedError(f"{name!r} is cut by DeepSpeed's tensor parallelism", next_step=_FULL_STATE)
