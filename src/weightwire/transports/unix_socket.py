"""Small updates between processes of one host, in memory that is handed over by a Unix socket, in the folder of the
`shm` transport.

Of a few megabytes, what counts is how much memory has to be found for them, and how often one side has to wake the
other: segments in shared memory take new pages each time, and a socket takes 200 kB before its reader must come by. So
all of it has one place, which the trainer keeps, and the socket says how much of that is filled. It also says at once
that the other side is gone.

Whoever reads connects to a name that follows from the update's id; it is gone as soon as all have. He gets the memory,
and from then on how many of its bytes are filled, 8 bytes a time, little-endian. One byte back says that he has read
all.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from weightwire.errors import TransportError
from weightwire.receiver import Arrivals
from weightwire.transports.base import Link, Wait
from weightwire.transports.memfd import SharedMemory, view_of
from weightwire.updates.buckets import Bucket

__all__ = ["SocketSender", "looks", "receive"]

_LOOK_SECONDS = 0.05
_PAUSE_SECONDS = 0.0005
_COUNT = struct.Struct("<q")
_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class SocketSender:
    """`transports.base.Sender`. `names`: the socket's path, one a link. `memory` has room for all of the buckets; once
    this is closed, whoever reads it has been told to stop."""

    def __init__(
        self,
        address: str,
        names: Sequence[Path],
        links: Sequence[Link],
        buckets: Sequence[Bucket],
        wait: Wait,
        memory: SharedMemory,
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
        return self._memory.data[start : start + bucket.nbytes]

    def send(self, bucket: Bucket) -> None:
        self._filled = self._starts[bucket.index] + bucket.nbytes
        self.push()

    def push(self) -> bool:
        """As `transports.base.Pushes`."""
        self._accept()
        for reader in self._readers:
            if reader.told < self._filled:
                with self._asking_why(), contextlib.suppress(BlockingIOError):
                    reader.socket.send(_COUNT.pack(self._filled))
                    reader.told = self._filled
        return not self._doors and all(reader.told == self._filled for reader in self._readers)

    def finish(self) -> None:
        def read() -> bool:
            if not self.push():
                return False
            left = [reader for reader in self._readers if not reader.done]
            if left and _readable([reader.socket for reader in left]):
                for reader in left:
                    self._hear(reader)
            return all(reader.done for reader in left)

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
            come = [reader for door in self._doors for reader in door.accept()]
        except OSError as error:
            raise TransportError(f"a reader cannot be let in: {error}") from error
        self._doors = [door for door in self._doors if door.awaited]
        self._readers += come
        for reader in come:
            with self._asking_why():
                socket.send_fds(reader.socket, [_COUNT.pack(self._filled)], [self._memory.fd])
                reader.told = self._filled

    def _hear(self, reader: _Reader) -> None:
        with self._asking_why(), contextlib.suppress(BlockingIOError):
            if not reader.socket.recv(1):
                raise BrokenPipeError("it hung up")
            reader.done = True

    @contextlib.contextmanager
    def _asking_why(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # The engine has ended the update. Its answer to `stage` says why, and ends this wait.
            self._wait(lambda: False, "the engine to say why it ended the update")
            raise TransportError(f"a reader is gone: {error}") from error


class _Reader:
    """One that has come; how many bytes it was told of, and whether it has read all."""

    def __init__(self, to: socket.socket) -> None:
        self.socket = to
        self.told = -1
        self.done = False
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


def _readable(sockets: Sequence[socket.socket]) -> bool:
    """Whether one of these has something to say, or is broken, at once or after a while."""
    poll = select.poll()
    for each in sockets:
        poll.register(each, select.POLLIN)
    return bool(poll.poll(1e3 * _LOOK_SECONDS))


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
    """Each bucket in turn, in the trainer's memory."""
    nbytes = sum(bucket.nbytes for bucket in arrivals.buckets)
    with _connected(name, arrivals) as connection:
        filled, memory = _memory(connection, nbytes, arrivals)
        end = 0
        for bucket in arrivals.buckets:
            start, end = end, end + bucket.nbytes
            while filled < end:
                if len(said := _some(connection, arrivals)) < _COUNT.size:
                    missing = end - max(filled, start)
                    raise TransportError(f"the trainer hung up {missing} bytes before the end of a bucket")
                (filled,) = _COUNT.unpack(said)
            yield bucket.index, memory[start:end]
        with contextlib.suppress(OSError):  # what it may not hear any more it need not
            connection.send(b"\1")


def _memory(connection: socket.socket, nbytes: int, arrivals: Arrivals) -> tuple[int, torch.Tensor]:
    """What the trainer hands over, and how many bytes of it were filled by then."""
    fds: list[int] = []

    def take() -> bytes:
        said, given, _, _ = socket.recv_fds(connection, _COUNT.size, 1)
        fds.extend(given)
        return said

    try:
        said = _some(connection, arrivals, take)
        if len(said) != _COUNT.size or not fds:
            raise TransportError("the trainer hung up, or handed over no memory")
        return _COUNT.unpack(said)[0], view_of(fds[0], nbytes)
    finally:
        for fd in fds:
            os.close(fd)


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


def _some(connection: socket.socket, arrivals: Arrivals, take: Callable[[], bytes] | None = None) -> bytes:
    """What the trainer says next; nothing once it has hung up."""
    for _ in looks(arrivals, pause=0.0):
        try:
            # So short a message is never in two pieces.
            return take() if take else connection.recv(_COUNT.size)
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
