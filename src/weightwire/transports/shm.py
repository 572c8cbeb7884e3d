"""Buckets through shared memory, for a trainer and an engine on one host.

A sender owns two segments in /dev/shm. To send a bucket it hard-links the segment once for each reader, under a name
made of the update's id, which the engine chose; a reader maps it, uses it, and removes its name. A segment whose link
count is back to one has been read by all and is filled again. So the file system does the flow control: no counters
in shared memory, and whoever dies, the names left are few, known, and swept by the other side.

To map a page takes longer than to copy it, so a small update has memory that stays (`transports.unix_socket`).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from weightwire.errors import TransportError, UsageError
from weightwire.receiver import Arrivals
from weightwire.transports.base import BUCKET_BYTES, Link, Sender, Wait
from weightwire.transports.memfd import MAPPED, SharedMemory, mapped
from weightwire.transports.unix_socket import SocketSender, looks, receive
from weightwire.updates.buckets import Bucket

__all__ = ["Shm", "fetch", "probe"]

ROOT = Path("/dev/shm")
_PREFIX = "weightwire"
_ADDRESS = "shm:"
_LEAST_BUCKET = 256 << 10
_OVERLAPPING = 4
_SMALL_UPDATE = 32 << 20


class Shm:
    """The trainer's half."""

    name = "shm"
    bucket_bytes = BUCKET_BYTES

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        # Kept from one small update to the next: new memory takes longer than all that is done with it.
        self._memory: SharedMemory | None = None

    @contextlib.contextmanager
    def offer(self, host: str) -> Iterator[str]:
        """`shm:NAME-SECRET`: a segment that only an engine with the same /dev/shm can find, and what it must hold."""
        if not self._root.is_dir() or not os.access(self._root, os.W_OK):
            raise TransportError(f"{self._root} is not a folder this process can write to")
        if (limit := self.room()) < _LEAST_BUCKET:
            raise TransportError(f"{self._root} has room for two buckets of {limit} bytes, fewer than {_LEAST_BUCKET}")
        name, secret = secrets.token_hex(16), secrets.token_hex(16)
        segment = self._root / f"{_PREFIX}-probe-{name}"
        try:
            segment.touch(mode=0o600, exist_ok=False)
            segment.write_text(secret)
            yield f"shm:{name}-{secret}"
        finally:
            segment.unlink(missing_ok=True)

    def bucket_limit(self, nbytes: int) -> int:
        # Of a small update, too, the second bucket is filled while the first is read.
        return min(self.room(), max(nbytes // _OVERLAPPING, _LEAST_BUCKET))

    def room(self) -> int:
        """Bytes a bucket may have: a third of what is free, so that two buckets fit and a neighbour still has room."""
        stat = os.statvfs(self._root)
        return stat.f_bavail * stat.f_frsize // 3 // mmap.PAGESIZE * mmap.PAGESIZE

    def sender(self, links: Sequence[Link], buckets: Sequence[Bucket], wait: Wait, lease: float) -> Sender:
        nbytes = sum(bucket.nbytes for bucket in buckets)
        if nbytes <= _SMALL_UPDATE:
            if self._memory is None or self._memory.data.numel() < nbytes:
                self.close()
                self._memory = SharedMemory(nbytes)
            names = [_socket(self._root, link.update) for link in links]
            return SocketSender(_ADDRESS, names, links, buckets, wait, self._memory)
        return _Sender(self._root, links, max((b.nbytes for b in buckets), default=0), wait)

    def close(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()


class _Segment:
    """One segment, under its own name for as long as the sender lives."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            # Reserved now: a full /dev/shm must be an error here, not a SIGBUS at the first touch.
            os.posix_fallocate(self._fd, 0, max(nbytes, 1))
            self._map = mmap.mmap(self._fd, max(nbytes, 1), flags=MAPPED)
        except BaseException as error:
            self._remove()
            if isinstance(error, OSError):
                raise TransportError(f"no room for {nbytes} bytes in {path.parent}: {error}") from error
            raise
        self.data = torch.frombuffer(self._map, dtype=torch.uint8)

    def unread(self) -> bool:
        return os.fstat(self._fd).st_nlink > 1

    def close(self) -> None:
        del self.data
        # The mapping goes with its last view; a caller may still hold one.
        with contextlib.suppress(BufferError):
            self._map.close()
        self._remove()

    def _remove(self) -> None:
        os.close(self._fd)
        self.path.unlink(missing_ok=True)


class _Sender:
    def __init__(self, root: Path, links: Sequence[Link], nbytes: int, wait: Wait) -> None:
        self.addresses: list[str | None] = [_ADDRESS] * len(links)
        self._root = root
        self._links = links
        self._nbytes = nbytes
        self._wait = wait
        self._segments: list[_Segment] = []

    def buffer(self, bucket: Bucket) -> torch.Tensor:
        slot = bucket.index % 2
        if slot == len(self._segments):
            path = self._root / f"{_PREFIX}-{self._links[0].update}-segment{slot}"
            self._segments.append(_Segment(path, self._nbytes))
        segment = self._segments[slot]
        self._wait(lambda: not segment.unread(), f"bucket {bucket.index - 2} to be read")
        return segment.data[: bucket.nbytes]

    def send(self, bucket: Bucket) -> None:
        path = self._segments[bucket.index % 2].path
        try:
            for name in _names(self._root, self._links, bucket):
                os.link(path, name)
        except FileNotFoundError:
            # An engine has ended the update and swept its names. Its answer to `stage` says why, and ends this wait.
            self._wait(lambda: False, "the engine to say why it ended the update")

    def finish(self) -> None:
        for segment in self._segments:
            self._wait(lambda segment=segment: not segment.unread(), "the last buckets to be read")  # type: ignore[misc]

    def close(self) -> None:
        for segment in self._segments:
            segment.close()
        self._segments.clear()
        for link in self._links:
            sweep(link.update, self._root)


def probe(offer: str, root: Path = ROOT) -> str | None:
    """None when this process sees the trainer's shared memory, else why not."""
    name, _, secret = offer.partition(":")[2].partition("-")
    if not (_is_token(name) and _is_token(secret)):
        return f"not an offer of shared memory: {offer[:80]!r}"
    try:
        found = (root / f"{_PREFIX}-probe-{name}").read_text()
    except OSError:
        return "the trainer's shared memory is not visible here (another host or container)"
    return None if found == secret else "a segment of that name holds something else"


def fetch(address: str, arrivals: Arrivals, root: Path = ROOT) -> Iterator[tuple[int, torch.Tensor]]:
    """Each bucket in turn, mapped as its name appears, or out of a socket where there is one. The names follow from the
    update's id, never from `address`."""
    if address != _ADDRESS:
        raise UsageError(
            f"not an address of shared memory: {address[:80]!r}", next_step=f"It is `{_ADDRESS}` and no more."
        )
    # The same two segments come again and again; mapping each anew would cost more than reading it.
    mapped: dict[int, torch.Tensor] = {}
    try:
        if arrivals.buckets and (socket := _await_first(root, arrivals)):
            yield from receive(socket, arrivals)
            return
        for bucket in arrivals.buckets:
            path = _name(root, arrivals.update, bucket.index, arrivals.rank)
            fd = _open(path, arrivals)
            try:
                stat = os.fstat(fd)
                if stat.st_size < bucket.nbytes:
                    raise TransportError(f"a segment holds {stat.st_size} bytes, {bucket.nbytes} were announced")
                if stat.st_ino not in mapped:
                    mapped[stat.st_ino] = _map(fd)
            finally:
                os.close(fd)
            yield bucket.index, mapped[stat.st_ino][: bucket.nbytes]
            path.unlink(missing_ok=True)
    finally:
        if arrivals.cancelled.is_set():
            sweep(arrivals.update, root)


def sweep(update: str, root: Path = ROOT) -> None:
    """Remove every name that belongs to an update."""
    if _is_token(update):
        for path in root.glob(f"{_PREFIX}-{update}-*"):
            path.unlink(missing_ok=True)


def _await_first(root: Path, arrivals: Arrivals) -> Path | None:
    """The socket through which a small update comes; None as soon as there is a first segment instead."""
    socket = _socket(root, arrivals.update)
    segment = _name(root, arrivals.update, arrivals.buckets[0].index, arrivals.rank)
    for _ in looks(arrivals):
        if socket.exists():
            return socket
        if segment.exists():
            break
    return None


def _open(path: Path, arrivals: Arrivals) -> int:
    for _ in looks(arrivals):
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    raise AssertionError("it looks until it raises")


def _map(fd: int) -> torch.Tensor:
    nbytes = os.fstat(fd).st_size
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    return mapped(fd, nbytes)


def _socket(root: Path, update: str) -> Path:
    return root / f"{_PREFIX}-{update}-socket"


def _name(root: Path, update: str, bucket: int, rank: int) -> Path:
    return root / f"{_PREFIX}-{update}-{bucket}-{rank}"


def _names(root: Path, links: Sequence[Link], bucket: Bucket) -> Iterator[Path]:
    """For each rank of each engine, where it looks for a bucket."""
    return (_name(root, link.update, bucket.index, rank) for link in links for rank in range(link.ranks))


def _is_token(text: str) -> bool:
    return len(text) == 32 and all(c in "0123456789abcdef" for c in text)
