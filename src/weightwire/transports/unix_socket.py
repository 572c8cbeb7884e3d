"""Small updates between processes of one host, through a Unix socket in the folder of the `shm` transport.

Of a few megabytes, what counts is not how often they are copied but how much memory has to be found for them: a file
in shared memory takes new pages and gives them back, four times as much work as the copies in and out of a socket. It
also wakes its reader at once, and says at once that the other side is gone.

Whoever reads connects to a name that follows from the update's id, and gets every bucket's bytes in order. The name is
gone as soon as all have.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from weightwire.errors import TransportError
from weightwire.receiver import Arrivals
from weightwire.transports.base import Link, Wait
from weightwire.updates.buckets import Bucket

__all__ = ["SocketSender", "looks", "receive"]

_LOOK_SECONDS = 0.05
_PAUSE_SECONDS = 0.0005
_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class SocketSender:
    """`transports.base.Sender`. `names`: the socket's path, one a link. `memory` (uint8, 1-D) has room for all of the
    buckets and is not read any more once this is closed."""

    def __init__(
        self,
        address: str,
        names: Sequence[Path],
        links: Sequence[Link],
        buckets: Sequence[Bucket],
        wait: Wait,
        memory: torch.Tensor,
    ) -> None:
        self.addresses: list[str | None] = [address] * len(links)
        self._wait = wait
        self._memory = memory
        starts = itertools.accumulate((bucket.nbytes for bucket in buckets), initial=0)
        self._starts = {bucket.index: start for bucket, start in zip(buckets, starts, strict=False)}
        self._filled = 0
        self._doors: list[_Door] = []
        self._readers: list[_Reader] = []
        try:
            for name, link in zip(names, links, strict=True) if buckets else ():  # nobody comes for nothing
                self._doors.append(_Door(name, link.ranks))
        except OSError as error:
            self.close()
            raise TransportError(f"no socket can be put into {names[0].parent}: {error}") from error

    def buffer(self, bucket: Bucket) -> torch.Tensor:
        start = self._starts[bucket.index]
        return self._memory[start : start + bucket.nbytes]

    def send(self, bucket: Bucket) -> None:
        # What readers do not take at once goes out later: there is memory for all of it, and more to be filled.
        self._filled = self._starts[bucket.index] + bucket.nbytes
        self.push()

    def push(self) -> bool:
        """As `transports.base.Pushes`."""
        self._accept()
        data = self._memory.numpy().data[: self._filled]
        for reader in self._readers:
            if reader.sent < self._filled:
                self._push(reader, data)
        return not self._doors and all(reader.sent == self._filled for reader in self._readers)

    def finish(self) -> None:
        def read() -> bool:
            while not self.push():
                left = [reader.socket for reader in self._readers if reader.sent < self._filled]
                if not _writable(left):
                    return False
            return True

        if not read():
            self._wait(read, "the last buckets to be read")

    def close(self) -> None:
        for door in self._doors:
            door.close()
        for reader in self._readers:
            reader.socket.close()
        self._doors.clear()
        self._readers.clear()

    def _accept(self) -> None:
        try:
            for door in self._doors:
                self._readers += door.accept()
        except OSError as error:
            raise TransportError(f"a reader cannot be let in: {error}") from error
        self._doors = [door for door in self._doors if door.awaited]

    def _push(self, reader: _Reader, data: memoryview) -> None:
        try:
            reader.sent += reader.socket.send(data[reader.sent :])
        except BlockingIOError:
            pass
        except OSError as error:
            # The engine has ended the update. Its answer to `stage` says why, and ends this wait.
            self._wait(lambda: False, "the engine to say why it ended the update")
            raise TransportError(f"a reader is gone: {error}") from error


class _Reader:
    def __init__(self, to: socket.socket) -> None:
        self.socket = to
        self.sent = 0
        to.setblocking(False)


class _Door:
    """A socket under a name that so many readers connect to: gone as soon as all have."""

    def __init__(self, name: Path, readers: int) -> None:
        self.awaited = readers
        self._name = name
        self._socket = _listen(name, readers)

    def accept(self) -> list[_Reader]:
        """Those who have come."""
        come: list[_Reader] = []
        with contextlib.suppress(BlockingIOError):
            while self.awaited:
                come.append(_Reader(self._socket.accept()[0]))
                self.awaited -= 1
        if not self.awaited:
            self.close()
        return come

    def close(self) -> None:
        self._socket.close()
        self._name.unlink(missing_ok=True)


def _writable(sockets: Sequence[socket.socket]) -> bool:
    """Whether one of these takes more, or is broken, at once or after a while."""
    poll = select.poll()
    for each in sockets:
        poll.register(each, select.POLLOUT)
    return bool(sockets and poll.poll(1e3 * _LOOK_SECONDS))


def _listen(name: Path, readers: int) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Under a name of its own until it can be connected to.
    early = name.with_name(f"{name.name}-early")
    try:
        with _short(early) as path:
            listening.bind(path)
        early.chmod(0o600)
        listening.listen(readers)
        listening.setblocking(False)
        early.rename(name)
    except BaseException:
        listening.close()
        early.unlink(missing_ok=True)
        raise
    return listening


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """The same file by another path: that of a socket may have no more than 107 bytes."""
    folder = os.open(path.parent, _FLAGS)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def receive(name: Path, arrivals: Arrivals) -> Iterator[tuple[int, torch.Tensor]]:
    """Each bucket in turn, in memory that the next is read into."""
    data = torch.empty(max((bucket.nbytes for bucket in arrivals.buckets), default=0), dtype=torch.uint8)
    with _connected(name, arrivals) as connection:
        for bucket in arrivals.buckets:
            _read(connection, data[: bucket.nbytes].numpy().data, arrivals)
            yield bucket.index, data[: bucket.nbytes]


@contextlib.contextmanager
def _connected(name: Path, arrivals: Arrivals) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, _short(name) as path:
        connection.setblocking(False)
        try:
            for _ in looks(arrivals):
                with contextlib.suppress(BlockingIOError):  # others are waiting to be let in
                    connection.connect(path)
                    break
        except OSError as error:
            raise TransportError(f"the trainer cannot be reached: {error}") from error
        connection.settimeout(_LOOK_SECONDS)
        yield connection


def _read(connection: socket.socket, to: memoryview, arrivals: Arrivals) -> None:
    while to:
        count = _some(connection, to, arrivals)
        if not count:
            raise TransportError(f"the trainer hung up {len(to)} bytes before the end of a bucket")
        to = to[count:]


def _some(connection: socket.socket, to: memoryview, arrivals: Arrivals) -> int:
    for _ in looks(arrivals, pause=0.0):
        try:
            return connection.recv_into(to)
        except TimeoutError:
            continue
        except OSError as error:
            raise TransportError(f"the connection to the trainer broke: {error}") from error
    raise AssertionError("it looks until it raises")


def looks(arrivals: Arrivals, pause: float = 0.0001) -> Iterator[None]:
    """Look again and again for what the trainer is to send next, with a pause after each look that grows a little.
    Raises `TransportError` once the update was aborted, or nothing was to be seen for as long as the lease."""
    since = time.monotonic()
    while True:
        yield
        if arrivals.cancelled.wait(pause):
            raise TransportError("the update was aborted while its buckets were being fetched")
        if time.monotonic() - since > arrivals.lease:
            raise TransportError(f"the trainer sent nothing for {arrivals.lease:g} s")
        pause = min(pause * 1.5, _PAUSE_SECONDS)
