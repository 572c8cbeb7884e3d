"""Whole models into a real vLLM on GPUs.

pytest -m gpu tests/gpu/test_dense.py        # needs vLLM; some need two GPUs
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.gpu import gpu, run, two_gpus

pytestmark = gpu

# family, tied embeddings, dtype, tensor parallel, LoRA enabled, a partial update as well, transport, CUDA graphs
CASES = [
    pytest.param("qwen3", "tied", "bfloat16", 1, "lora", "parts", "cuda-ipc", "0"),
    pytest.param("llama", "untied", "bfloat16", 1, "no", "whole", "cuda-ipc", "1"),
    pytest.param("gemma", "tied", "bfloat16", 1, "no", "whole", "shm", "0"),
    pytest.param("llama", "untied", "float32", 1, "no", "whole", "gloo", "0"),
    # Its loader computes: with staging="lent" too, what comes of it is staged.
    pytest.param("falcon", "tied", "bfloat16", 1, "no", "parts", "cuda-ipc", "0"),
    pytest.param("falcon", "tied", "float32", 1, "no", "whole", "shm", "0"),
    pytest.param("qwen3", "untied", "bfloat16", 2, "no", "parts", "cuda-ipc", "0", marks=two_gpus),
    pytest.param("llama", "tied", "bfloat16", 2, "lora", "parts", "shm", "alone", marks=two_gpus),
]


@two_gpus
@pytest.mark.parametrize("transport", ["cuda-ipc"])
def test_what_is_read_into_live_weights_equals_a_fresh_engine(transport: str, tmp_path: Path) -> None:
    """On two ranks, of which one is on the trainer's GPU."""
    arguments = ("qwen3", "untied", "bfloat16", 2, "no", "whole", tmp_path)
    results = run("exactness.py", *arguments, TRANSPORT=transport, CUDA_GRAPHS="0", STAGING="none")
    for which in ("first", "second"):
        published, loaded = results[f"{which} published"], results[f"{which} loaded"]
        assert [(o["tokens"], o["logprobs"]) for o in published] == [(o["tokens"], o["logprobs"]) for o in loaded]
    assert results["receipt"]["transport"] == transport
    assert results["receipt"]["pause"] > 0


@pytest.mark.parametrize(("family", "tied", "dtype", "ranks", "lora", "parts", "transport", "graphs"), CASES)
def test_an_updated_engine_equals_a_fresh_one(
    family: str, tied: str, dtype: str, ranks: int, lora: str, parts: str, transport: str, graphs: str, tmp_path: Path
) -> None:
    arguments = (family, tied, dtype, ranks, lora, parts, tmp_path)
    results = run("exactness.py", *arguments, TRANSPORT=transport, CUDA_GRAPHS=graphs)

    def outputs(name: str) -> list[object]:
        return [(output["tokens"], output["logprobs"]) for output in results[name]]

    assert outputs("second published") == outputs("second loaded")
    assert outputs("first published") == outputs("first loaded") != outputs("second loaded")
    assert set(results["receipt"]["proven"].values()) == {"read back"}
    computed = [name for name in results["receipt"]["proven"] if "query_key_value" in name]
    assert results["receipt"]["computed"] == sorted(computed)
    assert results["receipt"]["transport"] == transport
    if parts == "parts":
        assert outputs("part published") == outputs("part loaded") != outputs("second loaded")
        assert 0 < results["partial receipt"]["parameters"] < results["receipt"]["parameters"]


def test_a_hundred_updates_leave_memory_as_it_was(tmp_path: Path) -> None:
    results = run("hundred.py", tmp_path)
    for transport in ("cuda-ipc", "shm"):
        first, last = results[transport]
        assert abs(first - last) <= 64 << 20, (transport, first, last)
