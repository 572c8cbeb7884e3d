"""Trainers written to OpenRLHF's worker interface, or to issue 5723's loop, into a real engine with two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import run_script

SECONDS = 600


@pytest.fixture(scope="module")
def came(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each scenario of `openrlhf_process.py` came to; they share an engine, and follow each other."""
    folder: Path = tmp_path_factory.mktemp("openrlhf")
    with pytest.MonkeyPatch.context() as patch:
        # As OpenRLHF sets it for its engines, since it hands them torch's own dtype.
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        return run_script("openrlhf_process.py", folder, "gloo", folder=folder, seconds=SECONDS)


def check(came: dict[str, Any], *, version: int) -> None:
    """The engine generates what a model with these weights generates, and says which version that is."""
    assert came["same tokens"], came
    assert came["apart"] < 1e-3, came
    assert (came["version"], came["state"]) == (version, "idle")


def test_a_whole_loop_goes_live_with_its_last_parameter(came: Any) -> None:
    assert came["at first"]["same tokens"]
    assert came["whole loop"]["came"]["sent"] == 24
    check(came["whole loop"], version=1)
    assert came["whole loop"]["transport"] == "broadcast"
    assert came["whole loop"]["ranks"] == 2
    assert set(came["whole loop"]["proven"]) <= {"read back", "asked"}


def test_the_issues_own_loop_passes_three_arguments(came: Any) -> None:
    assert came["three arguments"]["came"]["sent"] == 24
    check(came["three arguments"], version=2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("name", "no place for other.model"),
        ("shape", "shape (34,) does not fit"),
        ("slice", "has 16640 elements, of which the model takes 16384"),
        ("kind", "is int64, and"),
        ("nan", "NaN or Inf in model"),
        ("last", "nothing was sent for model"),
    ],
)
def test_what_is_wrong_is_an_error_at_that_call_and_changes_nothing(came: Any, wrong: str, message: str) -> None:
    outcome = came[f"wrong {wrong}"]
    assert message in outcome["came"]["error"]
    assert outcome["came"]["seconds"] < 60
    check(outcome, version=2)


def test_the_group_is_of_use_after_errors(came: Any) -> None:
    assert came["after all that"]["came"]["sent"] == 24
    check(came["after all that"], version=3)


def test_a_publisher_and_such_a_trainer_take_turns(came: Any) -> None:
    check(came["published"], version=20)
    check(came["after a publish"], version=21)
    assert "held by somebody, which is sending version 30" in came["busy"]["came"]["error"]
    check(came["busy"], version=21)


def test_updates_are_refused_while_the_engine_sleeps(came: Any) -> None:
    by_loop, by_publisher = came["asleep"]["came"]
    assert "Wake it up first" in by_loop["error"]
    assert "StateError: LLM" in by_publisher["error"]
    assert "begin: the engine sleeps" in by_publisher["error"]
    assert "Wake it up first" in by_publisher["error"]
    check(came["asleep"], version=21)
    check(came["awake"], version=41)


def test_a_commit_is_refused_while_the_engine_sleeps_and_poisons_nothing(came: Any) -> None:
    refused, version = came["asleep before its commit"]["came"]
    assert "commit: the engine sleeps" in refused["error"]
    assert refused["state"] == "sealed"
    assert version == 40
    check(came["asleep before its commit"], version=40)


def test_a_trainer_that_dies_leaves_the_old_version_serving(came: Any) -> None:
    assert "the broadcast failed" in came["died"]["came"]["lost"]
    assert came["died"]["came"]["seconds"] < 120
    check(came["died"], version=41)
    assert "Call init_process_group first" in came["joined no group"]["came"]["error"]
    assert "CUDA IPC, and this worker is on cpu" in came["shared memory"]["came"]["error"]
    assert came["another trainer"]["came"]["sent"] == 24
    check(came["another trainer"], version=42)


def test_joining_again_replaces_the_group(came: Any) -> None:
    assert came["joined again"]["came"][1]["sent"] == 24
    check(came["joined again"], version=43)


def test_one_rank_failing_in_its_commit_leaves_nothing_that_generates(came: Any) -> None:
    assert "the commit failed on rank 1" in came["poisoned"]["came"]["error"]
    assert came["poisoned"]["state"] == "poisoned"
    assert "EngineDeadError" in came["poisoned"]["generating"]
