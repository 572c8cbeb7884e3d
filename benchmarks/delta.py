"""How small deltas are, against the entropy of what changed and against other ways of sending it, and how fast.

    python benchmarks/delta.py [--elements 16777216] [--steps 6]        needs `pip install zstandard`

Sizes: random bf16 weights of std 0.02 under steps of normal size, as Adam's are, of the scale that changes the wanted
share of elements. The bound is the entropy of places and steps if each were drawn independently. Then consecutive steps
of Adam at learning rate 1e-6 on the Qwen3-shaped model of `dense_cpu.py`, fp32 weights cast to bf16, random tokens.
Speeds: one thread, in bytes of the dense tensor per second.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import zstandard
from dense_cpu import make_model
from plot import Curve, log_log
from report import RESULTS, table, write

from weightwire.updates import rice
from weightwire.updates.delta import Delta, decode, encode, parse
from weightwire.updates.digest import scan

COMMAND = "python benchmarks/delta.py"
DENSITIES = (0.001, 0.005, 0.01, 0.02, 0.05)
OURS, BOUND = "weightwire", "i.i.d. entropy bound"
ROUNDS = 9


def adam_like(density: float, elements: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(elements, generator=generator) * 0.02
    step = torch.randn(elements, generator=generator)
    base = weights.bfloat16()
    low, high, probe = 1e-10, 1e-3, slice(1 << 20)
    for _ in range(30):
        scale = math.sqrt(low * high)
        moved = (weights[probe] - scale * step[probe]).bfloat16()
        share = float((moved != base[probe]).float().mean())
        low, high = (low, scale) if share > density else (scale, high)
    return base, (weights - scale * step).bfloat16()


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(-1).view(torch.int16).numpy().view(np.uint16)


def entropy_bits(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def bound(base: np.ndarray, new: np.ndarray) -> float:
    """Bytes."""
    changed = np.flatnonzero(base != new)
    if not changed.size:
        return 0.0
    steps = np.empty(changed.size, np.int64)
    rice.subtract(base[changed], new[changed], 16, steps)
    places = base.size * entropy_bits(np.array([changed.size, base.size - changed.size]))
    return (places + changed.size * entropy_bits(np.unique(steps, return_counts=True)[1])) / 8


def gaps_and_differences(base: np.ndarray, new: np.ndarray) -> bytes:
    """16-bit gaps, where 65535 only moves on, then the exclusive or of what changed."""
    changed = np.flatnonzero(base != new)
    gaps = np.diff(changed, prepend=-1) - 1
    ends = np.cumsum(gaps // 65535 + 1) - 1
    filled = np.full(ends[-1] + 1 if ends.size else 0, 65535, np.uint16)
    filled[ends] = gaps % 65535
    return filled.tobytes() + (base[changed] ^ new[changed]).tobytes()


def compressed(data: bytes, level: int) -> int:
    return len(zstandard.ZstdCompressor(level=level).compress(data))


WAYS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    BOUND: bound,
    "u16 gaps + XOR + zstd-3": lambda base, new: compressed(gaps_and_differences(base, new), 3),
    "XOR + zstd-1": lambda base, new: compressed((base ^ new).tobytes(), 1),
    "int32 index + bf16 value": lambda base, new: 6 * int(np.count_nonzero(base != new)),
}


def sizes(elements: int) -> list[dict[str, float]]:
    """By density: the share of the bf16 size that each way takes."""
    found = []
    for density in DENSITIES:
        base, new = adam_like(density, elements)
        delta = encode("w", base, new)
        check(delta, base, new)
        olds, news = bits_of(base), bits_of(new)
        takes = {way: size(olds, news) / base.nbytes for way, size in WAYS.items()}
        table_bytes = delta.blocks * delta.entry / base.nbytes
        found.append({"density": delta.density, OURS: delta.nbytes / base.nbytes, "of it table": table_bytes, **takes})
    return found


def check(delta: Delta, base: torch.Tensor, new: torch.Tensor) -> None:
    result = base.clone()
    decode("w", parse("w", delta.data), base).apply(result)
    if not np.array_equal(bits_of(result), bits_of(new)):
        raise SystemExit("a delta did not give back what it was made from")


def adam_steps(count: int) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """The bf16 weights before and after each step."""
    torch.manual_seed(0)
    model = make_model().float()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-6)
    before = cast(model)
    for _ in range(count):
        ids = torch.randint(2, model.config.vocab_size, (2, 128))
        optimiser.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimiser.step()
        after = cast(model)
        yield before, after
        before = after


def cast(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().bfloat16() for name, parameter in model.named_parameters()}


def real_steps(count: int) -> list[dict[str, float]]:
    found = []
    for number, (before, after) in enumerate(adam_steps(count), 1):
        dense = ours = least = changed = elements = embedded = tokens = 0
        for name, new in after.items():
            delta = encode(name, before[name], new)
            check(delta, before[name], new)
            dense, ours, changed = dense + new.nbytes, ours + delta.nbytes, changed + delta.count
            elements += new.numel()
            least += bound(bits_of(before[name]), bits_of(new))
            if "embed_tokens" in name:
                embedded, tokens = delta.count, new.numel()
        found.append(
            {
                "step": number, "density": changed / elements, "density of the input embedding": embedded / tokens,
                "nbytes": ours, OURS: ours / dense, BOUND: least / dense, "dense_nbytes": dense,
            }
        )  # fmt: skip
    return found


def speeds(elements: int) -> dict[str, dict[str, float]]:
    """At 1 %, dense GB for each second of one thread's processor time, and of the clock: medians."""
    base, new = adam_like(0.01, elements)
    live = base.clone()
    delta = encode("w", base, new)
    patch = decode("w", delta, base)
    known = delta.before
    ways: dict[str, Callable[[], Any]] = {
        "encode": lambda: encode("w", base, new),
        "encode, digest of the base known": lambda: encode("w", base, new, before=known),
        "decode": lambda: decode("w", parse("w", delta.data), base),
        "decode, digest of the base known": lambda: decode("w", parse("w", delta.data), base, before=known),
        "apply in place": lambda: patch.apply(live),
        "digest of a dense tensor": lambda: scan(base),
        "copy of a dense tensor": lambda: live.copy_(base),
    }
    runs: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(ROUNDS + 1):
        for way, work in ways.items():
            began = time.thread_time(), time.perf_counter()
            work()
            runs[way].append((time.thread_time() - began[0], time.perf_counter() - began[1]))
    rates = {}
    for way, times in runs.items():
        processor, clock = (statistics.median(each) for each in zip(*times[1:], strict=True))
        rates[way] = {"processor": base.nbytes / processor / 1e9, "clock": base.nbytes / clock / 1e9}
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=1 << 24)
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = sizes(arguments.elements)
    speed = speeds(arguments.elements)
    torch.set_num_threads(2)
    steps = real_steps(arguments.steps)
    report(arguments.elements, found, steps, speed)


