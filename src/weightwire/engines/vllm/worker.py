"""The worker's end of the wire: one method, through which every call of `Control` comes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightwire.receiver import Receiver

__all__ = ["WorkerExtension"]


class WorkerExtension:
    """Adds `__weightwire__` to a vLLM worker, and with it a receiver that is made at the first call."""

    def __weightwire__(self, op: str, arguments: bytes, body: bytes | None = None) -> bytes:
        """`Receiver.handle` on this rank: an operation, its msgpack arguments, raw bytes; answers with msgpack."""
        receiver: Receiver | None = self.__dict__.get("_weightwire_receiver")
        if receiver is None:
            # Not before it is needed: a worker imports this file while it starts, and vLLM 0.32 on a CPU then walks
            # through every module there is and stumbles over llvmlite, which numba brings.
            from weightwire import transports
            from weightwire.engines.vllm.target import VllmTarget
            from weightwire.receiver import Receiver

            worker: Any = self
            target = VllmTarget(worker)
            receiver = Receiver(
                target,
                transports.fetch,
                open=transports.open_lent,
                enter_thread=target.enter_thread,
                probe=transports.probe,
                sweep=transports.sweep,
                rank=worker.rank,
                keep=int(os.environ.get("WEIGHTWIRE_KEEP_REVISIONS", "2")),
            )
            self._weightwire_receiver = receiver
        return receiver.handle(op, arguments, body)
