"""Processes that lead a session of their own, ended with all that they have started."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from weightwire.demo.server import end_session

__all__ = ["end", "left_over"]

_REST_SECONDS = 4.0
_SHARED = Path("/dev/shm")


def end(process: subprocess.Popen[Any], *, seconds: float = 30.0) -> None:
    """End it, then whatever is left of the session it leads, and of what that had in shared memory."""
    segments = _segments(process.pid)
    end_session(process, stop=seconds, rest=_REST_SECONDS)
    for segment in segments:
        segment.unlink(missing_ok=True)


def left_over(prefix: str) -> set[Path]:
    """Files of this prefix in shared memory that no process has mapped."""
    return {*_SHARED.glob(f"{prefix}*")} - _mapped(lambda pid: True)


def _segments(session: int) -> set[Path]:
    """What the processes of a session have mapped of /dev/shm. vLLM's own are removed by one of them, if it is let."""
    return _mapped(lambda pid: os.getsid(pid) == session)


def _mapped(by: Callable[[int], bool]) -> set[Path]:
    found: set[Path] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):
            if by(process.pid):
                maps = Path(f"/proc/{process.pid}/maps").read_text().split()
                found |= {Path(word) for word in maps if word.startswith(f"{_SHARED}/")}
    return found
