"""Weights sharded over two GPUs into a real vLLM on one of them.

pytest -m gpu tests/gpu/test_fsdp.py        # needs vLLM and two GPUs
"""

from __future__ import annotations

from typing import Any

import pytest

from support.gpu import gpu, run, two_gpus

pytestmark = [*gpu, two_gpus]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run("fsdp_gpu.py", tmp_path_factory.mktemp("fsdp"))


def test_what_two_ranks_hold_goes_from_gpu_to_gpu_and_is_what_a_fresh_engine_loads(results: dict[str, Any]) -> None:
    whole = {"version": 1, "transport": "nccl", "gathers": True, "kind": "dense", "proven": ["read back"]}
    assert results["whole"] == [whole, whole]
    assert results["updated"] == results["fresh"] != results["before"]


def test_an_exception_on_rank_1_is_an_error_on_both(results: dict[str, Any]) -> None:
    for result in results["breaks"]:
        assert "rank 1" in result["error"]
        assert "cannot read" in result["error"]
        assert result["seconds"] < 60


def test_a_rank_that_dies_while_others_gather_is_an_error_and_the_next_update_is_fine(results: dict[str, Any]) -> None:
    assert "in vain" in results["dies"][0]["error"]
    assert results["dies"][1] == {"code": -9}
    assert results["still"] == results["updated"]


def test_each_rank_encodes_what_it_has_on_its_gpu(results: dict[str, Any]) -> None:
    for result in results["deltas"]:
        assert (result["version"], result["kind"], result["proven"]) == (5, "delta", ["read back"])
    assert results["changed"] != results["updated"]
    assert [result["version"] for result in results["after"]] == [6, 6]
    assert results["back"] == results["updated"]
