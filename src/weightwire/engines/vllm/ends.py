"""What a worker keeps: its receiver, what is known of its sleep, and the broadcasts that may come to it."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from weightwire import transports
from weightwire.engines.vllm.sleep import Sleep
from weightwire.engines.vllm.target import VllmTarget
from weightwire.errors import StateError
from weightwire.receiver import Arrivals, Lent, Receiver
from weightwire.transports.cuda_driver import gpu_of

if TYPE_CHECKING:
    from weightwire.engines.vllm.broadcast import Broadcasts

__all__ = ["Ends"]

# Asked with `seal` or `poll`, a commit is refused before anything was paused for it.
_NEED_WEIGHTS = {"begin", "seal", "poll", "commit"}


class Ends:
    """`worker` is the vLLM worker; `keep` older revisions of an adapter can be pinned by requests."""

    def __init__(self, worker: Any, *, keep: int) -> None:
        self._worker = worker
        self.target = VllmTarget(worker)
        self.receiver = Receiver(
            self.target,
            transports.fetch,
            open=self._open,
            enter_thread=self.target.enter_thread,
            probe=transports.probe,
            sweep=transports.sweep,
            rank=worker.rank,
            gpu=gpu_of(torch.device(worker.device)),
            keep=keep,
        )

        def let_go() -> None:
            self.target.adapters.let_go()
            # A commit that is queued still writes what is about to be put away.
            torch.cuda.synchronize(worker.device)

        self.sleep = Sleep(worker, self.receiver.poison, let_go)

    def handle(self, op: str, arguments: bytes, body: bytes | None = None) -> bytes:
        """`Receiver.handle`, which an engine that sleeps does not get to do."""
        if op == "asleep":
            return msgspec.msgpack.encode({"ok": self.sleep.partly})
        if op in _NEED_WEIGHTS:
            try:
                self.sleep.refuse_update()
            except StateError as error:
                return msgspec.msgpack.encode({"error": error.to_wire()})
        return self.receiver.handle(op, arguments, body)

    def _open(self, address: str, arrivals: Arrivals) -> Lent | None:
        # What was broadcast is in this process already.
        return (
            self.broadcasts.open(address)
            if address.startswith("broadcast:")
            else transports.open_lent(address, arrivals)
        )

    @cached_property
    def broadcasts(self) -> Broadcasts:
        """Made when a trainer first speaks that interface."""
        from weightwire.engines.vllm.broadcast import Broadcasts

        return Broadcasts(self._worker, self)
