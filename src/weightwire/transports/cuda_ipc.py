"""A trainer's own GPU memory, lent to the engines of the same host until they have committed.

Nothing is sent but the handles of the allocations that hold the weights, and where in them each tensor lies. An engine
opens each allocation once and keeps it open for as long as the trainer names it and is heard of: until then the GPU
does not get it back, even if the trainer has freed it, or died. The engine may be on the same GPU or on another one
that can reach it.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import secrets
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import torch

from weightwire.errors import TransportError, UsageError, WeightwireError
from weightwire.receiver import Lent
from weightwire.transports import cuda_driver
from weightwire.transports.base import Weights
from weightwire.updates.manifest import TensorSpec

__all__ = ["CudaIpc", "open_lent", "probe", "sweep"]

_SECRET_BYTES = 16


class _Lent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`gpu`: by its UUID; `allocations`: handle and bytes; `tensors`: number of the allocation and byte where each
    begins."""

    gpu: str
    allocations: list[tuple[bytes, int]]
    tensors: list[tuple[int, int]]


class CudaIpc:
    """The trainer's half."""

    name = "cuda-ipc"

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._last = _Known()

    @contextlib.contextmanager
    def offer(self, host: str) -> Iterator[str]:
        """An address for an engine to try: a few bytes on the GPU, and what they must be."""
        device = self._weights.device
        if device.type != "cuda":
            raise TransportError(f"the weights are on the {device.type}, not on an Nvidia GPU")
        if (tensors := self._weights.whole()) is None:
            raise TransportError("the weights are not whole in this process")
        _check(tensors)
        secret = secrets.token_bytes(_SECRET_BYTES)
        held = torch.frombuffer(bytearray(secret), dtype=torch.uint8).to(tensors[0].device)
        yield f"{self._address([held])}/{secret.hex()}"

    @contextlib.contextmanager
    def lend(self, tensors: Sequence[torch.Tensor]) -> Iterator[str]:
        """Where an engine finds these tensors, while the context lasts and for as long as nobody frees them."""
        _check(tensors)
        # What still writes to them is over before anybody reads them.
        torch.cuda.synchronize(tensors[0].device)
        address = self._address(tensors)
        _own[address] = tensors
        try:
            yield address
        finally:
            del _own[address]

    def close(self) -> None:
        pass

    def _address(self, tensors: Sequence[torch.Tensor]) -> str:
        # Mostly what it was at the last update. Of hundreds of tensors, to see that their allocations are the same
        # takes less than to ask for each of them where its allocation begins.
        with torch.cuda.device(tensors[0].device):
            if not self._last.holds(tensors):
                self._last = _Known(tensors)
        return self._last.address


class _Known:
    """The address of these tensors, all of one GPU, the current one."""

    def __init__(self, tensors: Sequence[torch.Tensor] = ()) -> None:
        self.address = ""
        self._places = _places(tensors)
        numbers: dict[int, int] = {}
        allocations: list[tuple[bytes, int]] = []
        places: list[tuple[int, int]] = []
        for address, nbytes in self._places:
            if not nbytes:
                places.append((0, 0))
                continue
            base, size = cuda_driver.range_of(address)
            if base not in numbers:
                numbers[base] = len(allocations)
                allocations.append((cuda_driver.handle_of(base), size))
            places.append((numbers[base], address - base))
        self._allocations = {base: cuda_driver.number_of(base) for base in numbers}
        if tensors:
            lent = _Lent(gpu=cuda_driver.uuid_of(tensors[0].device), allocations=allocations, tensors=places)
            self.address = f"cuda-ipc:{base64.b64encode(msgspec.msgpack.encode(lent)).decode()}"

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these lie just there, and in the same allocations: others may have come to be at their addresses."""
        if self._places != _places(tensors):
            return False
        try:
            return all(cuda_driver.number_of(base) == number for base, number in self._allocations.items())
        except TransportError:
            return False  # nothing begins there any more


def _places(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    return [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors]


# An allocation cannot be opened by the process that made it, so what a process lends to itself is found here.
_own: dict[str, Sequence[torch.Tensor]] = {}


class _Opened:
    """The allocations that this process has open, by handle: address and bytes."""

    def __init__(self) -> None:
        self._open: dict[bytes, tuple[int, int]] = {}
        self._last: tuple[object, Lent] = (None, Lent([]))
        self._lock = threading.Lock()

    def take(self, address: str, tensors: tuple[TensorSpec, ...]) -> Lent:
        """Open what is new, close what is named no more, and find the tensors in it."""
        with self._lock:
            if self._last[0] == (address, tensors):
                return self._last[1]
            lent = _parse(address)
            if len(lent.tensors) != len(tensors):
                raise UsageError(f"{len(lent.tensors)} tensors are lent, the manifest has {len(tensors)}")
            self._last = (None, Lent([]))
            wanted = {handle for handle, _ in lent.allocations}
            if unwanted := self._open.keys() - wanted:
                _finish_reading()
            for handle in unwanted:
                cuda_driver.close_handle(self._open.pop(handle)[0])
            for handle in wanted - self._open.keys():
                opened = cuda_driver.open_handle(handle)
                self._open[handle] = (opened, cuda_driver.range_of(opened)[1])
            places = [self._open[handle] for handle, _ in lent.allocations]
            found = [_view(places, place, spec) for place, spec in zip(lent.tensors, tensors, strict=True)]
            # By its name: what is opened from a GPU that this process does not see counts as this one's.
            here = lent.gpu == cuda_driver.uuid_of(torch.device("cuda", torch.cuda.current_device()))
            self._last = ((address, tensors), Lent(found, here))
            return self._last[1]

    def close(self) -> None:
        """Close everything, once what is queued on the current stream, by which it is read, is done."""
        with self._lock:
            self._last = (None, Lent([]))
            if self._open:
                _finish_reading()
            while self._open:
                cuda_driver.close_handle(self._open.popitem()[1][0])


def _finish_reading() -> None:
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()


_opened = _Opened()


def open_lent(address: str, tensors: Sequence[TensorSpec]) -> Lent:
    """The worker's half: the tensors at an address, in memory that is the trainer's."""
    if address in _own:
        found = [*_own[address]]
        if [tuple(t.shape) for t in found] != [spec.shape for spec in tensors]:
            raise UsageError("what is lent are other tensors than the manifest's")
        return Lent(found, found[0].device.index in (None, torch.cuda.current_device()))
    return _opened.take(address, tuple(tensors))


def sweep() -> None:
    """The worker's half, once nothing is heard of the trainer any more: its memory is given back."""
    _opened.close()


