"""Updates of a real vLLM on GPUs, phase by phase.

    python benchmarks/gpu.py same|pair|direct [--updates N] [--out FILE] [-- flags of vllm serve]

One server on the last GPU; the trainer on the same GPU (`same`), or on the first (`pair`, and `direct` with
`staging="none"`). A Qwen3-8B-shaped model with random bf16 weights: 8.19 B parameters, 399 tensors, 16.38 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

import weightwire as ww

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "vllm"))
import models

SHAPE = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 4096,
    "tie_word_embeddings": False, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def weights(device: torch.device) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**SHAPE), dtype=torch.bfloat16)
    state = model.state_dict()
    return {n: torch.empty(t.shape, dtype=t.dtype, device=device).normal_(0, 0.02) for n, t in state.items()}


@contextlib.contextmanager
def serving(gpus: str, flags: list[str]) -> Iterator[str]:
    """A server with dummy weights on these GPUs; gives the path of its Unix socket."""
    folder = Path(tempfile.mkdtemp(prefix="weightwire-benchmark-"))
    models.save_tokenizer(folder)
    Qwen3Config(**SHAPE, architectures=["Qwen3ForCausalLM"], dtype="bfloat16").save_pretrained(folder)
    socket = folder / "socket"
    command = [
        sys.executable, "-m", "weightwire.cli.main", "serve", str(folder), "--load-format", "dummy", "--uds",
        str(socket), "--max-model-len", "1024", "--gpu-memory-utilization", "0.3", *flags,
    ]  # fmt: skip
    log = folder / "log"
    with log.open("w") as out:
        server = subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": gpus}, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 300
        while True:
            with contextlib.suppress(ww.WeightwireError, OSError), ww.connect(f"unix:{socket}") as engines:
                engines[0].status(timeout=5)
                break
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text()[-6000:])
            time.sleep(1)
        yield f"unix:{socket}"
    except BaseException:
        print(log.read_text()[-6000:], file=sys.stderr)
        raise
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def update(publisher: ww.Publisher, version: int, **how: Any) -> dict[str, Any]:
    started = time.perf_counter()
    receipt = publisher.publish(version, **how)
    wall = time.perf_counter() - started
    engine = next(iter(receipt.engines.values()))
    return {
        "transport": engine.transport,
        "resumed_s": wall - engine.seconds["verify"],
        "wall_s": wall,
        "pause_s": engine.pause,
        "trainer": receipt.seconds,
        "engine": engine.seconds,
        "proven": sorted(set(engine.proven.values())),
        "GB": receipt.nbytes / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["same", "pair", "direct"])
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--gpus", help="of the server")
    parser.add_argument("--transport", help="by name")
    args, flags = parser.parse_known_args()
    last = torch.cuda.device_count() - 1
    device = torch.device("cuda", last if args.mode == "same" else 0)
    torch.cuda.set_device(device)
    source = weights(device)
    how = {"staging": "none"} if args.mode == "direct" else {}
    with serving(args.gpus or str(last), flags or ["--enforce-eager"]) as url, ww.connect(url) as engines:
        with ww.Publisher(source, engines, transport=args.transport, lease=20, deadline=60) as publisher:
            print(publisher.explain(), flush=True)
            updates = []
            for version in range(1, args.updates + 1):
                source["model.norm.weight"].add_(0.01)
                updates.append(update(publisher, version, **how))
                print(json.dumps(updates[-1]), flush=True)
    steady = updates[2:]
    medians = {key: statistics.median(u[key] for u in steady) for key in ("resumed_s", "wall_s", "pause_s")}
    print(json.dumps({"mode": args.mode, "updates": len(steady), **medians}))
    if args.out:
        args.out.write_text(json.dumps({"mode": args.mode, "median": medians, "updates": updates}, indent=1))


if __name__ == "__main__":
    main()
