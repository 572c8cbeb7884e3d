"""A real server that is made to fail: no room, a commit that breaks, and at last a worker that is killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import apart, logprobs

import weightwire as ww
from conftest import Server, serving
from weightwire.sources.tensors import ModuleSource

PROMPT = [10, 20, 30, 40]
API_KEY = "the-api-key-of-vllm"


@pytest.fixture(scope="module")
def victim(served_model: Any, folder: Path) -> Iterator[Server]:
    """A server with vLLM's own API key, and workers that can be told to fail."""
    flags = ("--dtype", "float32", "--worker-extension-cls", "faults.FaultyWorker")
    with serving(folder / "model", folder, *flags, api_key=API_KEY, VLLM_SERVER_DEV_MODE="1") as running:
        yield running


def test_both_the_api_key_and_the_token_are_needed(victim: Server, trained: Any) -> None:
    for token, api_key in ((None, API_KEY), ("wrong", API_KEY), (victim.token, None), (victim.token, "wrong")):
        with (
            ww.connect(victim.url, token=token, api_key=api_key) as engines,
            ww.Publisher(trained, engines) as publisher,
            pytest.raises(ww.AuthError),
        ):
            publisher.publish(1)
    assert victim.version() is None


def test_no_room_for_the_staged_copy(victim: Server, trained: Any) -> None:
    before = victim.generate(PROMPT)
    victim.worker_rpc("limit_staging", 100_000)
    # The embedding has its rows padded to a multiple of 64. It and the head tied to it each have a packing beside it.
    rows, width = trained.get_input_embeddings().weight.shape
    need = 4 * (sum(p.numel() for p in trained.parameters()) + (3 * (-(-rows // 64) * 64) - rows) * width)
    with victim.engines() as engines, ww.Publisher(trained, engines) as publisher:
        with pytest.raises(ww.RoomError, match=f"needs {need} bytes on rank 0, 100000 may be used"):
            publisher.publish(1)
        assert victim.generate(PROMPT) == before
        victim.worker_rpc("lift_limit")
        publisher.publish(1)
    _serves(victim, trained)


def test_a_packing_that_does_not_hold_its_weight_is_refused_before_anything_changes(
    victim: Server, trained: Any
) -> None:
    version = victim.version()
    before = victim.generate(PROMPT)
    victim.worker_rpc("spoil_next_packing")
    with victim.engines() as engines, ww.Publisher(trained, engines) as publisher:
        with pytest.raises(ww.UnsupportedError, match="does not hold the weight it was made from"):
            publisher.publish((version or 0) + 1)
        assert victim.version() == version
        assert victim.generate(PROMPT) == before
        publisher.publish((version or 0) + 1)
    _serves(victim, trained)


def test_packings_are_asked_on_the_engines_own_thread_only(victim: Server, trained: Any) -> None:
    # vLLM's oneDNN products share a scratchpad: beside a model step, one could spoil the other's result.
    victim.worker_rpc("watch_products")
    with victim.engines() as engines, ww.Publisher(trained, engines) as publisher:
        receipt = publisher.publish((victim.version() or 0) + 1)
    assert "asked" in receipt.engines[victim.url].proven.values()
    ((main, *asking),) = victim.worker_rpc("watched_threads")
    assert asking == [main]


def test_a_broken_commit_poisons_and_a_full_update_heals(victim: Server, served_model: Any, trained: Any) -> None:
    version = (victim.version() or 0) + 1
    started, ended = threading.Event(), threading.Event()
    victim.worker_rpc("fail_next_commit", 0)
    with victim.engines() as engines, ThreadPoolExecutor(3) as pool:
        # Of different lengths, one after the other: some are in flight whenever the commit comes.
        in_flight = [pool.submit(_stream_on, victim, tokens, started, ended) for tokens in (130, 170, 240)]
        try:
            assert started.wait(120)
            with (
                ww.Publisher(trained, engines) as publisher,
                pytest.raises(ww.PoisonedError, match=r"http.*commit: .*injected"),
            ):
                publisher.publish(version)
        finally:
            ended.set()
        assert "abort" in [job.result(timeout=60) for job in in_flight]
        status = engines[0].status()
        assert (status.state, status.version) == ("poisoned", version - 1 or None)
        for path, body in (
            ("/v1/completions", {"model": victim_model(victim), "prompt": "abc", "max_tokens": 4}),
            ("/inference/v1/generate", {"token_ids": PROMPT, "sampling_params": {"max_tokens": 4}}),
        ):
            reply = victim.client.post(path, json=body)
            assert reply.status_code == 503, reply.text
            assert "injected" in reply.json()["error"]["message"]
            assert reply.json()["error"]["code"] == "poisoned"
        part = {n: t for n, t in trained.state_dict().items() if "norm" in n}
        with ww.Publisher(part, engines) as publisher, pytest.raises(ww.PoisonedError, match="partial"):
            publisher.publish(version, partial=True)
        with ww.Publisher(trained, engines) as publisher:
            publisher.publish(version)
        assert engines[0].status().poisoned is None
    _serves(victim, trained)


def test_a_killed_worker_ends_the_publish_and_leaves_the_other_engine_alone(
    victim: Server, server: Server, served_model: Any, trained: Any
) -> None:
    before, version = server.generate(PROMPT), server.version()
    (worker,) = victim.worker_rpc("process_id")

    class Killing(ModuleSource):
        def read(self, tensor: int, start: int, out: torch.Tensor) -> Any:
            if tensor == 9:
                os.kill(int(worker), signal.SIGKILL)
            return super().read(tensor, start, out)

    both = ww.connect([victim.engines()[0], server.engines()[0]])
    began = time.monotonic()
    with (
        both,
        ww.Publisher(Killing(trained), both, transport="shm", bucket_bytes=65536, deadline=120) as publisher,
        pytest.raises(ww.EngineError, match=rf"{victim.url}: (stage|seal|begin)") as lost,
    ):
        publisher.publish(max(version or 0, 100) + 1)
    assert time.monotonic() - began < 150
    assert lost.value.engine == victim.url
    assert server.generate(PROMPT) == before
    assert server.version() == version
    with server.engines() as engines, ww.Publisher(served_model, engines) as publisher:
        publisher.publish((version or 0) + 1)


def victim_model(server: Server) -> str:
    return str(server.client.get("/v1/models").json()["data"][0]["id"])


def _serves(server: Server, model: Any) -> None:
    output = server.generate(PROMPT)
    assert apart(output["logprobs"], logprobs(model, PROMPT, output["tokens"])) < 1e-3


def _stream_on(server: Server, tokens: int, started: threading.Event, ended: threading.Event) -> str:
    """Stream until one stream does not reach its length, or `ended`; why the last one stopped."""
    body = {"token_ids": PROMPT, "sampling_params": {"max_tokens": tokens, "ignore_eos": True}, "stream": True}
    reason = "length"
    while reason == "length" and not ended.is_set():
        reason = "refused"
        with server.client.stream("POST", "/inference/v1/generate", json=body) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    started.set()
                    for choice in json.loads(line[6:]).get("choices", ()):
                        reason = choice["finish_reason"] or reason
    return reason
