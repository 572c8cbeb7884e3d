"""Where buckets arrive on a GPU: each piece where it is to stay, if there is such a place, or else in memory that is
used again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from weightwire.updates.buckets import Bucket

__all__ = ["BUFFERS", "Landed", "Landing", "room_for"]

BUFFERS = 3  # one is being filled, one is being used, one is on its way between


class Landed(NamedTuple):
    """Memory for each piece of a bucket, 1-D, of its tensor's dtype; and for all of it (uint8), unless some are
    elsewhere. `stays`: no part of it is the third bucket's after it, too."""

    parts: Sequence[torch.Tensor]
    whole: torch.Tensor | None
    stays: bool


class Landing:
    """Memory of a device for the buckets of one update. What has no place of its own lies where the third bucket after
    it does, too. `places` is as `target.HasPlaces`."""

    def __init__(
        self,
        buckets: Sequence[Bucket],
        places: Callable[[Bucket], Sequence[torch.Tensor | None]],
        device: torch.device,
    ) -> None:
        self._nbytes = _largest(buckets)
        self._places, self._device = places, device
        self._buffers: dict[int, torch.Tensor] = {}

    def of(self, bucket: Bucket) -> Landed:
        """Memory for this bucket, to be written once the current stream has come so far."""
        places = self._places(bucket) if bucket.apart else [None] * len(bucket.pieces)
        placed = [place for place in places if place is not None]
        if len(placed) == len(places):
            return Landed(placed, None, True)
        slot = bucket.index % BUFFERS
        if slot not in self._buffers:
            self._buffers[slot] = torch.empty(self._nbytes, dtype=torch.uint8, device=self._device)
        data = self._buffers[slot][: bucket.nbytes]
        parts = [
            piece.within(data) if place is None else place for piece, place in zip(bucket.pieces, places, strict=True)
        ]
        return Landed(parts, None if placed else data, False)


def room_for(buckets: Sequence[Bucket]) -> int:
    """Bytes of memory that a `Landing` takes at most."""
    return BUFFERS * _largest(buckets)


def _largest(buckets: Sequence[Bucket]) -> int:
    return max((bucket.nbytes for bucket in buckets), default=0)
