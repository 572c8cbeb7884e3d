"""A Qwen3-8B-shaped model, sharded over all GPUs as FSDP2 does it, into an engine on the last of them, over NCCL.

    python benchmarks/gpu_fsdp.py [--updates 8] [--out FILE]

Measured with what ranks hold gathered from GPU to GPU, and once by way of the CPU, as where ranks share a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM, Qwen3Config

import weightwire as ww
from gpu import IDLE, SHAPE, WARM_UP, serving, timed
from weightwire.demo.server import free_port
from weightwire.sources.fsdp import FsdpSource


class ByCpu(FsdpSource):
    def _gpu(self) -> None:
        return None


def rank(url: str, updates: int) -> None:
    """One rank's part. Rank 0 prints what each update took."""
    number, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    mesh = init_device_mesh("cuda", (size,))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**SHAPE), dtype=torch.bfloat16)
    module = torch.nn.Module()
    for n, (name, tensor) in enumerate(model.state_dict().items()):
        rows = tensor.chunk(size)[number].shape
        local = torch.empty(rows, dtype=tensor.dtype, device=device).normal_(0, 0.02)
        sharded = DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
        module.register_parameter(f"{n}", torch.nn.Parameter(sharded, requires_grad=False))
        module.names = [*getattr(module, "names", []), name]

    def state() -> dict[str, torch.Tensor]:
        return dict(zip(module.names, module.parameters(), strict=True))

    version = 0
    engines = ww.connect(url) if number == 0 else None
    for way, kind, count in (("gpu", FsdpSource, updates), ("cpu", ByCpu, 1)):
        source = kind(module, timeout=60, state=state)
        with ww.Publisher(source, engines, transport="nccl", lease=60, deadline=120) as publisher:
            for n in range(count + (WARM_UP if way == "gpu" else 0)):
                version += 1
                found = timed(publisher.publish, version)
                if number == 0 and (n >= WARM_UP or way == "cpu"):
                    print(json.dumps({"way": way, "ranks": size, **found}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main(updates: int) -> list[dict[str, Any]]:
    size = torch.cuda.device_count()
    port = free_port()
    with serving(str(size - 1), IDLE) as path:
        common = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, __file__, "--rank", f"unix:{path}", "--updates", str(updates)]
        ranks = [
            subprocess.Popen(command, env={**common, "RANK": str(n)}, stdout=subprocess.PIPE, text=True)
            for n in range(size)
        ]
        try:
            outputs = [each.communicate(timeout=300)[0] for each in ranks]
        finally:
            for each in ranks:
                each.kill()
    return [json.loads(line) for line in outputs[0].splitlines() if line.startswith("{")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", metavar="URL", help="used by the script itself")
    args = parser.parse_args()
    if args.rank:
        rank(args.rank, args.updates)
    else:
        results = main(args.updates)
        for each in results:
            print(json.dumps(each))
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")
