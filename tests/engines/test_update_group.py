"""Joining a trainer's group: what a worker is told, and how it finds what the trainer left in its store."""

from __future__ import annotations

import ctypes
import pickle
import threading
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed import distributed_c10d as c10d

from weightwire.engines.vllm import update_group
from weightwire.engines.vllm.update_group import Place, await_nccl_id, join, nccl_id
from weightwire.errors import TransportError, UnsupportedError, UsageError


class UniqueId(ctypes.Structure):
    """Of the shape of vLLM's `ncclUniqueId`."""

    _fields_ = [("internal", ctypes.c_byte * 128)]


ID = bytes(range(100, 228))


def pickled(protocol: int = pickle.DEFAULT_PROTOCOL) -> bytes:
    id = UniqueId()
    ctypes.memmove(ctypes.byref(id), ID, 128)
    return pickle.dumps(id, protocol)


class Loaded:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('loaded')",)


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_an_id_is_read_out_of_a_pickle(protocol: int) -> None:
    assert nccl_id(pickled(protocol)) == ID


@pytest.mark.parametrize(
    "data", [b"", b"\x80", pickle.dumps(b"short"), pickle.dumps([ID, ID[::-1]]), pickle.dumps(Loaded())]
)
def test_what_is_not_an_id_is_refused_and_never_loaded(data: bytes) -> None:
    with pytest.raises(TransportError, match="NCCL id"):
        nccl_id(data)


def test_the_newer_custom_is_seen_in_the_store_and_has_a_warm_up(store: TCPStore) -> None:
    store.set("broadcast_from/0/0", pickled())
    assert await_nccl_id(store, "any", threading.Event()) == (ID, True)


def test_torchs_own_groups_leave_the_id_where_torch_puts_it(store: TCPStore) -> None:
    # The trainer's half of the older custom, up to the store that its backend is given.
    given: list[Any] = []

    def backend(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
        given.append(store)
        return dist.ProcessGroupGloo(store, rank, size, timeout)

    dist.Backend.register_backend("watched", backend, devices=["cuda"])
    c10d._new_process_group_helper(
        1, 0, [], dist.Backend("watched"), c10d.PrefixStore("openrlhf", store), group_name="openrlhf",
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    given[0].set("0", ID)
    assert await_nccl_id(store, "openrlhf", threading.Event()) == (ID, False)


def test_a_closed_group_is_not_waited_for(store: TCPStore) -> None:
    closed = threading.Event()
    closed.set()
    with pytest.raises(TransportError, match="closed"):
        await_nccl_id(store, "any", closed)


@pytest.mark.parametrize(
    "place",
    [
        ("127.0.0.1", 0, 1, 2, "g"),
        ("127.0.0.1", 1 << 16, 1, 2, "g"),
        ("127.0.0.1", 29500, 0, 2, "g"),
        ("127.0.0.1", 29500, 2, 2, "g"),
        ("127.0.0.1", "many", 1, 2, "g"),
        ("127.0.0.1", None, 1, 2, "g"),
        ("", 29500, 1, 2, "g"),
        (None, 29500, 1, 2, "g"),
        ("127.0.0.1", 29500, 1, 2, ""),
    ],
)
def test_a_place_that_cannot_be_is_refused(place: tuple[Any, ...]) -> None:
    with pytest.raises(UsageError):
        Place(*place)


def test_backends(store: TCPStore) -> None:
    place = Place("127.0.0.1", store.port, 1, 2, "g")
    with pytest.raises(UnsupportedError, match="on cpu"):
        join(place, "nccl", torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="'mpi'"):
        join(place, "mpi", torch.device("cpu"))


def test_an_absent_trainer_is_an_error_by_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTWIRE_BROADCAST_SECONDS", "1")
    listener = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = Place("127.0.0.1", listener.port, 1, 2, "g")
    with pytest.raises(TransportError, match="could not join"):  # the store is there, rank 0 never comes
        join(place, "gloo", torch.device("cpu"))
    del listener
    with pytest.raises(TransportError, match="could not join"):  # nobody listens
        join(place, "gloo", torch.device("cpu"))


@pytest.mark.parametrize("text", ["", "never", "0", "-1", "nan"])
def test_a_deadline_must_be_one(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("WEIGHTWIRE_BROADCAST_SECONDS", text)
    with pytest.raises(UsageError, match="number of seconds"):
        update_group.seconds()
