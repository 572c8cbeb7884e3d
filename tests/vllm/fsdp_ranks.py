"""Run as a script on each rank: FSDP2 over gloo on the CPU, publishing to a server.

    RANK=.. WORLD_SIZE=.. MASTER_ADDR=.. MASTER_PORT=.. python fsdp_ranks.py URL TOKEN MODEL VERSION BREAK

Prints one line of JSON: what the publish came to on this rank, and how far its memory grew meanwhile.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import weightwire as ww
from weightwire.sources.fsdp import FsdpSource

BUCKET = 1 << 20


class Broken(FsdpSource):
    """Fails on rank 1 at the third tensor, before anything is sent."""

    def _blocks(self, tensor: int, *rest: Any) -> Any:
        if tensor == 3 and dist.get_rank() == 1:
            raise RuntimeError("rank 1 cannot read")
        return super()._blocks(tensor, *rest)


class Peak:
    """The most memory this process had while it watched, over what it had at the start, in bytes."""

    def __enter__(self) -> Peak:
        self._process, self._done, self.grown = psutil.Process(), threading.Event(), 0
        self._start = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.grown = max(self.grown, self._process.memory_info().rss - self._start)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def main(url: str, token: str, path: str, version: int, breaks: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    source = Broken(model, timeout=120) if breaks else model
    engines = ww.connect(url, token=token) if dist.get_rank() == 0 else None
    result: dict[str, Any] = {"rank": dist.get_rank()}
    with ww.Publisher(source, engines, bucket_bytes=BUCKET, deadline=120) as publisher:
        if not breaks:
            publisher.publish(version)  # what torch and numba set up once is not the update's
        began = time.monotonic()
        try:
            with Peak() as peak:
                result["version"] = publisher.publish(version + 1).version
        except ww.WeightwireError as error:
            result["error"], result["type"] = str(error), type(error).__name__
        result["seconds"], result["grown"] = time.monotonic() - began, peak.grown
    dist.barrier()  # the trainer's own group is still of use
    dist.destroy_process_group()
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5] == "break")
