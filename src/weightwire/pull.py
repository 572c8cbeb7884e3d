"""Tensors on another GPU of this host, read in buckets: the link is read once, whatever is done with the bytes here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from weightwire.landing import BUFFERS, Landed, Landing
from weightwire.updates.buckets import Bucket

__all__ = ["pull"]


def pull(tensors: Sequence[torch.Tensor], buckets: Sequence[Bucket], landing: Landing) -> Iterator[tuple[int, Landed]]:
    """Each bucket in turn, as a fetch function does (`receiver.Fetch`), in memory of the current GPU, for work on the
    current stream. `tensors`: all of an update, each contiguous and 1-D."""
    here, link = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    link.wait_stream(here)  # what is written to may have been in use there
    reading: dict[int, tuple[torch.cuda.Event, Landed]] = {}

    def read(bucket: Bucket) -> None:
        landed = landing.of(bucket)
        if not landed.stays:
            link.wait_stream(here)  # the bucket before that had this memory may be in use there still
        with torch.cuda.stream(link):
            for piece, part in zip(bucket.pieces, landed.parts, strict=True):
                part.copy_(piece.of(tensors[piece.tensor]), non_blocking=True)
            reading[bucket.index] = (link.record_event(), landed)

    try:
        for bucket in buckets[: BUFFERS - 1]:
            read(bucket)
        for bucket in buckets:
            arrived, landed = reading.pop(bucket.index)
            if (ahead := bucket.index + BUFFERS - 1) < len(buckets):
                read(buckets[ahead])
            here.wait_event(arrived)
            yield bucket.index, landed
    finally:
        # The allocator would hand out memory that the link still writes to.
        here.wait_stream(link)
