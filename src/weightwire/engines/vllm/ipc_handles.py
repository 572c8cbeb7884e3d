"""A tensor that another process shares on this GPU, opened from the plain data of what torch's `reduce_tensor` gave.

A handle is `(function, arguments)`. The function is not called and no class among the arguments is used: the numbers,
names and bytes are checked here, and the memory is opened here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weightwire.errors import ManifestError, ShapeMismatch, TransportError
from weightwire.updates.boxes import strides_of
from weightwire.updates.manifest import TensorSpec, dtype_name

__all__ = ["Shared", "for_device", "read"]

_COUNTER = re.compile(rb"/torch_[0-9]+_[0-9]+_[0-9]+")
"""Torch's name for the shared memory in which it counts who uses an allocation. It is opened, so nothing else is."""
_MAX_HANDLE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """Where a tensor is: from element `offset` on of a storage of `nbytes` at byte `start` of somebody's allocation."""

    spec: TensorSpec
    offset: int
    handle: bytes
    nbytes: int
    start: int
    counter: bytes
    counter_offset: int
    event: bytes
    wait: bool

    def copy(self, device: torch.device) -> torch.Tensor:
        """What it holds, in memory of our own."""
        try:
            storage: torch.UntypedStorage = torch.UntypedStorage._new_shared_cuda(
                device.index, self.handle, self.nbytes, self.start, self.counter, self.counter_offset,
                self.event, self.wait,
            )  # fmt: skip
            dtype = getattr(torch, self.spec.dtype)
            view = torch.empty(0, dtype=dtype, device=device).set_(
                storage, self.offset, self.spec.shape, strides_of(self.spec.shape)
            )
            own: torch.Tensor = view.clone()
            torch.cuda.current_stream(device).synchronize()  # the other side may let go of it when we answer
        except RuntimeError as error:
            raise TransportError(
                f"{self.spec.name}: its shared memory could not be opened: {str(error).partition(chr(10))[0][:300]}",
                next_step="Keep the tensor until the call has returned, and share it from this GPU.",
            ) from error
        return own


def for_device(handles: Any, uuid: str) -> Any:
    """The handle of this GPU among `{uuid: handle}`."""
    if not isinstance(handles, Mapping) or uuid not in handles:
        known = list(map(str, handles))[:16] if isinstance(handles, Mapping) else type(handles).__name__
        raise TransportError(
            f"no handle for this worker's GPU {uuid}, only {known}",
            next_step="Share the tensor from a process on each GPU that the engine uses.",
        )
    return handles[uuid]


def read(spec: TensorSpec, handle: Any) -> Shared:
    """Check the plain data of a handle against what was announced. Raises `ManifestError` or `ShapeMismatch`."""
    arguments: Any = handle[1] if _is_list(handle) and len(handle) == 2 else None
    if not _is_list(arguments) or len(arguments) != 15:
        raise ManifestError(f"{spec.name}: not what reduce_tensor gives for a tensor on a GPU")
    _, size, stride, offset, _, dtype, _, raw, nbytes, start, _, counter, counter_offset, event, wait = arguments
    shape = _numbers(spec, "size", size)
    if shape != spec.shape or dtype_name(dtype) != spec.dtype:
        raise ShapeMismatch(
            f"{spec.name} was announced as {spec.dtype} {spec.shape} and is shared as {dtype!s:.40} {shape}"
        )
    strides = _numbers(spec, "stride", stride)
    if len(strides) != len(shape) or _beyond_one(shape, strides) != _beyond_one(shape, strides_of(shape)):
        raise ShapeMismatch(f"{spec.name} is shared with strides {tuple(stride)}", next_step="Share it contiguous.")
    numbers = _numbers(spec, "place", (offset, nbytes, start, counter_offset))
    if (numbers[0] + spec.numel) * spec.itemsize > numbers[1]:
        raise ShapeMismatch(
            f"{spec.name}: {spec.numel} elements from {numbers[0]} on do not fit into its storage of {nbytes} bytes"
        )
    counter = counter.encode() if isinstance(counter, str) else counter
    if not all(isinstance(data, bytes) and len(data) <= _MAX_HANDLE for data in (raw, counter, event)) or not raw:
        raise ManifestError(f"{spec.name}: its handles are not bytes")
    if not _COUNTER.fullmatch(counter) or not isinstance(wait, bool):
        raise ManifestError(f"{spec.name}: {counter[:80]!r} is not torch's name for a counter")
    return Shared(
        spec=spec, offset=numbers[0], handle=raw, nbytes=numbers[1], start=numbers[2], counter=counter,
        counter_offset=numbers[3], event=event, wait=wait,
    )  # fmt: skip


def _beyond_one(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    # The stride of a dimension of one element means nothing.
    return [stride for size, stride in zip(shape, strides, strict=True) if size > 1]


def _numbers(spec: TensorSpec, what: str, values: Any) -> tuple[int, ...]:
    if not _is_list(values) or not all(type(v) is int and 0 <= v < 1 << 62 for v in values):
        raise ManifestError(f"{spec.name}: its {what} is not made of natural numbers")
    return tuple(values)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))
