"""The worker's end of the wire: one method, through which every call of `Control` comes; and beside it the three that
trainers written to OpenRLHF's worker interface call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightwire.engines.vllm.ends import Ends

__all__ = ["WorkerExtension"]


class WorkerExtension:
    """Adds `__weightwire__` to a vLLM worker, and with it a receiver that is made at the first call. The other methods
    are an interface that trainers know already (`broadcast`): they raise on the last rank, return None on all."""

    def __weightwire__(self, op: str, arguments: bytes, body: bytes | None = None) -> bytes:
        """`Receiver.handle` on this rank: an operation, its msgpack arguments, raw bytes; answers with msgpack."""
        return _ends(self).handle(op, arguments, body)

    def init_process_group(
        self,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str = "nccl",
        use_ray: bool = False,
    ) -> None:
        """Join the trainer's group, of which it is rank 0 and this worker is `rank_offset` + its rank here."""
        _ends(self).broadcasts.join(master_address, master_port, rank_offset, world_size, group_name, backend, use_ray)

    def update_weight(self, name: str, dtype: Any, shape: Sequence[int], empty_cache: bool = False) -> None:
        """Receive one parameter, which rank 0 broadcasts. With `empty_cache`, or once all have come, they go live."""
        _ends(self).broadcasts.update_weight(name, dtype, shape, empty_cache)

    def update_weight_cuda_ipc(
        self,
        name: str,
        dtype: Any,
        shape: Sequence[int],
        ipc_handles: Mapping[str, Any] | None = None,
        empty_cache: bool = False,
    ) -> None:
        """Copy one parameter out of memory that the trainer shares on this GPU; else as `update_weight`."""
        _ends(self).broadcasts.update_weight_cuda_ipc(name, dtype, shape, ipc_handles, empty_cache)


def _ends(extension: WorkerExtension) -> Ends:
    ends: Ends | None = extension.__dict__.get("_weightwire_ends")
    if ends is None:
        # Not before it is needed: a worker imports this file while it starts, and vLLM 0.32 on a CPU then walks
        # through every module there is and stumbles over llvmlite, which numba brings.
        from weightwire.engines.vllm.ends import Ends

        ends = Ends(extension, keep=int(os.environ.get("WEIGHTWIRE_KEEP_REVISIONS", "2")))
        extension.__dict__["_weightwire_ends"] = ends
    return ends
