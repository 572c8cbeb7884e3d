"""The Triton kernels without a GPU. Triton's interpreter is chosen by the environment, for a whole process; no other
test, and no engine that one starts, may come under it, so that these run in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Two processes of about the same length, since each imports torch.
FILES = [["delta.py", "batched_copy.py"], ["device_delta.py", "device_staging.py", "digest.py", "baseline_device.py"]]


@pytest.mark.slow
@pytest.mark.spread
@pytest.mark.parametrize("files", FILES, ids=" ".join)
def test_in_tritons_interpreter(files):
    paths = [str(Path(__file__).with_name(file)) for file in files]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", *paths]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_XDIST_WORKER": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
