"""Engines in Ray actors: a real Ray, and a real vLLM in each actor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from conftest import run_script
from weightwire.errors import UsageError, WeightwireError

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("ray")
    return run_script("ray_actors.py", folder, folder=folder, seconds=600)


@pytest.mark.parametrize("step", ["first", "second", "third", "adapter", "healed"])
def test_both_actors_generate_what_the_published_model_does(found: dict[str, Any], step: str) -> None:
    outputs = [found[f"{step}: {name}"] for name in ("whole", "streaming")]
    for output in outputs:
        assert output["tokens"] == output["greedy"]
        assert output["apart"] < 1e-3
    assert outputs[0]["tokens"] == outputs[1]["tokens"]
    others = [found[f"{other}: whole"]["tokens"] for other in ("first", "second", "third", "adapter") if other != step]
    assert step == "healed" or outputs[0]["tokens"] not in others


def test_one_version_for_both_over_shared_memory(found: dict[str, Any]) -> None:
    assert found["transports"] == ["shm", "shm"]
    for name in ("whole", "streaming"):
        versions = [found[f"{step}: {name}"]["versions"] for step in ("second", "third", "healed")]
        assert versions == [["1"], ["2"], ["4"]]


def test_an_asynchronous_actor_generates_while_it_is_updated(found: dict[str, Any]) -> None:
    assert found["meanwhile"] == ["1", "2"]


def test_an_adapter_is_found_by_its_name_in_both(found: dict[str, Any]) -> None:
    assert found["adapter"] == 1
    assert found["listed"] == {name: [{"name": "policy", "version": 1, "versions": [1]}] for name in found["names"]}


def test_a_poisoned_engine_refuses_in_its_actor_until_it_is_healed(found: dict[str, Any]) -> None:
    whole, streaming = found["names"]
    assert "injected" in found["outcomes"][whole]
    assert "injected" not in found["outcomes"][streaming]
    assert "injected" in found["refused"]


def test_an_actor_killed_in_the_middle_of_an_update_is_named_by_the_deadline(found: dict[str, Any]) -> None:
    kind, message, engine, seconds = found["killed"]
    assert kind == "EngineLost"
    assert engine == found["names"][1]
    assert "Streaming" in message
    assert seconds < 60
    assert found["survivor"] == 4
    assert found["survivor: whole"]["tokens"] == found["healed: whole"]["tokens"]


def test_an_actor_that_is_dead_or_has_no_engine_is_refused_by_name(found: dict[str, Any]) -> None:
    kind, message = found["dead"]
    assert kind == "EngineLost"
    assert "Streaming" in message
    kind, message = found["empty"]
    assert kind == "UsageError"
    assert "Nothing" in message
    assert "0 LLMs or AsyncLLMs" in message


def test_nothing_is_left_behind(found: dict[str, Any]) -> None:
    assert found["left over"] == []


class Holder:
    """An actor's instance as `answer` gets it, with objects that say they are vLLM's."""

    def __init__(self, *kinds: str) -> None:
        for number, kind in enumerate(kinds):
            setattr(self, f"engine{number}", type(kind, (), {"__module__": "vllm.somewhere"})())


class AsyncHolder(Holder):
    async def generate(self) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("actor", "said"),
    [
        (Holder(), "0 LLMs or AsyncLLMs"),
        (Holder("LLM", "AsyncLLM"), "2 LLMs or AsyncLLMs"),
        (Holder("AsyncLLM"), "not made on an event loop"),
        (AsyncHolder("LLM"), "one call at a time"),
    ],
    ids=["none", "two", "no loop", "beside others"],
)
def test_an_actor_whose_engine_cannot_be_told_or_asked(actor: Holder, said: str) -> None:
    from weightwire.engines.vllm.ray import answer

    reply = msgspec.msgpack.decode(answer(actor, "", "Actor(Holder, 1)", b""))
    error = WeightwireError.from_wire(reply["error"])
    assert isinstance(error, UsageError)
    assert error.engine == "Actor(Holder, 1)"
    assert said in error.message
