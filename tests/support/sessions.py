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
    there = _shared(prefix)
    mapped = _mapped(lambda pid: True)
    return {path for path, inode in there.items() if inode not in mapped}


def _segments(session: int) -> set[Path]:
    """What the processes of a session have mapped of /dev/shm. vLLM's own are removed by one of them, if it is let."""
    mapped = _mapped(lambda pid: os.getsid(pid) == session)
    return {path for path, inode in _shared().items() if inode in mapped}


def _shared(prefix: str = "") -> dict[Path, int]:
    """Files in shared memory, and their inodes."""
    found: dict[Path, int] = {}
    for path in _SHARED.glob(f"{prefix}*"):
        with contextlib.suppress(FileNotFoundError):
            found[path] = path.stat().st_ino
    return found


def _mapped(by: Callable[[int], bool]) -> set[int]:
    """The inodes. Not by name: whoever makes a semaphore has it under another, and gives it its own afterwards."""
    found: set[int] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):
            if by(process.pid):
                lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
                found |= {int(line.split()[4]) for line in lines if f" {_SHARED}/" in line}
    return found
