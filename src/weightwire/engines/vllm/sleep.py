"""Whether a worker's weights are in memory: vLLM's sleep mode takes them away, and tells nobody who asks.

The engine's own `is_sleeping` is also true while generation is merely paused. So this worker's `sleep` and `wake_up`
are noted as they are called, on the one object.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from weightwire.errors import StateError

__all__ = ["Sleep"]

_TAGS = frozenset({"weights", "kv_cache"})


class Sleep:
    """The sleep of one worker. `discarded` is called with a reason when its weights are lost by it (level 2), `let_go`
    whenever it is to free GPU memory."""

    def __init__(
        self, worker: Any, discarded: Callable[[str], None], let_go: Callable[[], None] = lambda: None
    ) -> None:
        self._discarded, self._let_go = discarded, let_go
        self._frees = worker.device.type != "cpu"  # a CPU worker is told to sleep, and keeps everything
        self._asleep = _asleep_already()
        self._sleep, self._wake_up = worker.sleep, worker.wake_up
        worker.sleep, worker.wake_up = self._noted_sleep, self._noted_wake_up

    @property
    def partly(self) -> bool:
        """Whether anything is asleep, be it the KV cache alone: then nothing may be generated."""
        return bool(self._asleep)

    def refuse_update(self) -> None:
        """Raise `StateError` while the weights are asleep."""
        if "weights" in self._asleep:
            raise StateError(
                "the engine sleeps, and its weights with it",
                next_step="Wake it up first: wake_up(), or wake_up(tags=['weights']) and the rest after the update.",
            )

    def _noted_sleep(self, level: int = 1, **more: Any) -> Any:
        self._asleep = _TAGS  # before it begins: what fails half-way has not been left awake
        if self._frees:
            self._let_go()
        if level >= 2 and self._frees:
            self._discarded(f"sleep(level={level}) discarded the weights")
        return self._sleep(level=level, **more)

    def _noted_wake_up(self, tags: Sequence[str] | None = None, **more: Any) -> Any:
        result = self._wake_up(tags=tags, **more)
        self._asleep = self._asleep - frozenset(_TAGS if tags is None else tags)
        return result


def _asleep_already() -> frozenset[str]:
    # Of an engine that fell asleep before the first call of ours, vLLM's allocator knows, if it is in use.
    allocator = getattr(sys.modules.get("vllm.device_allocator.cumem"), "CuMemAllocator", None)
    data = allocator.instance.pointer_to_data.values() if allocator and allocator.instance else ()
    return frozenset(each.tag for each in data if each.is_asleep)
