"""Run as a script: a trainer on GPU 0 is killed while it sends over NCCL to an engine on GPU 1.

python killed.py FOLDER            starts the engine, and the trainers as processes of their own
python killed.py URL VERSION HOW   one trainer; HOW is "whole" or "stops", which stops in the middle for ever
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import models
import torch

import weightwire as ww
from weightwire.transports import nccl

LEASE = 10.0


def trainer(url: str, version: str, how: str) -> None:
    source = models.new_model("qwen3", tied=False, seed=int(version)).to("cuda:0", torch.bfloat16)
    with ww.connect(url) as engines:
        with ww.Publisher(source, engines, transport="nccl", bucket_bytes=1 << 16, lease=LEASE) as publisher:
            if how == "stops":
                buffer = nccl._Sender.buffer

                def stop(sender: Any, bucket: Any) -> Any:
                    if bucket.index == 8:
                        print("in the middle", flush=True)
                        time.sleep(3600)
                    return buffer(sender, bucket)

                nccl._Sender.buffer = stop
            receipt = publisher.publish(int(version), deadline=120)
            print(json.dumps({"version": receipt.version, "transport": next(iter(receipt.engines.values())).transport}))


def main(folder: str) -> None:
    path = models.save(models.new_model("qwen3", tied=False, seed=99), Path(folder) / "model")
    url = f"unix:{folder}/socket"
    command = [
        sys.executable, "-m", "weightwire.cli.main", "serve", str(path), "--uds", f"{folder}/socket", "--enforce-eager",
        "--max-model-len", "128", "--dtype", "bfloat16", "--gpu-memory-utilization", "0.1",
        "--kv-cache-memory-bytes", str(1 << 30),
    ]  # fmt: skip
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "1"}
    with open(f"{folder}/log", "w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        results = scenario(url, server, Path(folder))
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
    print("\n" + json.dumps(results))


def scenario(url: str, server: subprocess.Popen[bytes], folder: Path) -> dict[str, Any]:
    deadline = time.monotonic() + 300
    while True:
        try:
            with ww.connect(url) as engines:
                engines[0].status(timeout=5)
            break
        except (ww.WeightwireError, OSError):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "log").read_text()[-4000:]) from None
            time.sleep(1)
    run_trainer(url, 1)
    before = generate(folder)
    process = subprocess.Popen([sys.executable, __file__, url, "2", "stops"], stdout=subprocess.PIPE, text=True)
    assert "in the middle" in process.stdout.readline()
    process.kill()
    process.wait()
    started = time.monotonic()
    with ww.connect(url) as engines:
        while (status := engines[0].status()).state != "idle" and time.monotonic() - started < 120:
            time.sleep(0.2)
    seconds = time.monotonic() - started
    killed = {"state": status.state, "version": status.version, "same tokens": generate(folder) == before}
    return {"killed": killed, "seconds": seconds, "lease": LEASE, "after": run_trainer(url, 3)}


def run_trainer(url: str, version: int) -> dict[str, Any]:
    command = [sys.executable, __file__, url, str(version), "whole"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def generate(folder: Path) -> Any:
    import httpx2 as httpx

    with httpx.Client(transport=httpx.HTTPTransport(uds=f"{folder}/socket"), timeout=60) as client:
        body = {"model": f"{folder}/model", "prompt": "hello", "max_tokens": 10, "temperature": 0, "ignore_eos": True}
        return client.post("http://localhost/v1/completions", json=body).json()["choices"][0]["text"]


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 2 else trainer(*sys.argv[1:])