def report(
    elements: int, found: list[dict[str, float]], steps: list[dict[str, float]], speed: dict[str, float]
) -> None:
    ways = [OURS, *WAYS]
    rows = [
        [f"{row['density']:.2%}", *(f"{row[way]:.3%}" for way in ways), f"{row[OURS] / row[BOUND]:.3f}"]
        for row in found
    ]
    real = [
        [
            row["step"], f"{row['density']:.2%}", f"{row['density of the input embedding']:.2%}",
            f"{row['nbytes'] / 1e6:.2f}", f"{row[OURS]:.3%}", f"{row[OURS] / row[BOUND]:.3f}",
        ]
        for row in steps
    ]  # fmt: skip
    text = "\n\n".join(
        [
            "# Deltas: size and speed",
            f"Share of the bf16 size, {elements} random weights of std 0.02 under Adam-like steps; header and block"
            " table included. Bar: at most 1.10 times the bound, and 0.68 % at 1 % changed.",
            table(["changed", *ways, f"{OURS} / bound"], rows),
            "![Size against density](delta.svg)",
            f"Consecutive steps of Adam at learning rate 1e-6, {steps[0]['dense_nbytes'] / 2e9:.2f} B parameters, fp32"
            f" weights cast to bf16 ({steps[0]['dense_nbytes'] / 1e6:.0f} MB), 256 random tokens a step. The bound is"
            " that of each tensor by itself; a delta is below it where changes stand close together.",
            table(["step", "changed", "of the input embedding", "MB", "of the bf16 size", "/ bound"], real),
            "One thread at 1 % changed, GB of the dense tensor a second; by the clock, other work on the machine counts"
            " too. Encoding finds what changed and takes the digests of the base and of the result; decoding includes"
            " the check of the delta's own bytes, the digest of the base and that of the result. Bar: at least 1 each.",
            table(
                ["what", "GB/s of processor time", "GB/s by the clock"],
                [[what, f"{rate['processor']:.2f}", f"{rate['clock']:.2f}"] for what, rate in speed.items()],
            ),
        ]
    )
    chart(found, steps)
    write("delta", COMMAND, text, {"elements": elements, "sizes": found, "adam": steps, "GB_per_s": speed})


def chart(found: list[dict[str, float]], steps: list[dict[str, float]]) -> None:
    curves = [
        Curve(way, [(100 * row["density"], 100 * row[way]) for row in found], dashed=way == BOUND)
        for way in (OURS, *WAYS)
    ]
    points = [(100 * row["density"], 100 * row[OURS]) for row in steps]
    curves.append(Curve("weightwire, real Adam steps", points, joined=False))
    picture = log_log("Size of a delta", "changed elements, %", "% of the bf16 size", curves)
    (RESULTS / "delta.svg").write_text(picture)


if __name__ == "__main__":
    main()
