"""Run as a script: FSDP2 on two GPUs publishes to an engine on the second.

python fsdp_gpu.py FOLDER                starts the engine, and the ranks as processes of their own
python fsdp_gpu.py URL FOLDER VERSION HOW  one rank, by torchrun's variables; on HOW "breaks" rank 1 cannot read, on
                                         "dies" it ends in the middle
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import models
import torch
import torch.distributed as dist

import weightwire as ww
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
    kind = {"whole": FsdpSource, "breaks": Broken, "dies": Dying}[how]
    source = kind(model, timeout=20)
    engines = ww.connect(url) if device.index == 0 else None
    result: dict[str, Any] = {}
    with ww.Publisher(source, engines, bucket_bytes=1 << 16, lease=20, deadline=60) as publisher:
        started = time.monotonic()
        try:
            receipt = publisher.publish(int(version))
            engine = next(iter(receipt.engines.values()))
            result = {"version": receipt.version, "transport": engine.transport, "gathers": source.gathers}
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, __file__, url, str(folder), str(version), how]
    started = [
        subprocess.Popen(
            command, env={**common, "RANK": str(n)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for n in range(2)
    ]
    try:
        found = []
        for process in started:
            out, err = process.communicate(timeout=200)
            lines = [line for line in out.splitlines() if line.startswith("{")]
            if not lines and how != "dies":
                raise RuntimeError(err[-6000:])
            found.append(json.loads(lines[-1]) if lines else {"code": process.returncode})
        return found
    finally:
        for process in started:
            process.kill()


def serve(path: Path, folder: Path, gpu: int) -> tuple[subprocess.Popen[bytes], Path]:
    folder.mkdir()
    command = [
        sys.executable, "-m", "weightwire.cli.main", "serve", str(path), "--uds", f"{folder}/socket", "--enforce-eager",
        "--max-model-len", "128", "--dtype", "bfloat16", "--gpu-memory-utilization", "0.1",
        "--kv-cache-memory-bytes", str(1 << 30), "--served-model-name", "model",
    ]  # fmt: skip
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
    with open(folder / "log", "w") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True), folder


def main(folder: str) -> None:
    first = models.save(models.new_model("qwen3", tied=True, seed=99).bfloat16(), Path(folder) / "first")
    trained = models.save(models.new_model("qwen3", tied=True, seed=SEED).bfloat16(), Path(folder) / "trained")
    servers = [serve(first, Path(folder) / "updated", 1), serve(trained, Path(folder) / "fresh", 0)]
    try:
        for process, where in servers:
            wait_for(process, where)
        url = f"unix:{servers[0][1]}/socket"
        results: dict[str, Any] = {"before": generate(servers[0][1])}
        results["whole"] = ranks(url, Path(folder), 1, "whole")
        results["updated"], results["fresh"] = (generate(where) for _, where in servers)
        results["breaks"] = ranks(url, Path(folder), 2, "breaks")
        started = time.monotonic()
        results["dies"] = ranks(url, Path(folder), 3, "dies")
        results["seconds"] = time.monotonic() - started
        results["still"] = generate(servers[0][1])
        results["after"] = ranks(url, Path(folder), 4, "whole")
    finally:
        for process, _ in servers:
            os.killpg(process.pid, signal.SIGTERM)
        for process, _ in servers:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
    print("\n" + json.dumps(results))


def wait_for(process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            with ww.connect(f"unix:{folder}/socket") as engines:
                engines[0].status(timeout=5)
            return
        except (ww.WeightwireError, OSError):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "log").read_text()[-4000:]) from None
            time.sleep(1)


def generate(folder: Path) -> Any:
    import httpx2 as httpx

    body = {"model": "model", "prompt": "hello", "max_tokens": 10, "temperature": 0, "ignore_eos": True, "logprobs": 1}
    with httpx.Client(transport=httpx.HTTPTransport(uds=f"{folder}/socket"), timeout=60) as client:
        choice = client.post("http://localhost/v1/completions", json=body).json()["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"]


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 2 else rank(*sys.argv[1:])
