"""Where weights come from on the trainer's side; `find` picks the file."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import cast

import torch

from weightwire.errors import UsageError
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
        if _is_sharded(source):
            from weightwire.sources.fsdp import FsdpPeftSource, FsdpSource

            sharded = FsdpPeftSource if has_adapter(source) else FsdpSource
            return sharded(source, timeout=timeout)
        return PeftSource(source) if has_adapter(source) else ModuleSource(source)
    if isinstance(source, Mapping):
        return TensorSource(source)
    if isinstance(source, str | os.PathLike):
        return AdapterFolderSource(source) if is_adapter(source) else CheckpointSource(source)
    raise UsageError(
        f"{type(source).__name__} is no source of weights",
        next_step="Pass a torch.nn.Module, a mapping of names to tensors, the path of a safetensors checkpoint or of "
        "an adapter, or an object with the methods of weightwire.sources.Source.",
    )


def _is_sharded(module: torch.nn.Module) -> bool:
    # Importing it takes seconds, and where nobody has, there are no DTensors.
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and any(isinstance(tensor, loaded.DTensor) for tensor in state_of(module).values())
