"""What a host over vLLM's own objects owes them, without vLLM."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from weightwire.engines.vllm.host import AsyncHost, SyncHost


class OneAtATime:
    """An `LLM`, which must not be asked by two threads at once."""

    def __init__(self) -> None:
        self.model_config = SimpleNamespace(model="a model")
        self.llm_engine = SimpleNamespace(reset_prefix_cache=self._asked)
        self.answered = 0
        self._busy = threading.Lock()

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[bytes]:
        self._asked()
        return [b""]

    def _asked(self) -> None:
        assert self._busy.acquire(blocking=False)
        time.sleep(0.02)
        self._busy.release()
        self.answered += 1


def test_an_llm_is_asked_one_thing_at_a_time() -> None:
    async def run() -> None:
        host = SyncHost(llm := OneAtATime(), "fake")
        asked = [host.call("poll", b"", None, 60.0) for _ in range(4)]
        await asyncio.gather(*asked, host.pause("keep", keep_cache=False))
        assert llm.answered == 5

    asyncio.run(run())


@pytest.mark.parametrize(("servers", "alone"), [(1, True), (2, False), (None, True)])
def test_one_of_several_api_servers_says_that_it_is_not_the_only_one(servers: int | None, alone: bool) -> None:
    """What it knows of updates that are being begun, the others do not."""
    engine = SimpleNamespace(
        model_config=SimpleNamespace(model="a model"),
        engine_core=SimpleNamespace(**({} if servers is None else {"client_count": servers})),
        output_processor=SimpleNamespace(get_num_unfinished_requests=lambda: 0),
    )
    names = SimpleNamespace(in_use=None, list=None)
    host = AsyncHost(engine, "a", names)  # type: ignore[arg-type]
    assert (host.alone, host.idle) == (alone, alone)
