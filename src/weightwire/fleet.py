"""The engines of one publish: asked all at once, until its deadline."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from weightwire.engines.base import Engine
from weightwire.errors import DeadlineError, EngineError, WeightwireError

__all__ = ["Fleet", "Started", "results"]

logger = logging.getLogger("vllm.weightwire.publisher")

T = TypeVar("T")
Started = Mapping[str, "Future[T | WeightwireError]"]


class Fleet:
    """Engines, and the threads that speak to them. `deadline` is a time of `time.monotonic`."""

    def __init__(self, engines: Sequence[Engine], deadline: float) -> None:
        self.engines = list(engines)
        self.deadline = deadline
        self._pool = ThreadPoolExecutor(max_workers=max(1, 2 * len(self.engines)), thread_name_prefix="weightwire")

    def left(self) -> float:
        """Seconds until the deadline; raises `DeadlineError` after it."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise DeadlineError("the publish ran out of time", next_step="Raise `deadline`, or look at the engine.")
        return left

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Work that goes on beside what the others do."""
        return self._pool.submit(work)

    def start(self, phase: str, work: Callable[[Engine], T]) -> Started[T]:
        """The same on every engine at once: by the engine's name, what will come of it, or the error."""

        def guarded(engine: Engine) -> T | WeightwireError:
            try:
                return work(engine)
            except WeightwireError as error:
                return error.at(engine=engine.name, phase=phase)
            except Exception as error:
                logger.exception("weightwire: %s: %s", engine.name, phase)
                return EngineError(f"unexpected {error!r}", engine=engine.name, phase=phase)

        return {engine.name: self._pool.submit(guarded, engine) for engine in self.engines}

    def each(self, phase: str, work: Callable[[Engine], T]) -> dict[str, T]:
        """The same, once all have answered; raises the first error."""
        return results(self.start(phase, work))

    def close(self) -> None:
        """Leave threads that still wait for an engine to end by themselves."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def results(started: Started[T]) -> dict[str, T]:
    """What `Fleet.start` has started, once all have answered; raises the first error."""
    found: dict[str, T] = {}
    errors: list[WeightwireError] = []
    for name, job in started.items():
        if isinstance(outcome := job.result(), WeightwireError):
            errors.append(outcome)
        else:
            found[name] = outcome
    if errors:
        raise errors[0]
    return found
