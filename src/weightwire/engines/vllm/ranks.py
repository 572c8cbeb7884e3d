"""The workers of one engine among themselves: each hears what each answered, and one error is everybody's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import torch
import torch.distributed as dist

from weightwire.engines.base import KeepCache, Pause
from weightwire.errors import EngineError, PoisonedError, WeightwireError
from weightwire.receiver import decode_reply
from weightwire.revisions import Revision

if TYPE_CHECKING:
    from weightwire.engines.vllm.ends import Ends

__all__ = ["AllRanks", "Ranks"]

logger = logging.getLogger("vllm.weightwire.ranks")

_DEADLINE = timedelta(seconds=600)  # longer than anything that a rank waits for by itself


class Ranks:
    """This worker and those beside it, over the gloo group that vLLM keeps for them. All of them make the same calls
    in the same order, as they do when they answer one RPC."""

    def __init__(self) -> None:
        from vllm.distributed.parallel_state import get_world_group

        world = get_world_group()
        self._group = world.cpu_group
        self.rank, self.size = int(world.rank_in_group), int(world.world_size)

    @property
    def last(self) -> bool:
        return self.rank == self.size - 1

    def gather(self, mine: bytes) -> list[bytes]:
        """What each rank gave, in rank order."""
        if self.size == 1:
            return [mine]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._gather(lengths, torch.tensor([len(mine)]))
        longest = max(int(length) for length in lengths)
        padded = torch.frombuffer(bytearray(mine.ljust(longest, b"\0")), dtype=torch.uint8)
        all_of = [torch.empty_like(padded) for _ in range(self.size)]
        self._gather(all_of, padded)
        return [bytes(data[: int(n)].numpy()) for data, n in zip(all_of, lengths, strict=True)]

    def together(self, work: Callable[[], Any]) -> list[Any]:
        """Do this on every rank: all answers (plain data), or on every rank the first error of any."""
        try:
            mine = {"ok": work()}
        except WeightwireError as error:
            mine = {"error": error.to_wire()}
        except Exception as error:
            logger.exception("weightwire: rank %d failed", self.rank)
            mine = {"error": EngineError(f"rank {self.rank} failed: {error!r}").to_wire()}
        return [decode_reply(reply) for reply in self.gather(msgspec.msgpack.encode(mine))]

    def _gather(self, into: list[torch.Tensor], mine: torch.Tensor) -> None:
        work: Any = dist.all_gather(into, mine, group=self._group, async_op=True)
        work.wait(_DEADLINE)


class AllRanks:
    """The `Host` port from inside the workers: every rank runs the same `Control`, and a call is answered by all. The
    engine stands between two model steps meanwhile, as it waits for this RPC."""

    name = "this engine"
    idle = True
    in_order = alone = False

    def __init__(self, ranks: Ranks, ends: Ends, worker: Any) -> None:
        self._ranks, self._ends, self._worker = ranks, ends, worker
        self.model = str(worker.model_config.model)

    async def call(self, op: str, arguments: bytes, body: bytes | None, timeout: float) -> list[bytes]:
        return self._ranks.gather(self._ends.handle(op, arguments, body))

    async def before_pause(self) -> None:
        pass

    async def pause(self, mode: Pause, keep_cache: KeepCache) -> None:
        pass

    async def resume(self) -> None:
        pass

    async def refuse(self, reason: str) -> None:
        """Rather let the engine die than generate from a mixture: from in here nobody can be told to pause."""
        worker, receiver, execute = self._worker, self._ends.receiver, self._worker.execute_model

        def execute_model(*args: Any, **kwargs: Any) -> Any:
            if (poisoned := receiver.status()["poisoned"]) is not None:
                raise PoisonedError(poisoned, next_step="Restart the engine.")
            worker.execute_model = execute
            return execute(*args, **kwargs)

        if receiver.status()["poisoned"] is not None:
            worker.execute_model = execute_model

    async def label(self, version: int) -> None:
        pass

    async def in_use(self) -> dict[str, Any]:
        return {}

    async def list(self, revisions: Sequence[Revision]) -> None:
        pass
