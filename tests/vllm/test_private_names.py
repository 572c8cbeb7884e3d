"""Every private name of vLLM that this package leans on exists in the vLLM installed here."""

from __future__ import annotations

import subprocess
import sys


def test_no_private_name_has_disappeared() -> None:
    # In a process of its own: importing vLLM changes the one it is imported into.
    code = "from weightwire.engines.vllm.compat import missing_names; print('MISSING', missing_names())"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert "MISSING []" in done.stdout, done.stdout + done.stderr[-2000:]
