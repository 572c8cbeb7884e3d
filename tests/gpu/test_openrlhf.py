"""The same trainers as in `tests/vllm/test_openrlhf.py`, on GPUs: over NCCL in both of its customs, and by CUDA IPC.

pytest -m gpu tests/gpu/test_openrlhf.py        # two GPUs for NCCL, which refuses two ranks on one
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from support.scripts import last_json

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SCRIPTS = Path(__file__).parent.parent / "vllm"
SECONDS = 500
BROADCAST_SECONDS = 20
CUSTOMS = [
    pytest.param(custom, marks=pytest.mark.skipif(torch.cuda.device_count() < gpus, reason=f"needs {gpus} GPUs"))
    for custom, gpus in (("ipc", 1), ("nccl", 2), ("stateless", 2))
]


@pytest.mark.parametrize("custom", CUSTOMS)
def test_a_trainer_that_speaks_the_interface(custom: str, tmp_path: Path) -> None:
    came = run(custom, tmp_path)
    assert [came[name]["version"] for name in ("whole loop", "three arguments", "after all that")] == [1, 2, 3]
    for name in ("whole loop", "three arguments", "after all that", "after a publish", "awake", "another trainer"):
        assert came[name]["came"]["sent"] == 24
    for name, outcome in came.items():
        if name == "poisoned":
            continue
        assert outcome["same tokens"], (name, outcome)
        # Attention there multiplies float32 with ten bits of fraction.
        assert outcome["apart"] < 1e-2 < 0.1 < outcome["apart from another"], (name, outcome)
        assert outcome["state"] == "idle", (name, outcome)
    for wrong in ("name", "shape", "slice", "kind", "nan", "last"):
        assert came[f"wrong {wrong}"]["came"]["error"]
        assert came[f"wrong {wrong}"]["version"] == 2
    assert all("Wake it up first" in refused["error"] for refused in came["asleep"]["came"])
    lost, again = came["woken from the deeper sleep"]["came"]
    assert "discarded the weights" in lost
    assert again["sent"] == 24
    assert came["died"]["came"]["seconds"] < 4 * BROADCAST_SECONDS
    if custom != "ipc":
        assert came["died"]["came"]["lost"]
    assert came["poisoned"]["state"] == "poisoned"
    assert "EngineDeadError" in came["poisoned"]["generating"]


def run(custom: str, folder: Path) -> dict[str, Any]:
    """What the script printed as its last line; every process that it started ends with it."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(SCRIPTS), os.environ.get("PYTHONPATH")))),
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "WEIGHTWIRE_BROADCAST_SECONDS": str(BROADCAST_SECONDS),
    }
    command = [sys.executable, str(SCRIPTS / "openrlhf_process.py"), str(folder), custom]
    output, errors = folder / "out", folder / "err"
    with output.open("wb") as out, errors.open("wb") as err:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=err, start_new_session=True)
    try:
        assert process.wait(SECONDS) == 0, errors.read_text()[-6000:]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
    return last_json(output.read_text())
