"""Which files are made or written anywhere, while something runs: inotify on every folder that can hold some."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_CREATE, _MODIFY, _MOVED_TO = 0x100, 0x2, 0x80
_EVENT = struct.Struct("iIII")
_INSTALLED = {"site-packages", "dist-packages", "__pycache__"}
_SKIPPED = {"/proc", "/sys", "/dev/pts", "/dev/mqueue"}


@dataclass
class Seen:
    made: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)


@contextlib.contextmanager
def watching() -> Iterator[Seen]:
    """Yields what is filled at the end: paths that were made or moved in, and paths that were written to."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    folders: dict[int, str] = {}
    seen = Seen()
    try:
        for folder in _folders("/"):
            watch = libc.inotify_add_watch(fd, os.fsencode(folder), _CREATE | _MODIFY | _MOVED_TO)
            if watch >= 0:
                folders[watch] = folder
        assert len(folders) > 100
        assert {"/dev/shm", "/tmp"} <= set(folders.values())
        yield seen
        for watch, mask, name in _events(fd):
            path = str(Path(folders[watch]) / name)
            (seen.made if mask & (_CREATE | _MOVED_TO) else seen.written).append(path)
    finally:
        os.close(fd)


def _folders(top: str) -> Iterator[str]:
    for folder, inside, _ in os.walk(top):
        yield folder
        # Nobody writes into an installed package, and there are tens of thousands of folders of them.
        inside[:] = [
            name
            for name in inside
            if str(Path(folder) / name) not in _SKIPPED
            and name not in ("site-packages", "dist-packages", "__pycache__")
        ]


def _events(fd: int) -> Iterator[tuple[int, int, str]]:
    while True:
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return
        while data:
            watch, mask, _, length = _EVENT.unpack_from(data)
            name = data[_EVENT.size : _EVENT.size + length].rstrip(b"\0")
            data = data[_EVENT.size + length :]
            assert watch >= 0, "the kernel lost events"
            yield watch, mask, os.fsdecode(name)
