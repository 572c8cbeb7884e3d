"""A CUDA stream for what goes on beside the current one."""

from __future__ import annotations

import functools

import torch

__all__ = ["beside"]


@functools.cache
def beside(device: torch.device) -> torch.cuda.Stream | None:
    """One of this GPU for all updates: torch keeps memory apart for each stream. None of a CPU, and then
    `torch.cuda.stream` does nothing."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
