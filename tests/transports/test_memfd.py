"""Memory that one process hands to another: as long as was said, and no shorter later."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from weightwire.errors import TransportError
from weightwire.transports.memfd import SharedMemory, view_of


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    made = SharedMemory(10000)
    yield made
    made.close()


def test_what_one_writes_the_other_reads_for_as_long_as_he_has_it(memory: SharedMemory) -> None:
    view = view_of(memory.fd, 5000)
    memory.data[:5000] = torch.arange(5000, dtype=torch.uint8)
    assert torch.equal(view, torch.arange(5000, dtype=torch.uint8))
    memory.close()
    memory.close()
    assert memory.data.numel() == 0
    assert view[4999] == 4999 % 256


def test_it_has_no_name_and_cannot_become_shorter(memory: SharedMemory) -> None:
    assert os.readlink(f"/proc/self/fd/{memory.fd}").startswith("/memfd:")
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, 100)


def test_less_than_was_announced_is_refused(memory: SharedMemory) -> None:
    with pytest.raises(TransportError, match="has 10000 bytes, 10001 were announced"):
        view_of(memory.fd, 10001)


def test_what_could_become_shorter_is_refused(tmp_path: Path) -> None:
    # To read beyond its end would end the engine.
    fd = os.memfd_create("other", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 10000)
    with pytest.raises(TransportError, match="to stay so many"):
        view_of(fd, 5000)
    os.close(fd)
    with (tmp_path / "file").open("wb+") as file:
        file.truncate(10000)
        with pytest.raises(TransportError, match="memory"):
            view_of(file.fileno(), 5000)
    here, there = socket.socketpair()
    with here, there, pytest.raises(TransportError, match="memory"):
        view_of(here.fileno(), 5000)


def test_none_at_all() -> None:
    memory = SharedMemory(0)
    assert (memory.data.numel(), view_of(memory.fd, 0).numel()) == (0, 0)
    memory.close()


def test_without_room_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TransportError, match="no room for 10 bytes of shared memory"):
        SharedMemory(10)
    assert len(os.listdir("/proc/self/fd")) == len(before)
