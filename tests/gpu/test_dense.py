"""Whole models into a real vLLM on GPUs.

pytest -m gpu tests/gpu/test_dense.py        # needs vLLM; some need two GPUs
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SCRIPTS = Path(__file__).parent.parent / "vllm"
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
# family, tied embeddings, dtype, tensor parallel, LoRA enabled, a partial update as well, transport, CUDA graphs
CASES = [
    pytest.param("qwen3", "tied", "bfloat16", 1, "lora", "parts", "cuda-ipc", "0"),
    pytest.param("llama", "untied", "bfloat16", 1, "no", "whole", "cuda-ipc", "1"),
    pytest.param("gemma", "tied", "bfloat16", 1, "no", "whole", "shm", "0"),
    pytest.param("llama", "untied", "float32", 1, "no", "whole", "gloo", "0"),
    pytest.param("qwen3", "untied", "bfloat16", 2, "no", "parts", "cuda-ipc", "0", marks=two_gpus),
    pytest.param("llama", "tied", "bfloat16", 2, "lora", "parts", "shm", "1", marks=two_gpus),
]


@pytest.mark.parametrize(("family", "tied", "dtype", "ranks", "lora", "parts", "transport", "graphs"), CASES)
def test_an_updated_engine_equals_a_fresh_one(
    family: str, tied: str, dtype: str, ranks: int, lora: str, parts: str, transport: str, graphs: str, tmp_path: Path
) -> None:
    arguments = (family, tied, dtype, ranks, lora, parts, tmp_path)
    results = run(SCRIPTS / "exactness.py", *arguments, TRANSPORT=transport, CUDA_GRAPHS=graphs)

    def outputs(name: str) -> list[object]:
        return [(output["tokens"], output["logprobs"]) for output in results[name]]

    assert outputs("second published") == outputs("second loaded")
    assert outputs("first published") == outputs("first loaded") != outputs("second loaded")
    assert set(results["receipt"]["proven"].values()) == {"read back"}
    assert results["receipt"]["transport"] == transport
    if parts == "parts":
        assert outputs("part published") == outputs("part loaded") != outputs("second loaded")
        assert 0 < results["partial receipt"]["parameters"] < results["receipt"]["parameters"]


def test_a_hundred_updates_leave_memory_as_it_was(tmp_path: Path) -> None:
    results = run(SCRIPTS / "hundred.py", tmp_path)
    for transport in ("cuda-ipc", "shm"):
        first, last = results[transport]
        assert abs(first - last) <= 64 << 20, (transport, first, last)


@two_gpus
def test_a_trainer_that_dies_while_it_sends(tmp_path: Path) -> None:
    results = run(SCRIPTS / "killed.py", tmp_path)
    assert results["killed"]["state"] == "idle"
    assert results["killed"]["version"] == 1
    assert results["killed"]["same tokens"]
    assert results["seconds"] < results["lease"] + 60
    assert results["after"] == {"version": 3, "transport": "nccl"}


def run(script: Path, *arguments: object, **environment: str) -> dict[str, Any]:
    path = os.pathsep.join(filter(None, (str(SCRIPTS), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])
