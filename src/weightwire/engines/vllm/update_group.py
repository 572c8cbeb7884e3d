"""The group that a trainer of issue 5723 or OpenRLHF broadcasts in: it is rank 0 and has the store, the workers join.

There are two customs, and which one a trainer follows is seen in its store. The older makes a group of torch's own
under the group's name. The newer (`StatelessProcessGroup`) has NCCL alone, and leaves NCCL's id in the store as a
pickle: the 128 bytes are read out of it, it is never loaded.

With NCCL the communicator is made here, without torch's `ProcessGroupNCCL`: a watchdog of that ends the process when
the trainer dies.
"""

from __future__ import annotations

import ctypes
import os
import pickletools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.distributed_c10d import Backend, BackendConfig

from weightwire.errors import TransportError, UnsupportedError, UsageError
from weightwire.transports.store import FROM_TRAINER, own_address

__all__ = ["Group", "Place", "await_nccl_id", "join", "nccl_id", "seconds"]

_MAX_WORLD = 1 << 16
_ID_BYTES = 128
_AGAIN = "Call init_process_group again, on both sides."


def seconds() -> float:
    """How long one side waits for the other, in all of this."""
    text = os.environ.get("WEIGHTWIRE_BROADCAST_SECONDS", "120")
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise UsageError(f"WEIGHTWIRE_BROADCAST_SECONDS={text!r}", next_step="Give a number of seconds.")
    return value


class Place:
    """Where the trainer's store is, and which rank of how many this worker is in the group called `name`."""

    def __init__(self, host: Any, port: Any, rank: Any, world: Any, name: Any) -> None:
        if not (isinstance(host, str) and 0 < len(host) < 256 and isinstance(name, str) and 0 < len(name) < 256):
            raise UsageError(f"master_address {host!r:.80} and group_name {name!r:.80} must be names")
        try:
            self.port, self.rank, self.world = int(port), int(rank), int(world)
        except (TypeError, ValueError) as error:
            raise UsageError(f"port {port!r:.80}, rank {rank!r:.80} of {world!r:.80}: not numbers") from error
        if not (0 < self.port < 1 << 16 and 0 < self.rank < self.world <= _MAX_WORLD):
            raise UsageError(
                f"rank {self.rank} of {self.world} at port {self.port}: not a place in a group",
                next_step="Rank 0 is the trainer: pass rank_offset=1 for the first engine, and count every worker.",
            )
        self.host, self.name = host, name


class Group(Protocol):
    def broadcast(self, into: torch.Tensor) -> None:
        """Fill a contiguous tensor with what rank 0 broadcasts, or raise `TransportError` by the deadline."""

    def close(self) -> None:
        """Leave. A broadcast of others that still waits for this rank fails, or ends by its own deadline."""


def join(place: Place, backend: str, device: torch.device) -> Group:
    """Meet the trainer at its store, and join what it makes there."""
    if backend not in ("gloo", "nccl"):
        raise UnsupportedError(f"backend {backend!r:.80}", next_step="Use nccl, or on a CPU gloo.")
    if backend == "nccl" and device.type != "cuda":
        raise UnsupportedError(f"backend nccl, and this worker is on {device.type}", next_step="Use gloo.")
    try:
        # With the number of workers, which the trainer's side waits for.
        store = TCPStore(place.host, place.port, place.world, is_master=False, timeout=timedelta(seconds=seconds()))
        return _Gloo(place, store) if backend == "gloo" else _Nccl(place, store, device)
    except (RuntimeError, ValueError) as error:
        raise TransportError(
            f"could not join the trainer's group at {place.host}:{place.port}: {_first_line(error)}",
            next_step="Let the trainer join as rank 0 at the same time, with the same name, backend and world size.",
        ) from error


class _Gloo:
    def __init__(self, place: Place, store: Store) -> None:
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=own_address(place.host))]
        options._timeout = timedelta(seconds=seconds())
        self._group: Any = gloo(_torchs_own(store, place.name, "gloo"), place.rank, place.world, options)

    def broadcast(self, into: torch.Tensor) -> None:
        data = into if into.device.type == "cpu" else torch.empty_like(into, device="cpu")
        try:
            self._group.broadcast([data], FROM_TRAINER).wait(timedelta(seconds=seconds()))
        except RuntimeError as error:
            raise TransportError(f"the broadcast failed: {_first_line(error)}", next_step=_AGAIN) from error
        if data is not into:
            into.copy_(data)

    def close(self) -> None:
        self._group = None


