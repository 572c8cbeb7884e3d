"""Buckets as NCCL broadcasts from the trainer's GPU to those of its engines.

A bucket of large pieces is one launch, of a broadcast for each of them: out of the trainer's own weights where they are
whole, to where they stay in the engine where there is such a place. So neither GPU has anything to copy.

The process group is our own, made directly over a store of its own, beside whatever groups either side has. Making it
takes a second, so it is kept from publish to publish, and made anew when other engines or other ranks take part, or
after any failure. NCCL itself waits for a dead peer for ever: this side never blocks in it, but looks whether each
broadcast is over, and aborts the group when its time is.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from weightwire.errors import TransportError
from weightwire.landing import BUFFERS, Landed
from weightwire.receiver import Arrivals
from weightwire.transports.base import Link, Sender, Wait, Weights
from weightwire.transports.cuda_driver import uuid_of
from weightwire.transports.nccl_group import abort_group, broadcast, make_group
from weightwire.transports.store import Meeting, Place, as_transport_error, connect, reach, wait_until
from weightwire.updates.buckets import Bucket

__all__ = ["Nccl", "fetch", "probe"]

_KEPT = "/kept"
"""Behind the address of a group that every rank is in already."""
_AHEAD = 3  # buckets that the trainer has memory for: one is being sent, one waits, one is being filled
_QUEUED = 8  # buckets at most that wait on a GPU: it takes a thousand launches, and then its caller has to wait
_LAG_SECONDS = 1.0  # by which the trainer may see the end of a broadcast after the engine has committed it
_LOOK_SECONDS = 0.0001  # between two looks at a broadcast, which takes less than a thousandth
_GLANCE_SECONDS = 0.0003  # the same for each that is under way behind it: a look takes from the engine's own thread


class _Group(NamedTuple):
    """A process group and who is in it."""

    key: str
    members: object
    group: Any

    def abort(self) -> None:
        abort_group(self.group)


class Nccl:
    """The trainer's half."""

    name = "nccl"
    bucket_bytes = 256 << 20

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._meeting = Meeting(self.name)
        self._group: _Group | None = None
        self._device = torch.device("cuda")

    @contextlib.contextmanager
    def offer(self, host: str) -> Iterator[str]:
        """`nccl:HOST:PORT/GPU`: where the store listens, and which GPU the trainer is on."""
        device = self._weights.device
        if device.type != "cuda":
            raise TransportError(f"the weights are on the {device.type}, not on an Nvidia GPU")
        if not dist.is_available() or not dist.is_nccl_available():
            raise TransportError("this build of torch has no NCCL")
        self._device = device
        yield f"nccl:{self._meeting.open(host)}/{uuid_of(device)}"

    def bucket_limit(self, nbytes: int) -> int | None:
        return None

    def sender(self, links: Sequence[Link], buckets: Sequence[Bucket], wait: Wait, lease: float) -> Sender:
        # The order of the links is that of the ranks, so the same engines in the same order are the same group.
        members = [(link.engine, link.ranks) for link in links]
        if self._group is not None and self._group.members != members:
            self._drop()
        return _Sender(self, self._meeting, links, members, max((b.nbytes for b in buckets), default=0), wait, lease)

    def close(self) -> None:
        self._drop()
        self._meeting.close()

    def _drop(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.abort()


class _Sender:
    def __init__(
        self,
        owner: Nccl,
        meeting: Meeting,
        links: Sequence[Link],
        members: object,
        nbytes: int,
        wait: Wait,
        lease: float,
    ) -> None:
        self._owner, self._members, self._nbytes, self._wait, self._lease = owner, members, nbytes, wait, lease
        self._store = meeting.store
        self._key = owner._group.key if owner._group else secrets.token_hex(16)
        addresses, self._world = meeting.places(self._key, links)
        self.addresses = [address + _KEPT if owner._group else address for address in addresses]
        self._buffers: dict[int, torch.Tensor] = {}
        self._sent: list[Any] = []
        self._finished = False

    def buffer(self, bucket: Bucket) -> torch.Tensor:
        slot = bucket.index % _AHEAD
        if slot not in self._buffers:
            self._buffers[slot] = torch.empty(self._nbytes, dtype=torch.uint8, device=self._owner._device)
        if bucket.index >= _AHEAD:
            self._finish(bucket.index - _AHEAD)
        return self._buffers[slot][: bucket.nbytes]

    def send(self, bucket: Bucket) -> None:
        data = self._buffers[bucket.index % _AHEAD][: bucket.nbytes]
        self._broadcast([piece.within(data) for piece in bucket.pieces] if bucket.apart else [data])

    def send_parts(self, bucket: Bucket, parts: Sequence[torch.Tensor]) -> None:
        if bucket.index >= _QUEUED:
            self._finish(bucket.index - _QUEUED)
        self._broadcast(parts)

    def _broadcast(self, parts: Sequence[torch.Tensor]) -> None:
        with torch.cuda.device(self._owner._device), as_transport_error("nccl", "sending"):
            if self._owner._group is None:
                group = make_group(self._store, self._key, 0, self._world, self._wait)
                self._owner._group = _Group(self._key, self._members, group)
            self._sent.append(broadcast(self._owner._group.group, parts))

    def finish(self) -> None:
        for index in range(len(self._sent)):
            self._finish(index)
        # A wait ends with a commit, too: one that failed leaves broadcasts that nobody takes, and a group of no use.
        until = time.monotonic() + _LAG_SECONDS
        while not (done := all(work.is_completed() for work in self._sent)) and time.monotonic() < until:
            time.sleep(_LOOK_SECONDS)
        self._finished = done

    def close(self) -> None:
        if not self._finished:
            # Somebody may wait in it, and what comes next must not be taken for what was meant to come.
            self._owner._drop()
        self._sent.clear()
        self._buffers.clear()

    def _finish(self, index: int) -> None:
        self._wait(self._sent[index].is_completed, f"bucket {index} to be broadcast")


def probe(offer: str) -> str | None:
    """None when this rank and the trainer can be in a group, else why not."""
    where, _, gpu = offer.partition("/")
    if not torch.cuda.is_available() or not dist.is_nccl_available():
        return "this engine is not on an Nvidia GPU with NCCL"
    if gpu == uuid_of(torch.device("cuda", torch.cuda.current_device())):
        return "the trainer is on the same GPU, which NCCL refuses"
    return reach("nccl", where)


_joined: list[_Group] = []
"""The one group that this worker is in, if any. Another trainer's replaces it."""


def fetch(address: str, arrivals: Arrivals) -> Iterator[tuple[int, Landed]]:
    """Receive each bucket in turn, on the current stream; what is done with it there is done before its memory is used
    again."""
    place = Place.parse("nccl", address.removesuffix(_KEPT))
    if not _joined or _joined[0].key != place.key:
        if address.endswith(_KEPT):
            raise TransportError(
                "this rank is not in the trainer's group, as after a restart", next_step="Publish again."
            )
        _join(place, arrivals)
    group = _joined[0].group
    complete = False
    try:
        landing = arrivals.landing()
        coming: deque[tuple[Any, Landed]] = deque()
        landings = ((bucket, landing.of(bucket)) for bucket in arrivals.buckets)
        following = next(landings, None)
        for bucket in arrivals.buckets:
            # As many as may be written to by now.
            while following is not None:
                ahead, landed = following
                if ahead.index >= bucket.index + (_QUEUED if landed.stays else BUFFERS):
                    break
                runs = landed.parts if landed.whole is None or ahead.apart else [landed.whole]
                coming.append((broadcast(group, runs), landed))
                following = next(landings, None)
            work, landed = coming.popleft()
            _wait(work, arrivals, max(_LOOK_SECONDS, _GLANCE_SECONDS * len(coming)))
            yield bucket.index, landed
        complete = True
    finally:
        if not complete:
            _leave()


def _join(place: Place, arrivals: Arrivals) -> None:
    _leave()
    with as_transport_error("nccl", "joining the trainer's group"):
        store = connect("nccl", place, arrivals.lease)
        rank = place.first + arrivals.rank
        group = make_group(store, place.key, rank, place.world, lambda ready, what: wait_until(ready, arrivals))
    _joined.append(_Group(place.key, store, group))


def _leave() -> None:
    while _joined:
        _joined.pop().abort()


def _wait(work: Any, arrivals: Arrivals, pause: float) -> None:
    wait_until(work.is_completed, arrivals, pause)
    with as_transport_error("nccl", "receiving"):
        work.wait()  # the current stream, not this thread
