"""Two trainer ranks into an engine with two ranks: sharded on both sides, one update."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
from reference import apart, logprobs

import weightwire as ww
from conftest import ENVIRONMENT, Server, serving

PROMPT = [10, 20, 30, 40]


@pytest.fixture(scope="module")
def pair(served_model: Any, folder: Path) -> Iterator[Server]:
    """A server of two tensor-parallel ranks, whose workers can be told to fail."""
    flags = ("--dtype", "float32", "--tensor-parallel-size", "2", "--worker-extension-cls", "faults.FaultyWorker")
    with serving(folder / "model", folder, *flags, VLLM_SERVER_DEV_MODE="1") as running:
        yield running


def _ranks(server: Server, path: Path, version: int, mode: str) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = str(Path(__file__).parent / "fsdp_ranks.py")
    command = [sys.executable, script, server.url, server.token, str(path), str(version), mode]
    common = {**os.environ, **ENVIRONMENT, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            command, env={**common, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        results = []
        for process in processes:
            out, err = process.communicate(timeout=400)
            assert process.returncode == 0, err[-4000:]
            results.append(json.loads(out.splitlines()[-1]))
        return results
    finally:
        for process in processes:
            process.kill()


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
