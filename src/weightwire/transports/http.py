"""Buckets as HTTP bodies, from anywhere an engine's own server can be reached.

Nothing is fetched: the trainer puts each bucket, while the next one is being filled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from weightwire.transports.base import BUCKET_BYTES, Link, Sender, Wait
from weightwire.updates.buckets import Bucket

__all__ = ["Http", "probe"]


class Http:
    """The trainer's half."""

    name = "http"
    bucket_bytes = BUCKET_BYTES

    @contextlib.contextmanager
    def offer(self, host: str) -> Iterator[str]:
        yield "http:"

    def bucket_limit(self, nbytes: int) -> int | None:
        # A body is held whole by the server before the ranks get it.
        return 32 << 20

    def sender(self, links: Sequence[Link], buckets: Sequence[Bucket], wait: Wait, lease: float) -> Sender:
        return _Sender(links, max((b.nbytes for b in buckets), default=0), wait)

    def close(self) -> None:
        pass


class _Sender:
    def __init__(self, links: Sequence[Link], nbytes: int, wait: Wait) -> None:
        self.addresses: list[str | None] = [None] * len(links)
        self._links = links
        self._nbytes = nbytes
        self._wait = wait
        self._buffers: list[torch.Tensor] = []
        self._sent: list[Future[None]] = []
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weightwire-http")

    def buffer(self, bucket: Bucket) -> torch.Tensor:
        slot = bucket.index % 2
        if slot == len(self._buffers):
            self._buffers.append(torch.empty(self._nbytes, dtype=torch.uint8))
        elif bucket.index >= 2:
            self._finish(bucket.index - 2)
        return self._buffers[slot][: bucket.nbytes]

    def send(self, bucket: Bucket) -> None:
        body = memoryview(self._buffers[bucket.index % 2][: bucket.nbytes].numpy())  # type: ignore[arg-type]
        self._sent.append(self._pool.submit(self._put, bucket.index, body))

    def finish(self) -> None:
        for index in range(len(self._sent)):
            self._finish(index)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._buffers.clear()

    def _finish(self, index: int) -> None:
        job = self._sent[index]
        self._wait(job.done, f"bucket {index} to be taken")
        job.result()

    def _put(self, index: int, body: memoryview) -> None:
        for link in self._links:
            link.put(index, body)


def probe(offer: str) -> str | None:
    """Always usable where there is a server; an engine without one never offers it."""
    return None
