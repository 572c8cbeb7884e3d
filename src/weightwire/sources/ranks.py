"""The trainer's ranks acting as one: the little that they must tell each other, and nobody waiting in vain.

Everything travels as numbers and bytes (torch's `*_object` collectives would pickle), in a gloo group of our own, so
that the trainer's groups stay as they are.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from weightwire.errors import SourceError, WeightwireError
from weightwire.transports.cuda_driver import uuid_of
from weightwire.transports.nccl_group import abort_group, make_group
from weightwire.updates.digest import Scan, Scans

__all__ = ["Ranks"]

_LOOK_SECONDS = 0.0002
_AHEAD = 2  # gatherings on a GPU that may be under way at a time


class Ranks:
    """All ranks of the default process group. Every method but `close`, `send` and `receive` is collective.

    A rank that died, or that did not come within `timeout` seconds, is a `SourceError` on the others. The group is then
    closed, so that whoever still waits for this rank hears of it at once, and every further call says why.

    >>> from weightwire.updates.digest import scan
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> ranks = Ranks.over_default_group(timeout=10.0)
    >>> ranks.share(b"from rank 0"), ranks.total([scan(torch.ones(1))]) == [scan(torch.ones(1))]
    (b'from rank 0', True)
    >>> ranks.close()
    >>> dist.destroy_process_group()
    """

    def __init__(self, group: dist.ProcessGroup, timeout: float) -> None:
        self._group: dist.ProcessGroup | None = group
        self._timeout = timeout
        self._gpus: list[bytes] = []
        self._over_gpus: Any = None
        self._under_way: list[Any] = []
        self._closed = "it was closed"
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    @classmethod
    def over_default_group(cls, timeout: float) -> Ranks:
        """Collective. `timeout` is for each later wait too, in seconds; `SourceError` where there are no ranks."""
        if not dist.is_available() or not dist.is_initialized():
            raise SourceError(
                "torch.distributed is not initialised", next_step="Call torch.distributed.init_process_group first."
            )
        if not dist.is_gloo_available():
            raise SourceError("this build of torch has no gloo, over which the ranks talk")
        try:
            return cls(dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)), timeout)
        except Exception as error:
            raise SourceError(
                f"waited in vain for all {dist.get_world_size()} ranks to form a group: {_reason(error)}",
                next_step="Make the source on every rank.",
            ) from error

    def agree(self, error: WeightwireError | None) -> None:
        """Raise on all ranks the error of the lowest rank that has one; `details["rank"]` says which. Else nothing."""
        culprit = self._lowest(error is not None)
        if culprit is None:
            return
        if error is None or culprit != self.rank:
            data = self._broadcast(b"", culprit, f"the error of rank {culprit}")
            raise WeightwireError.from_wire(msgspec.json.decode(data))
        # An error that comes by here a second time, from further in, has its rank already.
        if "rank" not in error.details:
            error.details["rank"] = self.rank
            error.message = f"rank {self.rank}: {error.message}"
            error.args = (error.message,)
        self._broadcast(msgspec.json.encode(error.to_wire(), enc_hook=str), culprit, "the error of this rank")
        raise error

    def reason(self, why: str | None) -> str | None:
        """What the lowest rank says that says anything, on all ranks; None where none does."""
        speaker = self._lowest(why is not None)
        if speaker is None:
            return None
        said = self._broadcast((why or "").encode(), speaker, f"what rank {speaker} says").decode()
        return f"rank {speaker}: {said}" if speaker else said

    def total(self, scans: Sequence[Scan]) -> Scans:
        """Element-wise sums over the ranks; every rank passes as many."""
        table = torch.from_numpy(Scans.of(scans).rows.view(np.int64).copy())
        with self._waiting("the digests of all ranks") as group:
            dist.all_reduce(table, dist.ReduceOp.SUM, group=group)
        return Scans(table.numpy().view(np.uint64))

    def share(self, data: bytes | None) -> bytes:
        """What rank 0 passed. The other ranks' `data` is not looked at."""
        return self._broadcast(data or b"", 0, "rank 0 to share its data")

    def gather(self, table: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's `table` (on the CPU, the same shape and dtype everywhere), in the order of ranks."""
        tables = [torch.empty_like(table) for _ in range(self.size)]
        with self._waiting("the tables of all ranks") as group:
            dist.all_gather(tables, table, group=group)
        return tables

    def send(self, data: torch.Tensor, to: int) -> None:
        """Send `data` (1-D uint8, contiguous, on the CPU) to a rank that receives as many bytes."""
        with self._waiting(f"rank {to} to take {data.numel()} bytes") as group:
            dist.send(data, to, group=group)

    def receive(self, out: torch.Tensor, source: int) -> None:
        """Fill `out` (1-D uint8, contiguous, on the CPU) with what rank `source` sends."""
        with self._waiting(f"{out.numel()} bytes from rank {source}") as group:
            dist.recv(out, source, group=group)

    def on_gpus(self, device: torch.device | None) -> bool:
        """Whether every rank has a GPU of its own, this one `device`: then `to_leader` goes from GPU to GPU."""
        name = uuid_of(device).encode() if device is not None and dist.is_nccl_available() else b""
        table = torch.zeros(64, dtype=torch.uint8)
        table[: len(name)] = torch.tensor([*name], dtype=torch.uint8)
        gpus = [bytes(each.tolist()).rstrip(b"\0") for each in self.gather(table)]
        if device is None or not all(gpus) or len({*gpus}) < max(self.size, 2):
            return False  # NCCL refuses two ranks on one GPU
        if gpus != self._gpus:
            self._leave_gpus()
            self._gpus, key = gpus, self.share(secrets.token_hex(16).encode()).decode()
            error: WeightwireError | None = None
            try:
                with torch.cuda.device(device), self._waiting("a group over NCCL"):
                    store = dist.distributed_c10d._get_default_store()
                    self._over_gpus = make_group(store, f"weightwire/{key}", self.rank, self.size, self._wait)
            except WeightwireError as failed:
                error = failed
            self.agree(error)
        return True

    def to_leader(self, mine: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
        """Rank 0 gets every other rank's `mine` (1-D uint8), of `counts[rank]` bytes, and sends none; the others get
        nothing. Where `on_gpus` said so they are on GPUs, and come on the current stream: this thread waits only for
        those of a while ago."""
        leads = self.rank == 0
        parts = [0, *counts[1:]] if leads else [0] * self.size
        arrived = torch.empty(sum(parts), dtype=torch.uint8, device=mine.device)
        with self._waiting("the parts of all ranks") as group:
            if mine.device.type == "cuda":
                group = self._over_gpus
            work = group.alltoall_base(arrived, mine, parts, [0 if leads else mine.numel()] + [0] * (self.size - 1))
            work.wait()  # of a GPU the stream does, not this thread
            self._under_way.append(work)
            while len(self._under_way) > _AHEAD:
                self._wait(self._under_way.pop(0).is_completed, "the parts of all ranks to arrive")
        return [*torch.split(arrived, parts)]

    def close(self) -> None:
        """Leave the group. The default group and all others stay."""
        self._leave_gpus()
        group, self._group = self._group, None
        # The trainer may have taken everything down before us.
        if group is not None and dist.is_initialized():
            with contextlib.suppress(ValueError):
                dist.destroy_process_group(group)

    def _leave_gpus(self) -> None:
        group, self._over_gpus, self._gpus = self._over_gpus, None, []
        self._under_way.clear()
        if group is not None:
            abort_group(group)  # whatever is under way would wait for ever

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        until = time.monotonic() + self._timeout
        while not ready():
            if time.monotonic() > until:
                raise TimeoutError(f"{what} took more than {self._timeout:g} s")
            time.sleep(_LOOK_SECONDS)

    def _lowest(self, here: bool) -> int | None:
        """The lowest rank that passed True."""
        rank = torch.tensor(self.rank if here else self.size)
        with self._waiting("the other ranks to say how they fare") as group:
            dist.all_reduce(rank, dist.ReduceOp.MIN, group=group)
        return None if int(rank) == self.size else int(rank)

    def _broadcast(self, data: bytes, source: int, what: str) -> bytes:
        with self._waiting(what) as group:
            length = torch.tensor(len(data))
            dist.broadcast(length, source, group=group)
            if not int(length):
                return b""
            body = torch.frombuffer(bytearray(data), dtype=torch.uint8) if self.rank == source else None
            if body is None:
                body = torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(body, source, group=group)
            return body.numpy().tobytes()

    @contextlib.contextmanager
    def _waiting(self, what: str) -> Iterator[dist.ProcessGroup]:
        if self._group is None:
            raise SourceError(
                f"rank {self.rank} has left the ranks' group: {self._closed}",
                next_step="Make a new source or publisher, on every rank.",
            )
        try:
            yield self._group
        except Exception as error:
            self._closed = f"it waited in vain for {what}: {_reason(error)}"
            self.close()
            raise SourceError(
                f"rank {self.rank} of {self.size} waited in vain for {what}: {_reason(error)}",
                next_step="Look at what the other ranks say; one of them has died or hangs.",
            ) from error


def _reason(error: BaseException) -> str:
    # Gloo begins with a place in its source and ends with advice.
    line = (str(error).strip() or repr(error)).splitlines()[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line).partition(". ")[0]
