"""The transport port: how buckets get from a trainer to the ranks of its engines.

The trainer's half is a `Transport`, which makes one `Sender` for a publish; the workers' half is two plain functions
in the same file, `fetch` and `probe`, found by the scheme of an address. A sender owns at most three buckets of memory,
or all of a small update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from weightwire.updates.buckets import Bucket

__all__ = ["BUCKET_BYTES", "Lender", "Link", "Pushes", "Sender", "SendsParts", "Transport", "Wait", "Weights"]

BUCKET_BYTES = 64 << 20

Wait = Callable[[Callable[[], bool], str], None]
"""`wait(ready, what)` returns once `ready()` is true, and raises when an engine has failed or the deadline is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One engine's end: its name, the id it gave the update, its number of ranks, and a way to hand it bytes."""

    engine: str
    update: str
    ranks: int
    put: Callable[[int, memoryview], None]


class Weights(Protocol):
    """What a transport may ask about the weights that it is to send."""

    @property
    def device(self) -> torch.device:
        """Where this process has them."""

    def whole(self) -> Sequence[torch.Tensor] | None:
        """All of them, in the order of their metadata; None when this process does not have them whole."""


class Sender(Protocol):
    """Takes every bucket of one publish to several engines, in order."""

    @property
    def addresses(self) -> Sequence[str | None]:
        """One a link: where that engine's ranks shall fetch from; None where the bytes are handed over instead."""

    def buffer(self, bucket: Bucket) -> torch.Tensor:
        """Memory to fill with this bucket, uint8, `bucket.nbytes` long; waits until one is free."""

    def send(self, bucket: Bucket) -> None:
        """Send the buffer last handed out."""

    def finish(self) -> None:
        """Wait until the last bucket has been taken over by every reader, as far as this side can see."""

    def close(self) -> None:
        """Leave nothing behind: no memory, no segment, no connection. Also after a failure, at any point."""


@runtime_checkable
class Pushes(Protocol):
    """A `Sender` whose bytes go out only while it is called."""

    def push(self) -> bool:
        """Send what can be sent without waiting; whether every reader has come and has all that is filled."""


@runtime_checkable
class SendsParts(Protocol):
    """A `Sender` that can send weights from where they are."""

    def send_parts(self, bucket: Bucket, parts: Sequence[torch.Tensor]) -> None:
        """Send a bucket, in its turn, of which these are the pieces, 1-D. They stay as they are until `finish`."""


@runtime_checkable
class Lender(Protocol):
    """A way that needs no buckets: engines read the trainer's own memory."""

    name: str

    def offer(self, host: str) -> AbstractContextManager[str]:
        """As of `Transport`."""

    def lend(self, tensors: Sequence[torch.Tensor]) -> AbstractContextManager[str]:
        """Where an engine on this host finds these tensors, in this order, while the context lasts."""

    def close(self) -> None:
        """As of `Transport`."""


class Transport(Protocol):
    """One way for buckets to travel, on the trainer's side."""

    name: str
    bucket_bytes: int
    """How large a bucket suits it best."""

    def offer(self, host: str) -> AbstractContextManager[str]:
        """An address for an engine on `host` to try, while the context lasts. Entering it raises `TransportError`
        saying why this transport cannot be used here."""

    def bucket_limit(self, nbytes: int) -> int | None:
        """Bytes a bucket of an update of `nbytes` may have here at most, if that is limited."""

    def sender(self, links: Sequence[Link], buckets: Sequence[Bucket], wait: Wait, lease: float) -> Sender:
        """Begin to send, before engines have begun: they are told its addresses as they do, and look there from then
        on. `lease` is how many seconds a silent peer is waited for."""

    def close(self) -> None:
        """Withdraw what `offer` put up."""
