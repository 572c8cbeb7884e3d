"""What the step `deltas` of tests/vllm/adapters.py must have found, on a CPU and on GPUs."""

from __future__ import annotations

from typing import Any


def check_twins(results: dict[str, Any]) -> None:
    """Every revision that came as a delta serves what its twin from a folder does, also after its eviction."""
    whole, *steps = results["steps"]
    assert whole["why"].startswith("whole: nothing was published before")
    for result in (*steps, results["after"], results["then"]):
        assert result["why"].startswith("delta: "), result["why"]
        assert result["nbytes"] < whole["nbytes"] / 5
    every = [whole, *steps, results["after"], results["other base"], results["then"]]
    for result in every:
        assert result["ours"] == result["twin"]
    assert len({str(result["ours"]) for result in every}) == len(every)
    assert results["evicted"]


def check_failures(results: dict[str, Any]) -> None:
    """One rank failed at each step: nothing changed."""
    for at in ("write", "seal", "check", "commit"):
        assert "injected" in results[at]["error"], at
        assert results[at]["same"], at
