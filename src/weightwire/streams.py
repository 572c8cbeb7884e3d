"""A CUDA stream for what goes on beside the current one."""

from __future__ import annotations

import functools

import torch

__all__ = ["beside"]


@functools.cache
def beside(device: torch.device) -> torch.cuda.Stream:
    """One of this GPU for all updates: torch keeps memory apart for each stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