def probe(offer: str) -> str | None:
    """None when this process can read the trainer's GPU memory, else why not."""
    address, _, secret = offer.rpartition("/")
    if not torch.cuda.is_available():
        return "this engine is not on an Nvidia GPU"
    if address in _own:
        return None
    spec = TensorSpec(name="secret", dtype="uint8", shape=(_SECRET_BYTES,))
    lent = _parse(address)
    if len(lent.allocations) != 1 or len(lent.tensors) != 1:
        return "not an offer of GPU memory"
    handle, _ = lent.allocations[0]
    try:
        opened = cuda_driver.open_handle(handle)
    except WeightwireError as error:
        return f"the trainer's GPU memory cannot be reached from here: {error.message}"
    try:
        found = _view([(opened, cuda_driver.range_of(opened)[1])], lent.tensors[0], spec)
        return None if found.cpu().numpy().tobytes().hex() == secret else "that GPU memory holds something else"
    finally:
        cuda_driver.close_handle(opened)


def _check(tensors: Sequence[torch.Tensor]) -> None:
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        raise TransportError(f"the weights are on {', '.join(sorted(map(str, devices)))}, not on one Nvidia GPU")
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise TransportError("some weights are not contiguous, and would have to be copied first")


def _parse(address: str) -> _Lent:
    try:
        data = base64.b64decode(address.partition(":")[2], validate=True)
        return msgspec.msgpack.decode(data, type=_Lent)
    except (binascii.Error, ValueError, msgspec.MsgspecError) as error:
        raise UsageError(f"not an address of GPU memory: {error}") from error


class _Bytes:
    """Memory as torch takes it from other libraries."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3,
        }  # fmt: skip


def _view(places: Sequence[tuple[int, int]], place: tuple[int, int], spec: TensorSpec) -> torch.Tensor:
    number, offset = place
    if not 0 <= number < len(places):
        raise UsageError(f"{spec.name} is in allocation {number} of {len(places)}")
    base, size = places[number]
    # By the driver's own account of the allocation: a kernel that reads beyond it would take the engine down.
    if offset < 0 or offset % spec.itemsize or offset + spec.nbytes > size:
        raise UsageError(f"{spec.name} is said to be at byte {offset} of an allocation of {size} bytes")
    dtype = getattr(torch, spec.dtype)
    if not spec.numel:
        return torch.empty(spec.shape, dtype=dtype, device="cuda")
    return torch.as_tensor(_Bytes(base + offset, spec.nbytes), device=_device_of(base)).view(dtype).view(spec.shape)


def _device_of(address: int) -> torch.device:
    # Left to torch, which asks the driver, it would be copied to where we say; so we say where it is.
    return torch.as_tensor(_Bytes(address, 1)).device
