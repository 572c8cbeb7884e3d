"""Deltas into real servers, of one rank and of two: exactly what the dense update is, and undone where one fails."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import apart, logprobs

import weightwire as ww
from conftest import Server, serving

PROMPT = [10, 20, 30, 40]


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def engine(request: pytest.FixtureRequest, served_model: Any, folder: Path) -> Iterator[Server]:
    """A server whose workers can be told to fail."""
    ranks = str(request.param)
    flags = ("--dtype", "float32", "--tensor-parallel-size", ranks, "--worker-extension-cls", "faults.FaultyWorker")
    with serving(folder / "model", folder, *flags, VLLM_SERVER_DEV_MODE="1") as running:
        yield running


def step(model: Any, seed: int, share: float = 0.01) -> None:
    """As an optimiser might: a few elements of each parameter change."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            chosen = torch.rand(parameter.shape, generator=generator) < share
            parameter[chosen] *= 1.5


def serves(server: Server, model: Any) -> dict[str, Any]:
    output = server.generate(PROMPT)
    assert apart(output["logprobs"], logprobs(model, PROMPT, output["tokens"])) < 1e-3
    return output


def said(output: dict[str, Any]) -> tuple[Any, Any]:
    return output["tokens"], output["logprobs"]


def test_deltas_follow_each_other_and_equal_the_dense_update(engine: Server, served_model: Any) -> None:
    model = copy.deepcopy(served_model)
    dense = sum(parameter.nbytes for parameter in model.parameters())
    with engine.engines() as engines, ww.Publisher(model, engines, baseline="host") as publisher:
        assert publisher.publish(1).kind == "dense"
        for version in (2, 3):
            step(model, version)
            receipt = publisher.publish(version)
            assert receipt.kind == "delta", receipt.why
            assert receipt.nbytes < dense / 20
            assert set(receipt.engines[engine.url].proven.values()) <= {"read back", "asked"}
            output = serves(engine, model)
            assert output["versions"][0][0] == str(version)
        publisher.publish(4, kind="dense")
        assert said(engine.generate(PROMPT)) == said(output)


def test_a_failed_commit_is_undone_on_every_rank(engine: Server, served_model: Any) -> None:
    model = copy.deepcopy(served_model)
    ranks = 2 if len(engine.worker_rpc("process_id")) == 2 else 1
    with engine.engines() as engines, ww.Publisher(model, engines, baseline="host") as publisher:
        publisher.publish(10)
        before = engine.generate(PROMPT)
        step(model, 5)
        for rank in range(ranks):
            engine.worker_rpc("fail_next_commit", rank)
            with pytest.raises(ww.EngineError, match=f"the commit failed on rank {rank}, which has its old weights"):
                publisher.publish(11)
            assert engine.generate(PROMPT) == before
            assert (engines[0].status().state, engines[0].status().version) == ("idle", 10)
        assert publisher.publish(11).kind == "delta"
        serves(engine, model)


def test_a_server_that_missed_updates_gets_them_as_one_delta(engine: Server, served_model: Any) -> None:
    model, beside = copy.deepcopy(served_model), copy.deepcopy(served_model)
    with engine.engines() as engines, contextlib.closing(ww.TransformersEngine(beside, name="beside")) as other:
        with ww.Publisher(model, [*engines, other], baseline="host") as publisher:
            publisher.publish(12)
            before = engine.generate(PROMPT)
            for version in (13, 14):
                step(model, version)
                engine.worker_rpc("fail_next_commit", 0)
                with pytest.raises(ww.PublishError, match="which has its old weights"):
                    publisher.publish(version)
                assert engine.generate(PROMPT) == before
            step(model, 15)
            assert f"{engine.url}: delta from 12 through 3 deltas" in publisher.publish(15, kind="delta").why
            output = serves(engine, model)
            publisher.publish(16, kind="dense")
            assert said(engine.generate(PROMPT)) == said(output)


def test_a_worker_without_the_base_gets_everything(engine: Server, served_model: Any) -> None:
    model = copy.deepcopy(served_model)
    with engine.engines() as engines, ww.Publisher(model, engines, baseline="host") as publisher:
        publisher.publish(20)
        with ww.Publisher(served_model, engines) as other:
            other.publish(21)
        step(model, 6)
        with pytest.raises(ww.VersionError, match="the delta starts from version 20, here is 21"):
            publisher.publish(22, kind="delta")
        receipt = publisher.publish(22)
        assert receipt.kind == "dense"
        assert "the delta was refused" in receipt.why
        serves(engine, model)
