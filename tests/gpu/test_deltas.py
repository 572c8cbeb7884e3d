"""Deltas on GPUs: the kernels as compiled, and a real vLLM that takes deltas into its live parameters.

pytest -m gpu tests/gpu/test_deltas.py        # the second needs vLLM; one of its cases needs two GPUs
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.gpu import gpu, run, two_gpus

pytestmark = gpu

TESTS = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "file", ["delta.py", "device_delta.py", "baseline_device.py", "digest.py", "batched_copy.py", "device_staging.py"]
)
def test_the_kernels_as_compiled(file: str) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTEST_XDIST_WORKER": ""}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", str(TESTS / "kernels" / file)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


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
    results = run("deltas_gpu.py", family, ranks, transport, baseline, tmp_path)

    def said(name: str) -> list[object]:
        return [(output["tokens"], output["logprobs"]) for output in results[name]]

    assert results["kinds"] == ["dense", "delta", "delta", "delta"]
    assert set(results["proven"]) == {"read back"}
    assert f"the commit failed on rank {ranks - 1}, which has its old weights back" in results["failed"]
    assert said("undone") == said("before") != said("published")
    assert said("published") == said("loaded")
