"""Where weights come from on the trainer's side; `find` picks the file."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import cast

import torch

from weightwire.errors import UnsupportedError, UsageError
from weightwire.sources.base import Source
from weightwire.sources.checkpoint import CheckpointSource
from weightwire.sources.peft import AdapterFolderSource, PeftSource, has_adapter, is_adapter
from weightwire.sources.tensors import ModuleSource, TensorSource, state_of

__all__ = ["Source", "find"]


def find(source: object, *, timeout: float) -> Source:
    """The source for what a user passed. For a module with DTensors this is collective: all its ranks call it.

    `timeout`: seconds that ranks wait for each other.

    >>> type(find({"w": torch.zeros(2)}, timeout=10.0)).__name__
    'TensorSource'
    """
    if all(hasattr(source, name) for name in ("aliases", "ranks", "metadata", "read")):
        return cast(Source, source)
    if isinstance(source, torch.nn.Module):
        return _of_module(source, timeout)
    if isinstance(source, Mapping):
        return TensorSource(source)
    if isinstance(source, str | os.PathLike):
        return AdapterFolderSource(source) if is_adapter(source) else CheckpointSource(source)
    raise UsageError(
        f"{type(source).__name__} is no source of weights",
        next_step="Pass a torch.nn.Module, a mapping of names to tensors, the path of a safetensors checkpoint or of "
        "an adapter, or an object with the methods of weightwire.sources.Source.",
    )


def _of_module(module: torch.nn.Module, timeout: float) -> Source:
    # Its `state_dict()` would wait for the other ranks, without a deadline.
    flat = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    if any(isinstance(part, flat) for part in module.modules()):
        raise UnsupportedError(
            "FullyShardedDataParallel, the first version of FSDP, is no source",
            next_step="Shard with torch.distributed.fsdp.fully_shard; accelerate does with fsdp_version=2.",
        )
    adapted = has_adapter(module)
    # What they import takes seconds, and where nobody has imported it, it made nothing of this module.
    if "deepspeed" in sys.modules:
        from weightwire.sources.deepspeed import DeepSpeedPeftSource, DeepSpeedSource, is_deepspeed

        if is_deepspeed(module):
            return (DeepSpeedPeftSource if adapted else DeepSpeedSource)(module, timeout=timeout)
    if (loaded := sys.modules.get("torch.distributed.tensor")) is not None:
        from weightwire.sources.fsdp import FsdpPeftSource, FsdpSource

        if any(isinstance(tensor, loaded.DTensor) for tensor in state_of(module).values()):
            return (FsdpPeftSource if adapted else FsdpSource)(module, timeout=timeout)
    return PeftSource(module) if adapted else ModuleSource(module)
