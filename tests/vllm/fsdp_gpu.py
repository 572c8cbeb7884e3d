"""Run as a script: FSDP2 on two GPUs publishes to an engine on the second.

python fsdp_gpu.py FOLDER                starts the engine, and the ranks as processes of their own
python fsdp_gpu.py URL FOLDER VERSION HOW  one rank, by torchrun's variables; on HOW "breaks" rank 1 cannot read, on
                                         "dies" it ends in the middle, on "deltas" it goes on with a delta
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import models
import torch
import torch.distributed as dist
from servers import Server, complete, serving

import weightwire as ww
from support.scripts import last_json, run_ranks
from weightwire.sources.fsdp import FsdpSource

SEED = 7


class Broken(FsdpSource):
    """Fails on rank 1 at the third tensor, before anything is sent."""

    def _blocks(self, tensor: int, *rest: Any) -> Any:
        if tensor == 3 and dist.get_rank() == 1:
            raise RuntimeError("rank 1 cannot read")
        return super()._blocks(tensor, *rest)


class Dying(FsdpSource):
    """Rank 1 is killed when others wait for the second half of the model."""

    def gather(self, runs: Any) -> None:
        def dying() -> Any:
            if (found := runs())[0][0] >= len(self._specs) // 2 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        super().gather(dying)


def rank(url: str, folder: str, version: str, how: str) -> None:
    from torch.distributed.fsdp import fully_shard

    device = torch.device("cuda", int(os.environ["RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    model = models.new_model("qwen3", tied=True, seed=SEED).to(device, torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    source = {"breaks": Broken, "dies": Dying}.get(how, FsdpSource)(model, timeout=20)
    engines = ww.connect(url) if device.index == 0 else None
    result: dict[str, Any] = {}
    baseline = "device" if how == "deltas" else None
    with ww.Publisher(source, engines, bucket_bytes=1 << 16, lease=20, deadline=60, baseline=baseline) as publisher:
        started = time.monotonic()
        try:
            receipt = publisher.publish(int(version))
            if how == "deltas":
                for parameter in model.parameters():
                    parameter.to_local().detach().view(-1)[::100] *= 1.01
                receipt = publisher.publish(int(version) + 1)
            engine = next(iter(receipt.engines.values()))
            result = {"version": receipt.version, "transport": engine.transport, "gathers": source.gathers}
            result["kind"] = receipt.kind
            result["proven"] = sorted(set(engine.proven.values()))
        except ww.WeightwireError as error:
            result = {"error": str(error), "seconds": time.monotonic() - started}
    print(json.dumps(result), flush=True)
    if how != "dies":
        dist.barrier()  # the trainer's own group is still of use
        dist.destroy_process_group()
    else:
        os._exit(0)  # it would wait for the rank that died


def ranks(url: str, folder: Path, version: int, how: str) -> list[dict[str, Any]]:
    found = []
    for ended in run_ranks(Path(__file__), url, folder, version, how, size=2, seconds=200, environment={}):
        spoke = any(line.startswith("{") for line in ended.out.splitlines())
        if not spoke and how != "dies":
            raise RuntimeError(ended.err[-6000:])
        found.append(last_json(ended.out) if spoke else {"code": ended.code})
    return found


def main(path: str) -> None:
    folder = Path(path)
    first = models.save(models.new_model("qwen3", tied=True, seed=99).bfloat16(), folder / "first")
    trained = models.save(models.new_model("qwen3", tied=True, seed=SEED).bfloat16(), folder / "trained")
    with (
        serving(first, folder, ["updated"], gpu="1") as (updated,),
        serving(trained, folder, ["fresh"], gpu="0") as (fresh,),
    ):
        results: dict[str, Any] = {"before": said(updated)}
        results["whole"] = ranks(updated.url, folder, 1, "whole")
        results["updated"], results["fresh"] = said(updated), said(fresh)
        results["breaks"] = ranks(updated.url, folder, 2, "breaks")
        results["dies"] = ranks(updated.url, folder, 3, "dies")
        results["still"] = said(updated)
        results["deltas"] = ranks(updated.url, folder, 4, "deltas")
        results["changed"] = said(updated)
        results["after"] = ranks(updated.url, folder, 6, "whole")
        results["back"] = said(updated)
    print("\n" + json.dumps(results))


def said(server: Server) -> Any:
    choice = complete(server.url, server.model, logprobs=1)
    return choice["text"], choice["logprobs"]["token_logprobs"]


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 2 else rank(*sys.argv[1:])
