"""Processes that lead a session of their own, ended with all that they have started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

__all__ = ["end"]

_REST_SECONDS = 4.0


def end(process: subprocess.Popen[Any], *, seconds: float = 30.0) -> None:
    """End it, then whatever is left of the session it leads, and of what that had in shared memory."""
    segments = _segments(process.pid)
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    with contextlib.suppress(ProcessLookupError):
        # The rest may be about to remove what it has in shared memory.
        until = time.monotonic() + _REST_SECONDS
        while time.monotonic() < until:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    for segment in segments:
        segment.unlink(missing_ok=True)


def _segments(session: int) -> set[Path]:
    """What the processes of a session have mapped of /dev/shm. vLLM's own are removed by one of them, if it is let."""
    found: set[Path] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):
            if os.getsid(process.pid) == session:
                maps = Path(f"/proc/{process.pid}/maps").read_text().split()
                found |= {Path(word) for word in maps if word.startswith("/dev/shm/")}
    return found
