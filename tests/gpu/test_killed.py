"""Whoever dies while an update is on its way: an error in time, the old version is served, the next update is fine.

pytest -m gpu tests/gpu/test_killed.py        # needs vLLM; some need two GPUs
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.gpu import gpu, run, two_gpus

pytestmark = gpu

_HOLD_SECONDS = 20  # for which a sealed update is kept at least


@two_gpus
def test_a_trainer_that_dies_while_it_sends(tmp_path: Path) -> None:
    results = run("killed.py", tmp_path)
    assert results["killed"]["state"] == "idle"
    assert results["killed"]["version"] == 1
    assert results["killed"]["same tokens"]
    assert results["killed"]["seconds"] < results["lease"] + 60
    assert results["after"] == {"version": 3, "transport": "nccl"}


@pytest.mark.parametrize("transport", [pytest.param("nccl", marks=two_gpus), "cuda-ipc"])
def test_a_worker_that_dies_in_the_middle_of_an_update(transport: str, tmp_path: Path) -> None:
    results = run("killed_worker.py", tmp_path, transport)
    lost, url = results["lost"], f"unix:{tmp_path}/victim"
    assert (lost["error"], lost["engine"]) == ("EngineLost", url), lost
    assert lost["phase"] in ("begin", "stage", "seal")  # the first buckets go while it begins
    assert results["seconds"] < results["deadline"]
    assert results["victim"]["error"] == "EngineLost"
    assert results["old"] == {"state": "idle", "version": 1, "same text": True}
    versions = [after["version"] for after in results["after"]]
    assert versions == ([2, 3] if transport == "nccl" else [3])
    for after in results["after"]:
        assert (after["transport"], after["proven"]) == (transport, ["read back"])
    assert results["new"] == {"state": "idle", "version": 3, "same text": False}
    assert results["exit"] == 0


def test_lent_memory_that_is_closed_too_early(tmp_path: Path) -> None:
    results = run("closed_memory.py", tmp_path)
    updated = {"transport": "cuda-ipc", "proven": ["read back"]}
    assert updated.items() <= results["first"].items()
    # Killed: what nobody had opened cannot be opened, what was opened is let go of when the lease ends.
    assert results["opened too late"]["error"] == "TransportError", results["opened too late"]
    for how in ("lent", "staged", "sealed"):
        died = results[how]
        assert (died["state"], died["version"], died["same text"]) == ("idle", 1, True), (how, died)
        assert died["seconds"] < max(results["lease"], _HOLD_SECONDS) + 15, (how, died)
    assert results["next"].items() >= {**updated, "version": 2}.items()
    # Freed before it was opened: refused. Freed after it was sealed: it is there for as long as it is open.
    early, late = results["freed before"], results["freed after"]
    assert early["error"] in ("TransportError", "VerificationError"), early
    assert (early["state"], early["version"], early["text"]) == ("idle", 2, results["next"]["text"])
    assert results["after freed before"].items() >= {**updated, "version": 4}.items()
    assert (late["error"], late["version"], late["proven"]) == (None, 5, ["read back"]), late
    assert results["after freed after"].items() >= {**updated, "version": 6}.items()
    assert results["exit"] == 0
    # Once nothing is heard of a trainer any more, its memory is no longer kept open.
    assert results["used"][-1] < results["used"][0] + results["weights"] // 2, results["used"]
