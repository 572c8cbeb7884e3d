"""A process group over NCCL that nobody else knows of, made over a store, and whose making can be given up."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from weightwire.transports.base import Wait
from weightwire.transports.store import FROM_TRAINER

__all__ = ["abort_group", "broadcast", "make_group"]

_GRACE_SECONDS = 600.0
_ABORT_SECONDS = 10.0
# Torch watches over its groups and, when one hangs, ends the process: this one's must outlive its peers.
_UNWATCHED = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_PROPAGATE_ERROR": "0",
    "TORCH_NCCL_NAN_CHECK": "0",  # which fails in a kernel; ours is a count, and an answer
}
_environment = threading.Lock()
_KNOWN = {torch.uint8, torch.bfloat16, torch.float16, torch.float32}  # NCCL has not all dtypes


def make_group(store: Store, key: str, rank: int, world: int, wait: Wait) -> Any:
    """Form a group on the current device. NCCL cannot be interrupted while it does, so nobody begins before all are
    there, and it is done on a thread of its own: one whose peer has failed meanwhile is left behind there."""
    store.set(f"{key}/here/{rank}", "")  # beside what NCCL itself keeps under the key
    wait(lambda: bool(store.check([f"{key}/here/{other}" for other in range(world)])), "every rank to join the group")
    device = torch.cuda.current_device()
    made: Future[Any] = Future()
    begun: list[Any] = []

    def form() -> None:
        try:
            torch.cuda.set_device(device)
            nccl: Any = dist.ProcessGroupNCCL
            options = nccl.Options()
            options._timeout = timedelta(seconds=_GRACE_SECONDS)
            with _unwatched():
                group = nccl(PrefixStore(key, store), rank, world, options)
            begun.append(group)
            hello = torch.zeros(1, dtype=torch.uint8, device="cuda")
            group.broadcast([hello], FROM_TRAINER).wait()
            torch.cuda.current_stream().synchronize()
            made.set_result(group)
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=form, name="weightwire-nccl", daemon=True).start()
    try:
        wait(made.done, "the group to form")
        return made.result()
    except BaseException:
        # What it has queued would wait on this GPU for ever, and with it all that waits for the GPU.
        for group in begun:
            abort_group(group)
        raise


def broadcast(group: Any, parts: Sequence[torch.Tensor]) -> Any:
    """Each of these from the trainer to all, by one launch on the group's own stream. Every rank gives as many, of the
    same sizes; contiguous."""
    runs = [part if part.dtype in _KNOWN else part.view(torch.uint8) for part in parts]
    group._start_coalescing()
    try:
        for run in runs:
            group.broadcast([run], FROM_TRAINER)
    except BaseException:
        # Left open, it would take in whatever else this thread asks of NCCL, the trainer's own groups included.
        with contextlib.suppress(RuntimeError):
            group._end_coalescing()
        raise
    return group._end_coalescing()


def abort_group(group: Any) -> None:
    """End a group and what it has queued. Torch would wait for that as long as for a broadcast, so this goes on without
    it after a while."""

    def abort() -> None:
        with contextlib.suppress(RuntimeError):
            group.abort()

    thread = threading.Thread(target=abort, name="weightwire-nccl-abort", daemon=True)
    thread.start()
    thread.join(_ABORT_SECONDS)


@contextlib.contextmanager
def _unwatched() -> Iterator[None]:
    # A group reads these once, when it is made; the trainer's own groups are to keep theirs.
    with _environment:
        before = {name: os.environ.get(name) for name in _UNWATCHED}
        os.environ.update(_UNWATCHED)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
