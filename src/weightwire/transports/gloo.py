"""Buckets as broadcasts in a gloo process group of our own, rank 0 of which is the trainer.

The group is made directly over a store of its own, never through `init_process_group`, so whatever groups the trainer
has stay as they are. It lives for one publish. The traffic is neither encrypted nor authenticated: between hosts that
is for a trusted network, which is why it is never chosen by itself for an engine on another host.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from weightwire.errors import TransportError, UsageError
from weightwire.receiver import Arrivals
from weightwire.transports.base import Link, Sender, Wait
from weightwire.updates.buckets import Bucket

__all__ = ["Gloo", "fetch", "probe"]

_CONNECT_SECONDS = 5.0
_MAX_WORLD = 1 << 16


class Gloo:
    """The trainer's half: the store, and for each publish a sender."""

    name = "gloo"

    def __init__(self) -> None:
        self._store: TCPStore | None = None
        self._lock = threading.Lock()
        self._host = ""

    @contextlib.contextmanager
    def offer(self, host: str) -> Iterator[str]:
        """`gloo:HOST:PORT`, where the store listens; HOST is this machine as seen from `host`."""
        if not dist.is_available() or not dist.is_gloo_available():
            raise TransportError("this build of torch has no gloo")
        with self._lock:
            if self._store is None:
                self._host = _own_address(host)
                # On the one address that engines are told, not on every interface of the machine.
                listener = socket.create_server((self._host, 0), family=_family(self._host))
                self._store = TCPStore(
                    self._host,
                    listener.getsockname()[1],
                    is_master=True,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=_CONNECT_SECONDS),
                    master_listen_fd=listener.detach(),
                    use_libuv=True,
                )
            address = f"gloo:{self._host}:{self._store.port}"
        yield address

    def bucket_limit(self, nbytes: int) -> int | None:
        return None

    def sender(self, links: Sequence[Link], buckets: Sequence[Bucket], wait: Wait, lease: float) -> Sender:
        if self._store is None:
            raise TransportError("gloo was never offered")
        return _Sender(self._store, self._host, links, max((b.nbytes for b in buckets), default=0), wait, lease)

    def close(self) -> None:
        self._store = None


class _Sender:
    def __init__(
        self, store: TCPStore, host: str, links: Sequence[Link], nbytes: int, wait: Wait, lease: float
    ) -> None:
        self._key = secrets.token_hex(16)
        self._store, self._host, self._nbytes, self._wait, self._lease = store, host, nbytes, wait, lease
        self._world = 1 + sum(link.ranks for link in links)
        self.addresses: list[str | None] = []
        first = 1
        for link in links:
            self.addresses.append(f"gloo:{host}:{store.port}/{self._key}/{first}/{self._world}")
            first += link.ranks
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
        with _as_transport_error("sending"):
            if self._group is None:
                self._store.set(_begun(self._key), "")
                self._group = _group(self._store, self._key, 0, self._world, self._host, self._lease)
            work = self._group.broadcast([self._buffers[bucket.index % 2][: bucket.nbytes]], _FROM_TRAINER)
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
        with _as_transport_error("sending"):
            work.wait(timedelta(seconds=self._lease))


def probe(offer: str) -> str | None:
    """None when the trainer's store can be reached from here, else why not."""
    try:
        host, port = _endpoint(offer)
        with socket.create_connection((host, port), timeout=_CONNECT_SECONDS):
            return None
    except (OSError, ValueError, UsageError) as error:
        return f"cannot connect to the trainer at {offer[:80]!r}: {error}"


def fetch(address: str, arrivals: Arrivals) -> Iterator[tuple[int, torch.Tensor]]:
    """Join the publish's group and receive each bucket in turn, into one buffer."""
    host, port, key, first, world = _parse(address)
    if (reason := probe(f"gloo:{host}:{port}")) is not None:
        raise TransportError(reason)
    buffer = torch.empty(max((b.nbytes for b in arrivals.buckets), default=0), dtype=torch.uint8)
    with _as_transport_error("receiving"):
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_CONNECT_SECONDS))
        store.set_timeout(timedelta(seconds=arrivals.lease))
        _wait_until_begun(store, key, arrivals)
        group = _group(store, key, first + arrivals.rank, world, _own_address(host), arrivals.lease)
        for bucket in arrivals.buckets:
            if arrivals.cancelled.is_set():
                raise TransportError("the update was aborted while its buckets were being fetched")
            data = buffer[: bucket.nbytes]
            group.broadcast([data], _FROM_TRAINER).wait(timedelta(seconds=arrivals.lease))
            yield bucket.index, data


def _wait_until_begun(store: Store, key: str, arrivals: Arrivals) -> None:
    # While a group is being made nothing can be heard of an abort, so that is not begun before the trainer is there.
    silent_since = time.monotonic()
    while not store.check([_begun(key)]):
        if arrivals.cancelled.wait(0.005):
            raise TransportError("the update was aborted before its first bucket was sent")
        if time.monotonic() - silent_since > arrivals.lease:
            raise TransportError(f"the trainer sent nothing for {arrivals.lease:g} s")


def _begun(key: str) -> str:
    return f"{key}/begun"


def _group(store: Store, key: str, rank: int, world: int, host: str, seconds: float) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=seconds)
    return gloo(PrefixStore(key, store), rank, world, options)


class _as_transport_error:
    """Torch reports a dead or silent peer as some RuntimeError; say what it means."""

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (RuntimeError, ValueError)):
            raise TransportError(f"{self._doing} over gloo failed: {str(error).splitlines()[0][:300]}") from error


def _broadcast_from_trainer() -> Any:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    return options


_FROM_TRAINER = _broadcast_from_trainer() if dist.is_available() else None


def _parse(address: str) -> tuple[str, int, str, int, int]:
    where, _, rest = address.partition("/")
    key, *numbers = rest.split("/")
    if not key or len(numbers) != 2 or not all(n.isascii() and n.isdigit() and len(n) < 10 for n in numbers):
        raise UsageError(f"not an address of a gloo group: {address[:80]!r}")
    first, world = map(int, numbers)
    if not 0 < first < world <= _MAX_WORLD:
        raise UsageError(f"rank {first} of {world} in {address[:80]!r}: not a place in a group")
    return *_endpoint(where), key, first, world


def _endpoint(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("gloo:").rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and len(port) < 6):
        raise UsageError(f"not HOST:PORT: {address[:80]!r}")
    return host, int(port)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _own_address(peer: str) -> str:
    """The address of this machine on the way to `peer`. No packet is sent: a UDP socket only picks its route."""
    if peer in ("", "localhost"):
        return "127.0.0.1"
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise TransportError(f"no route to {peer!r}: {error}") from error
