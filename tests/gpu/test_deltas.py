"""Deltas on GPUs: the kernels as compiled, and a real vLLM that takes deltas into its live parameters.

pytest -m gpu tests/gpu/test_deltas.py        # the second needs vLLM; one of its cases needs two GPUs
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

TESTS = Path(__file__).parent.parent
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("file", ["delta.py", "device_delta.py", "baseline_device.py"])
def test_the_kernels_as_compiled(file: str) -> None:
    run([sys.executable, "-m", "pytest", "-q", "--no-header", str(TESTS / "kernels" / file)], TRITON_INTERPRET="0")


@pytest.mark.parametrize(
    ("family", "ranks", "transport", "baseline"),
    [
        ("qwen3", 1, "shm", "device"),
        ("llama", 1, "gloo", "host"),
        pytest.param("qwen3", 2, "shm", "device", marks=two_gpus),
    ],
)
def test_deltas_equal_what_a_fresh_engine_loads(
    family: str, ranks: int, transport: str, baseline: str, tmp_path: Path
) -> None:
    script = TESTS / "vllm" / "deltas_gpu.py"
    output = run([sys.executable, str(script), family, str(ranks), transport, baseline, str(tmp_path)])
    results: dict[str, Any] = json.loads(output.splitlines()[-1])

    def said(name: str) -> list[object]:
        return [(output["tokens"], output["logprobs"]) for output in results[name]]

    assert results["kinds"] == ["dense", "delta", "delta", "delta"]
    assert set(results["proven"]) == {"read back"}
    assert f"the commit failed on rank {ranks - 1}, which has its old weights back" in results["failed"]
    assert said("undone") == said("before") != said("published")
    assert said("published") == said("loaded")


def run(command: list[str], **environment: str) -> str:
    path = os.pathsep.join(filter(None, (str(TESTS / "vllm"), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTEST_XDIST_WORKER": "", **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout
