"""The calls of the CUDA driver that lend memory to another process, which torch has only in a form that pickles.

A handle is 64 bytes of plain data. It stands for a whole allocation; what is opened must be closed.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from weightwire.errors import TransportError

__all__ = ["close_handle", "gpu_of", "handle_of", "number_of", "open_handle", "range_of", "uuid_of"]

HANDLE_BYTES = 64
_ENABLE_PEER_ACCESS = 1
_BUFFER_ID = 7  # CU_POINTER_ATTRIBUTE_BUFFER_ID


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


def range_of(address: int) -> tuple[int, int]:
    """Where the allocation that holds `address` begins, and its bytes."""
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
    return base.value, size.value


def number_of(address: int) -> int:
    """The number of the allocation that holds `address`, which no other of this process ever has."""
    number = ctypes.c_uint64()
    _call("cuPointerGetAttribute", ctypes.byref(number), ctypes.c_int(_BUFFER_ID), ctypes.c_uint64(address))
    return number.value


def handle_of(base: int) -> bytes:
    """The handle of an allocation of this process. Memory of torch's expandable segments has none."""
    handle = _Handle()
    _call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(base))
    return bytes(ctypes.string_at(ctypes.byref(handle), HANDLE_BYTES))


def open_handle(handle: bytes) -> int:
    """The address of another process's allocation in this one, for the current device."""
    if len(handle) != HANDLE_BYTES:
        raise TransportError(f"a handle has {HANDLE_BYTES} bytes, this one {len(handle)}")
    copied, address = _Handle.from_buffer_copy(handle), ctypes.c_uint64()
    _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), copied, ctypes.c_uint(_ENABLE_PEER_ACCESS))
    return address.value


def close_handle(address: int) -> None:
    _call("cuIpcCloseMemHandle", ctypes.c_uint64(address))


def gpu_of(device: torch.device) -> str | None:
    """`uuid_of` a GPU; None of what is none.

    >>> gpu_of(torch.device("cpu"))
    """
    return uuid_of(device) if device.type == "cuda" else None


def uuid_of(device: torch.device) -> str:
    """The name of a GPU, the same in every process."""
    return str(torch.cuda.get_device_properties(device).uuid)


@functools.cache
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise TransportError(f"there is no CUDA driver: {error}") from error


def _call(name: str, *arguments: Any) -> None:
    driver = _driver()
    if (code := getattr(driver, name)(*arguments)) == 0:
        return
    text = ctypes.c_char_p()
    driver.cuGetErrorString(code, ctypes.byref(text))
    raise TransportError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")