class _Nccl:
    """NCCL through vLLM's binding of it. The communicator is made on a thread: a trainer of the older custom leaves
    its id with its first broadcast only, one of the newer waits for us before that."""

    def __init__(self, place: Place, store: Store, device: torch.device) -> None:
        self._place, self._store, self._device = place, store, device
        self._closed = threading.Event()
        self._made: Future[tuple[Any, Any]] = Future()
        threading.Thread(target=self._make, name="weightwire-nccl", daemon=True).start()

    def _make(self) -> None:
        try:
            self._made.set_result(self._communicator())
        except BaseException as error:
            self._made.set_exception(error)

    def _communicator(self) -> tuple[Any, Any]:
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary, ncclUniqueId

        id, warms_up = await_nccl_id(self._store, self._place.name, self._closed)
        unique = ncclUniqueId()
        ctypes.memmove(ctypes.byref(unique), id, _ID_BYTES)
        torch.cuda.set_device(self._device)
        nccl = NCCLLibrary()
        comm = nccl.ncclCommInitRank(self._place.world, unique, self._place.rank)
        if warms_up:
            # The newer custom's constructor sums one float over all ranks.
            one = torch.zeros(1, device=self._device)
            self._run(one, lambda ptr, stream: nccl.ncclAllReduce(ptr, ptr, 1, _FLOAT32, 0, comm, stream))
        return nccl, comm

    def broadcast(self, into: torch.Tensor) -> None:
        from vllm.distributed.device_communicators.pynccl_wrapper import ncclDataTypeEnum

        try:
            kind = ncclDataTypeEnum.from_torch(into.dtype)
            nccl, comm = self._made.result(seconds())
            self._run(into, lambda ptr, s: nccl.ncclBroadcast(ptr, ptr, into.numel(), kind, 0, comm, s))
        except FutureTimeout as error:
            raise TransportError(f"no communicator within {seconds():g} s", next_step=_AGAIN) from error
        except (RuntimeError, ValueError) as error:
            raise TransportError(f"the broadcast failed: {_first_line(error)}", next_step=_AGAIN) from error

    def _run(self, data: torch.Tensor, call: Callable[[Any, Any], None]) -> None:
        """Enqueue on a stream of its own, and wait for it, but not for ever."""
        with torch.cuda.device(self._device):
            stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            call(ctypes.c_void_p(data.data_ptr()), ctypes.c_void_p(stream.cuda_stream))
            done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(stream)
        end = time.monotonic() + seconds()
        while not done.query():
            if time.monotonic() > end or self._closed.is_set():
                raise TransportError(f"the trainer sent nothing for {seconds():g} s", next_step=_AGAIN)
            time.sleep(0.0002)

    def close(self) -> None:
        self._closed.set()
        if self._made.done() and self._made.exception() is None:
            nccl, comm = self._made.result()
            nccl.ncclCommAbort(comm)  # also ends a kernel that waits for a trainer that is gone
            self._made = Future()


def await_nccl_id(store: Store, name: str, closed: threading.Event) -> tuple[bytes, bool]:
    """NCCL's id, 128 bytes, once it is in the trainer's store; and whether the trainer's custom is the newer one."""
    older = _torchs_own(store, name, "nccl")
    while not closed.wait(0.005):
        if store.check([_NEWER]):
            return nccl_id(store.get(_NEWER)), True
        if older.check(["0"]):
            return bytes(older.get("0"))[:_ID_BYTES], False
    raise TransportError("the group was closed before its first broadcast")


def nccl_id(pickled: bytes) -> bytes:
    """The only 128 bytes in the pickle of NCCL's id, found by reading its opcodes; none of them is carried out."""
    try:
        found = [a for _, a, _ in pickletools.genops(pickled) if isinstance(a, bytes) and len(a) == _ID_BYTES]
    except (ValueError, IndexError) as error:
        raise TransportError(f"the trainer's store holds no NCCL id: {error}") from error
    if len(found) != 1:
        raise TransportError(f"the trainer's store holds {len(found)} NCCL ids instead of one")
    return found[0]


_NEWER = "broadcast_from/0/0"
_FLOAT32 = 7  # ncclFloat32


def _torchs_own(store: Store, name: str, backend: str) -> Store:
    """The part of a store in which torch makes a group: under its name, its name again, and the backend's first kind of
    device, as `_new_process_group_helper` has it below a `PrefixStore` of the interface's own."""
    device = next(iter(BackendConfig(Backend(backend)).get_device_backend_map()))
    return PrefixStore(f"{device}/", PrefixStore(f"{name}/", PrefixStore(name, store)))


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300] or type(error).__name__
