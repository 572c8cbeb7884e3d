"""Buckets as broadcasts in a gloo process group of our own, rank 0 of which is the trainer.

The group is made directly over a store of its own, never through `init_process_group`, so whatever groups the trainer
has stay as they are. It lives for one publish. The traffic is neither encrypted nor authenticated: between hosts that
is for a trusted network, which is why it is never chosen by itself for an engine on another host.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from weightwire.errors import TransportError
from weightwire.receiver import Arrivals
from weightwire.transports.base import BUCKET_BYTES, Link, Sender, Wait
from weightwire.transports.store import (
    FROM_TRAINER,
    Meeting,
    Place,
    as_transport_error,
    connect,
    own_address,
    reach,
    wait_until,
)
from weightwire.updates.buckets import Bucket

__all__ = ["Gloo", "fetch", "probe"]


class Gloo:
    """The trainer's half: the store, and for each publish a sender."""

    name = "gloo"
    bucket_bytes = BUCKET_BYTES

    def __init__(self) -> None:
        self._meeting = Meeting(self.name)

    @contextlib.contextmanager
    def offer(self, host: str) -> Iterator[str]:
        """`gloo:HOST:PORT`, where the store listens; HOST is this machine as seen from `host`."""
        if not dist.is_available() or not dist.is_gloo_available():
            raise TransportError("this build of torch has no gloo")
        yield f"gloo:{self._meeting.open(host)}"

    def bucket_limit(self, nbytes: int) -> int | None:
        return None

    def sender(self, links: Sequence[Link], buckets: Sequence[Bucket], wait: Wait, lease: float) -> Sender:
        return _Sender(self._meeting, links, max((b.nbytes for b in buckets), default=0), wait, lease)

    def close(self) -> None:
        self._meeting.close()


class _Sender:
    def __init__(self, meeting: Meeting, links: Sequence[Link], nbytes: int, wait: Wait, lease: float) -> None:
        self._key = secrets.token_hex(16)
        self._store, self._host = meeting.store, meeting.host
        self._nbytes, self._wait, self._lease = nbytes, wait, lease
        self.addresses, self._world = meeting.places(self._key, links)
        self._group: Any = None
        self._buffers: list[torch.Tensor] = []
        self._sent: list[Any] = []

    def buffer(self, bucket: Bucket) -> torch.Tensor:
        slot = bucket.index % 2
        if slot == len(self._buffers):
            self._buffers.append(torch.empty(self._nbytes, dtype=torch.uint8))
        elif bucket.index >= 2:
            self._finish(bucket.index - 2)
        return self._buffers[slot][: bucket.nbytes]

    def send(self, bucket: Bucket) -> None:
        with as_transport_error("gloo", "sending"):
            if self._group is None:
                # Nothing ends the making of a group whose other ranks do not come: one may not even have begun.
                others = [_here(self._key, rank) for rank in range(1, self._world)]
                self._wait(lambda: bool(self._store.check(others)), "every rank to join the group")
                self._store.set(_begun(self._key), "")
                self._group = _group(self._store, self._key, 0, self._world, self._host, self._lease)
            work = self._group.broadcast([self._buffers[bucket.index % 2][: bucket.nbytes]], FROM_TRAINER)
        self._sent.append(work)

    def finish(self) -> None:
        for index in range(len(self._sent)):
            self._finish(index)

    def close(self) -> None:
        self._sent.clear()
        self._group = None
        self._buffers.clear()

    def _finish(self, index: int) -> None:
        work = self._sent[index]
        self._wait(work.is_completed, f"bucket {index} to be broadcast")
        if not work.is_completed():  # a wait ends with a commit, too, and that one has failed
            raise TransportError(f"bucket {index} was not taken")
        with as_transport_error("gloo", "sending"):
            work.wait(timedelta(seconds=self._lease))


def probe(offer: str) -> str | None:
    """None when the trainer's store can be reached from here, else why not."""
    return reach("gloo", offer)


def fetch(address: str, arrivals: Arrivals) -> Iterator[tuple[int, torch.Tensor]]:
    """Join the publish's group and receive each bucket in turn, into one buffer."""
    place = Place.parse("gloo", address)
    buffer = torch.empty(max((b.nbytes for b in arrivals.buckets), default=0), dtype=torch.uint8)
    with as_transport_error("gloo", "receiving"):
        store = connect("gloo", place, arrivals.lease)
        store.set(_here(place.key, place.first + arrivals.rank), "")
        # While a group is being made nothing can be heard of an abort: not begun before the trainer is there.
        try:
            wait_until(lambda: bool(store.check([_begun(place.key)])), arrivals)
        except TransportError:
            store.delete_key(_here(place.key, place.first + arrivals.rank))
            raise
        group = _group(
            store, place.key, place.first + arrivals.rank, place.world, own_address(place.host), arrivals.lease
        )
        for bucket in arrivals.buckets:
            if arrivals.cancelled.is_set():
                raise TransportError("the update was aborted while its buckets were being fetched")
            data = buffer[: bucket.nbytes]
            group.broadcast([data], FROM_TRAINER).wait(timedelta(seconds=arrivals.lease))
            yield bucket.index, data


def _here(key: str, rank: int) -> str:
    return f"{key}/here/{rank}"


def _begun(key: str) -> str:
    return f"{key}/begun"


def _group(store: Store, key: str, rank: int, world: int, host: str, seconds: float) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=seconds)
    return gloo(PrefixStore(key, store), rank, world, options)
