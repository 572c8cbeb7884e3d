"""Tensors on another GPU of this host, read in buckets: the link is read once, whatever is done with the bytes here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from weightwire.updates.buckets import Bucket

__all__ = ["pull", "room_for"]

_BUFFERS = 3  # one is being filled, one is being used, one is on its way between


def room_for(buckets: Sequence[Bucket]) -> int:
    """Bytes of memory that `pull` takes here."""
    return _BUFFERS * max((bucket.nbytes for bucket in buckets), default=0)


def pull(tensors: Sequence[torch.Tensor], buckets: Sequence[Bucket]) -> Iterator[tuple[int, torch.Tensor]]:
    """Each bucket in turn, uint8, in memory of the current GPU, for work on the current stream; what is queued there
    before the next is asked for is done before that memory is used again. `tensors`: contiguous, all of an update."""
    flat = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors]
    here, link = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    size = max((bucket.nbytes for bucket in buckets), default=0)
    buffers = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in buckets[:_BUFFERS]]
    link.wait_stream(here)
    arrived: dict[int, torch.cuda.Event] = {}

    def read(bucket: Bucket) -> None:
        data = buffers[bucket.index % _BUFFERS]
        with torch.cuda.stream(link):
            for piece in bucket.pieces:
                itemsize = tensors[piece.tensor].itemsize
                nbytes, start = piece.count * itemsize, piece.start * itemsize
                part = flat[piece.tensor][start : start + nbytes]
                data[piece.offset : piece.offset + nbytes].copy_(part, non_blocking=True)
            arrived[bucket.index] = link.record_event()

    try:
        for bucket in buckets[: _BUFFERS - 1]:
            read(bucket)
        for bucket in buckets:
            here.wait_event(arrived.pop(bucket.index))
            used = here.record_event()  # the bucket before this one, into whose memory the next is read
            if (ahead := bucket.index + _BUFFERS - 1) < len(buckets):
                link.wait_event(used)
                read(buckets[ahead])
            yield bucket.index, buffers[bucket.index % _BUFFERS][: bucket.nbytes]
    finally:
        # The allocator would hand out memory that the link still writes to.
        here.wait_stream(link)
