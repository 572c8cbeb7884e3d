"""What a worker lets go of when its trainer is silent, as far as that can be seen without a GPU."""

from __future__ import annotations

import base64
import threading
import time

import msgspec
import pytest
import torch

from weightwire import transports
from weightwire.transports import cuda_driver, cuda_ipc, nccl, nccl_group


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Addresses that were closed, after 0 where what reads them was waited for, of a process that has two open."""
    addresses: list[int] = []
    monkeypatch.setattr(cuda_ipc, "_finish_reading", lambda: addresses.append(0))
    monkeypatch.setattr(cuda_driver, "close_handle", addresses.append)
    monkeypatch.setattr(cuda_ipc._opened, "_open", {b"one": (16, 8), b"two": (32, 8)})
    return addresses


def test_memory_that_was_lent_is_closed_once(closed: list[int]) -> None:
    for _ in range(2):
        transports.sweep("0123456789abcdef" * 2)
    assert closed[0] == 0
    assert sorted(closed) == [0, 16, 32]


def test_memory_that_is_lent_no_more_is_closed_once_nobody_reads_it(
    closed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_driver, "uuid_of", lambda device: "here")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    lent = cuda_ipc._Lent(gpu="here", allocations=[(b"two", 8)], tensors=[])
    address = f"cuda-ipc:{base64.b64encode(msgspec.msgpack.encode(lent)).decode()}"
    assert cuda_ipc.open_lent(address, ()).here
    assert closed == [0, 16]


def test_one_that_cannot_be_closed_is_not_closed_again(closed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(address: int) -> None:
        closed.append(address)
        raise OSError("the driver refuses")

    monkeypatch.setattr(cuda_driver, "close_handle", fail)
    for _ in range(2):
        with pytest.raises(OSError, match="the driver refuses"):
            transports.sweep("0123456789abcdef" * 2)
    assert sorted(closed) == [0, 0, 16, 32]


def test_an_abort_that_hangs_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    class Stuck:
        def abort(self) -> None:
            over.wait(60)

    monkeypatch.setattr(nccl_group, "_ABORT_SECONDS", 0.1)
    started = time.monotonic()
    nccl._Group("key", None, Stuck()).abort()
    over.set()
    assert time.monotonic() - started < 30
