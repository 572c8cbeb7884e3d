"""The store at which a trainer and the ranks of its engines meet to form a process group of their own.

The group is made directly over this store, never through `init_process_group`, so whatever groups either side has stay
as they are. The traffic is neither encrypted nor authenticated: between hosts that is for a trusted network.
"""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from weightwire.errors import TransportError, UsageError
from weightwire.receiver import Arrivals
from weightwire.transports.base import Link

__all__ = [
    "FROM_TRAINER",
    "Meeting",
    "Place",
    "as_transport_error",
    "connect",
    "endpoint",
    "own_address",
    "reach",
    "wait_until",
]

CONNECT_SECONDS = 5.0
_MAX_WORLD = 1 << 16


class Meeting:
    """The trainer's end: a store that listens once somebody wants it."""

    def __init__(self, scheme: str) -> None:
        self._scheme = scheme
        self._store: TCPStore | None = None
        self.host = ""
        self._lock = threading.Lock()

    def open(self, peer: str) -> str:
        """`HOST:PORT`, where the store listens; HOST is this machine as seen from `peer`."""
        with self._lock:
            if self._store is None:
                self.host = own_address(peer)
                # On the one address that engines are told, not on every interface of the machine.
                listener = socket.create_server((self.host, 0), family=_family(self.host))
                self._store = TCPStore(
                    self.host,
                    listener.getsockname()[1],
                    is_master=True,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=CONNECT_SECONDS),
                    master_listen_fd=listener.detach(),
                    use_libuv=True,
                )
            return f"{self.host}:{self._store.port}"

    @property
    def store(self) -> TCPStore:
        if self._store is None:
            raise TransportError(f"{self._scheme} was never offered")
        return self._store

    def places(self, key: str, links: Sequence[Link]) -> tuple[list[str], int]:
        """The address of each engine in a new group, for `Place.parse`, and the group's size; the trainer is rank 0."""
        world = 1 + sum(link.ranks for link in links)
        firsts = itertools.accumulate((link.ranks for link in links), initial=1)
        where = f"{self._scheme}:{self.host}:{self.store.port}/{key}"
        return [f"{where}/{first}/{world}" for first, _ in zip(firsts, links, strict=False)], world

    def close(self) -> None:
        self._store = None


class Place(NamedTuple):
    """An engine's place in a group: where the store is, the group's key, its first rank's number, the group's size."""

    host: str
    port: int
    key: str
    first: int
    world: int

    @classmethod
    def parse(cls, scheme: str, address: str) -> Place:
        """Of `SCHEME:HOST:PORT/KEY/FIRST/WORLD`."""
        where, _, rest = address.partition("/")
        key, *numbers = rest.split("/")
        if not key or len(numbers) != 2 or not all(n.isascii() and n.isdigit() and len(n) < 10 for n in numbers):
            raise UsageError(f"not an address of a {scheme} group: {address[:80]!r}")
        first, world = map(int, numbers)
        if not 0 < first < world <= _MAX_WORLD:
            raise UsageError(f"rank {first} of {world} in {address[:80]!r}: not a place in a group")
        return cls(*endpoint(scheme, where), key, first, world)


def reach(scheme: str, offer: str) -> str | None:
    """None when the trainer's store can be reached from here, else why not."""
    try:
        with socket.create_connection(endpoint(scheme, offer), timeout=CONNECT_SECONDS):
            return None
    except (OSError, ValueError, UsageError) as error:
        return f"cannot connect to the trainer at {offer[:80]!r}: {error}"


def connect(scheme: str, place: Place, seconds: float) -> TCPStore:
    """The worker's end. Waits on it last `seconds` at most."""
    if (reason := reach(scheme, f"{scheme}:{place.host}:{place.port}")) is not None:
        raise TransportError(reason)
    store = TCPStore(place.host, place.port, is_master=False, timeout=timedelta(seconds=CONNECT_SECONDS))
    store.set_timeout(timedelta(seconds=seconds))
    return store


def wait_until(ready: Callable[[], bool], arrivals: Arrivals, pause: float = 0.005) -> None:
    """Wait for the trainer, with an ear for an abort."""
    silent_since = time.monotonic()
    while not ready():
        # Not in the event's own wait: that has the interpreter several times over, of which an engine has need.
        time.sleep(pause)
        if arrivals.cancelled.is_set():
            raise TransportError("the update was aborted while its buckets were being fetched")
        if time.monotonic() - silent_since > arrivals.lease:
            raise TransportError(f"the trainer sent nothing for {arrivals.lease:g} s")


class as_transport_error:
    """Torch reports a dead or silent peer as some RuntimeError; say what it means."""

    def __init__(self, scheme: str, doing: str) -> None:
        self._scheme, self._doing = scheme, doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (RuntimeError, ValueError)):
            line = (str(error).splitlines() or [repr(error)])[0]
            raise TransportError(f"{self._doing} over {self._scheme} failed: {line[:300]}") from error


def _broadcast_from_trainer() -> Any:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    return options


FROM_TRAINER = _broadcast_from_trainer() if dist.is_available() else None


def endpoint(scheme: str, address: str) -> tuple[str, int]:
    """Of `SCHEME:HOST:PORT`."""
    host, _, port = address.removeprefix(f"{scheme}:").rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and len(port) < 6):
        raise UsageError(f"not HOST:PORT: {address[:80]!r}")
    return host, int(port)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def own_address(peer: str) -> str:
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
