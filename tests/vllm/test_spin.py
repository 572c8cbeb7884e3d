"""Who waits in our calls sleeps, and all other waiting is as it was. On vLLM's own message queues, in a process of its
own: importing vLLM changes the one it is imported into."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def done() -> subprocess.CompletedProcess[str]:
    script = Path(__file__).with_name("spin_cases.py")
    return subprocess.run([sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("case", ["sleeps", "restores_after_failures", "worker_wakes", "wraps_once"])
def test_waiting(case: str, done: subprocess.CompletedProcess[str]) -> None:
    assert f"HELD {case}\n" in done.stdout, done.stdout + done.stderr[-3000:]
