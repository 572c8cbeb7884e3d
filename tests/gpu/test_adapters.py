"""LoRA adapters from memory in a real vLLM on GPUs, against the same adapters in folders.

pytest -m gpu tests/gpu/test_adapters.py        # needs vLLM; some need two GPUs
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.adapter_deltas import check_failures, check_twins
from support.gpu import gpu, run, two_gpus

pytestmark = gpu
_NOT_VARIANTS = ("base", "base again")


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=two_gpus)])
def test_adapters_equal_their_twins(ranks: int, tmp_path: Path) -> None:
    results: dict[str, Any] = run("adapters.py", "qwen3", "bfloat16", ranks, "variants,traps,deltas,failures", tmp_path)
    variants = results["variants"]
    assert variants["base"] == variants["base again"]
    kinds = {n: r for n, r in variants.items() if n not in _NOT_VARIANTS and "refused" not in r}
    assert len(kinds) >= 7
    for name, result in kinds.items():
        assert result["ours"] == result["twin"] != variants["base"], name
        assert set(result["proven"].values()) == {"read back"}, name
        assert len(result["held"]) == ranks
    check_twins(results["deltas"])
    check_failures(results["deltas"])
    traps = results["traps"]
    assert traps["loads"] == [1] * ranks
    for version in ("long 7", "long 8"):
        first, again = traps[version]["ours"]
        assert first == again == traps[version]["twin"]
        assert traps[version]["cached"][0] == 0
