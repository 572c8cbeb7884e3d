"""Deltas of a Qwen3-8B-shaped model on one GPU, made and applied: no engine, no transport.

    python benchmarks/gpu_delta.py [--share 0.01] [--runs 10] [--out FILE]

`encode`: compare, encode, and bring the bytes to the host. `before`: the digests of the live weights. `decode`: the
bytes, already on the GPU, checked, decoded and looked up in the weights. `apply`: the new values written. Both sides
keep the tables of where their tensors are from one update to the next, as a publisher and a worker do. A step moves
each changed element by one unit in the last place.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu import step, weights
from weightwire.interpreter import collecting_later
from weightwire.updates.delta_cuda import (
    Deltas,
    Made,
    compare_all,
    decode_all,
    encode_compared,
    pair_up,
    parse_all,
    together,
)
from weightwire.updates.digest import scan_tensors_any, settle
from weightwire.updates.digest_cuda import byte_lines, scan_lines, table
from weightwire.updates.patch_cuda import Patches, Sites


def timed(times: dict[str, list[float]], name: str, work: Callable[[], Any]) -> Any:
    torch.cuda.synchronize()
    with collecting_later():  # as in a publisher, and in a worker that makes ready
        started = time.perf_counter()
        result = work()
        torch.cuda.synchronize()
        times.setdefault(name, []).append(1000 * (time.perf_counter() - started))
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda", 0)
    live = list(weights(device).values())
    names = [f"w{n}" for n in range(len(live))]
    sites = Sites.of_whole(live)
    times: dict[str, list[float]] = {}
    gc.freeze()  # as vLLM does in its engine's process
    news = [tensor.clone() for tensor in live]
    pairs = pair_up(names, live, news)

    def encode() -> Made:
        made = encode_compared(compare_all(pairs))
        made.wait()
        return made

    for _ in range(args.runs + 2):
        for new in news:
            step(new, args.share)
        deltas = timed(times, "encode", encode).deltas
        nbytes = sum(delta.nbytes for delta in deltas)
        held = together(deltas, device)  # as they arrive: one behind the other
        sizes = held.heads["nbytes"].astype(np.int64)
        timed(times, "before", lambda: settle(scan_tensors_any(live)))

        def decode(held: Deltas = held, sizes: Any = sizes) -> Patches:
            lines = byte_lines(held.memory.data_ptr() + held.begins, sizes)
            scans = settle(scan_lines(table(lines, device)))
            changes = decode_all(names, parse_all(names, held.memory, held.begins, sizes, scans))
            patches = Patches(changes, sites)
            patches.look().cpu()
            return patches

        timed(times, "decode", decode)
        timed(times, "apply", decode().write)
        if not all(torch.equal(one, other) for one, other in zip(live, news, strict=True)):
            raise SystemExit("what was decoded is not what was encoded")
        peak = torch.cuda.max_memory_allocated(device)
    medians = {name: statistics.median(each[2:]) for name, each in times.items()}
    dense = sum(tensor.nbytes for tensor in live)
    facts = {"device": torch.cuda.get_device_name(device), "GB": dense / 1e9, "delta_GB": nbytes / 1e9}
    print(json.dumps({**facts, "peak_GB": peak / 1e9, "median_ms": medians}))
    if args.out:
        args.out.write_text(json.dumps({**facts, "share": args.share, "ms": times}, indent=1))


if __name__ == "__main__":
    main()
