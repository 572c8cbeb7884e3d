"""An `LLM` or `AsyncLLM` of this process as an engine: what `connect(llm)` makes."""

from __future__ import annotations

import asyncio
from typing import Any

from weightwire.engines.local import LocalEngine
from weightwire.engines.vllm.host import AsyncHost, SyncHost, kind_of
from weightwire.errors import UsageError

__all__ = ["VllmEngine"]


class VllmEngine(LocalEngine):
    """`engine`: an `LLM`, or an `AsyncLLM` connected to from within the event loop that runs it."""

    def __init__(self, engine: Any) -> None:
        kind = kind_of(engine)
        name = f"{kind}:{id(engine):x}"
        if kind == "LLM":
            super().__init__(SyncHost(engine, name))
        elif kind == "AsyncLLM":
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError as error:
                raise UsageError(
                    "an AsyncLLM is connected to from within its event loop",
                    next_step="Call weightwire.connect(engine) in a coroutine, and publish by asyncio.to_thread.",
                ) from error
            super().__init__(AsyncHost(engine, name), loop)
        else:
            raise UsageError(
                f"cannot connect to a vLLM {type(engine).__name__}", next_step="Pass an LLM or an AsyncLLM."
            )
