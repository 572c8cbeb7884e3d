"""Run as a script: a trainer on GPU 0 is killed while it sends over NCCL to an engine on GPU 1.

python killed.py FOLDER            starts the engine, and the trainers as processes of their own
python killed.py URL VERSION HOW   one trainer; HOW is "whole" or "stops", which stops in the middle for ever
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import models
import torch
from servers import Server, Trainer, say, serving, wait_until_idle

import weightwire as ww
from weightwire.transports import nccl

LEASE = 10.0


def trainer(url: str, version: str, how: str) -> None:
    source = models.new_model("qwen3", tied=False, seed=int(version)).to("cuda:0", torch.bfloat16)
    with (
        ww.connect(url) as engines,
        ww.Publisher(source, engines, transport="nccl", bucket_bytes=1 << 16, lease=LEASE) as publisher,
    ):
        if how == "stops":
            buffer = nccl._Sender.buffer

            def stop(sender: Any, bucket: Any) -> Any:
                if bucket.index == 8:
                    say(where="in the middle")
                    time.sleep(3600)
                return buffer(sender, bucket)

            nccl._Sender.buffer = stop
        receipt = publisher.publish(int(version), deadline=120)
        print(json.dumps({"version": receipt.version, "transport": next(iter(receipt.engines.values())).transport}))


def main(folder: str) -> None:
    path = models.save(models.new_model("qwen3", tied=False, seed=99), Path(folder) / "model")
    with serving(path, Path(folder), ["engine"], gpu="1") as (server,):
        results = scenario(server)
    print("\n" + json.dumps(results))


def scenario(server: Server) -> dict[str, Any]:
    run_trainer(server.url, 1)
    before = server.generate()
    process = Trainer(__file__, server.url, 2, "stops")
    try:
        process.next()
    finally:
        process.kill()
        process.close()
    killed = wait_until_idle(server.url, seconds=120)
    killed["same tokens"] = server.generate() == before
    return {"killed": killed, "lease": LEASE, "after": run_trainer(server.url, 3)}


def run_trainer(url: str, version: int) -> dict[str, Any]:
    command = [sys.executable, __file__, url, str(version), "whole"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 2 else trainer(*sys.argv[1:])
