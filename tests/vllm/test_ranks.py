"""Two trainer ranks into an engine with two ranks: sharded on both sides, one update."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
from reference import apart, logprobs

import weightwire as ww
from conftest import ENVIRONMENT, Server, serving
from support.scripts import run_ranks

PROMPT = [10, 20, 30, 40]


@pytest.fixture(scope="module")
def pair(served_model: Any, folder: Path) -> Iterator[Server]:
    """A server of two tensor-parallel ranks, whose workers can be told to fail."""
    flags = ("--dtype", "float32", "--tensor-parallel-size", "2", "--worker-extension-cls", "faults.FaultyWorker")
    with serving(folder / "model", folder, *flags, VLLM_SERVER_DEV_MODE="1") as running:
        yield running


def _ranks(server: Server, path: Path, version: int, mode: str) -> list[dict[str, Any]]:
    script = Path(__file__).parent / "fsdp_ranks.py"
    arguments = (server.url, server.token, path, version, mode)
    ranks = run_ranks(script, *arguments, size=2, seconds=400, environment=ENVIRONMENT)
    for rank in ranks:
        assert rank.code == 0, rank.err[-4000:]
    return [json.loads(rank.out.splitlines()[-1]) for rank in ranks]


def test_two_fsdp_ranks_publish_to_two_engine_ranks(pair: Server, folder: Path) -> None:
    trained = models.new_model("qwen3", tied=True, seed=7)
    path = models.save(trained, folder / "trained")
    results = _ranks(pair, path, 1, "whole")
    assert [result["version"] for result in results] == [2, 2]
    output = pair.generate(PROMPT)
    assert apart(output["logprobs"], logprobs(trained, PROMPT, output["tokens"])) < 1e-3
    assert output["versions"][0][0] == "2"
    for result in results:
        # Two buckets of 1 MiB, and what allocators round up to. The whole model would be 1.2 MB more, at least; the
        # exact bound, on a model of 200 MB, is shown in tests/sources.
        assert result["grown"] <= (2 << 20) + (6 << 20), result


def test_an_exception_on_rank_1_is_an_error_on_both(pair: Server, folder: Path) -> None:
    before, version = pair.generate(PROMPT), pair.version()
    results = _ranks(pair, folder / "model", 50, "break")
    for result in results:
        assert "rank 1" in result["error"]
        assert "cannot read" in result["error"]
        assert result["seconds"] < 60
    assert pair.generate(PROMPT) == before
    assert pair.version() == version


def test_one_engine_rank_failing_in_commit_poisons_both(pair: Server, trained: Any) -> None:
    pair.worker_rpc("fail_next_commit", 1)
    version = (pair.version() or 0) + 1
    with pair.engines() as engines:
        with ww.Publisher(trained, engines) as publisher, pytest.raises(ww.PoisonedError, match="rank 1"):
            publisher.publish(version)
        reply = pair.client.post("/inference/v1/generate", json={"token_ids": PROMPT, "sampling_params": {}})
        assert reply.status_code == 503
        with ww.Publisher(trained, engines) as publisher:
            publisher.publish(version)
    output = pair.generate(PROMPT)
    assert apart(output["logprobs"], logprobs(trained, PROMPT, output["tokens"])) < 1e-3
