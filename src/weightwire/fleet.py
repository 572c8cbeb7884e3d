"""The engines of one publish: asked all at once, until its deadline."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from weightwire.engines.base import Engine
from weightwire.errors import DeadlineError, EngineError, WeightwireError

__all__ = ["Fleet"]

logger = logging.getLogger("vllm.weightwire.publisher")

T = TypeVar("T")


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

    def outcomes(
        self, phase: str, work: Callable[[Engine], T], meanwhile: Callable[[], None] = lambda: None
    ) -> dict[str, T | WeightwireError]:
        """The same on every engine at once, and something else here: what came of it, or the error, by the engine's
        name."""

        def guarded(engine: Engine) -> T | WeightwireError:
            try:
                return work(engine)
            except WeightwireError as error:
                return error.at(engine=engine.name, phase=phase)
            except Exception as error:
                logger.exception("weightwire: %s: %s", engine.name, phase)
                return EngineError(f"unexpected {error!r}", engine=engine.name, phase=phase)

        jobs = {engine.name: self._pool.submit(guarded, engine) for engine in self.engines}
        try:
            meanwhile()
        finally:
            outcomes = {name: job.result() for name, job in jobs.items()}
        return outcomes

    def each(
        self, phase: str, work: Callable[[Engine], T], meanwhile: Callable[[], None] = lambda: None
    ) -> dict[str, T]:
        """The same; raises the first error, once all have answered."""
        outcomes = self.outcomes(phase, work, meanwhile)
        for outcome in outcomes.values():
            if isinstance(outcome, WeightwireError):
                raise outcome
        return outcomes  # type: ignore[return-value]

    def close(self) -> None:
        """Leave threads that still wait for an engine to end by themselves."""
        self._pool.shutdown(wait=False, cancel_futures=True)
