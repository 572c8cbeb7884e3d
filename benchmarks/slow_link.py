"""Over a link of 100 Mbit/s, what an update takes as a delta and as everything.

    sudo python benchmarks/slow_link.py [--rounds 3]        needs the commands `ip` and `tc`

`weightwire serve` runs vLLM on the CPU in a network namespace of its own; the trainer, outside, reaches it over a pair
of virtual interfaces that `tc` shapes to that rate in both directions. Qwen3-shaped, 0.3 B parameters in bfloat16, of
which fp32 steps of normal size, as Adam's are, change about 1 %. Each round is three deltas, and then everything.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from dense_cpu import Bench, make_model
from report import table, write

import weightwire as ww
from weightwire.demo.model import save
from weightwire.demo.server import Server

COMMAND = "sudo python benchmarks/slow_link.py"
SHAPE = ("tbf", "rate", "100mbit", "burst", "64kb", "latency", "50ms")
HERE, THERE, PORT = "10.213.0.1", "10.213.0.2", 8000
CHANGED = 0.01
BARS = {"bytes": 100, "time": 20}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=30)


@contextlib.contextmanager
def link() -> Iterator[tuple[str, str]]:
    """A namespace at the far end of a slow link, and the link's interface here. Both are gone afterwards, with every
    process in there."""
    space, here, there = (f"{prefix}{os.getpid()}" for prefix in ("wwslow", "wwh", "wwt"))
    ip("netns", "add", space)
    try:
        ip("link", "add", here, "type", "veth", "peer", "name", there)
        ip("link", "set", there, "netns", space)
        ip("addr", "add", f"{HERE}/30", "dev", here)
        ip("link", "set", here, "up")
        inside = ("netns", "exec", space)
        ip(*inside, "ip", "addr", "add", f"{THERE}/30", "dev", there)
        for device in ("lo", there):
            ip(*inside, "ip", "link", "set", device, "up")
        subprocess.run(["tc", "qdisc", "add", "dev", here, "root", *SHAPE], check=True, timeout=30)
        ip(*inside, "tc", "qdisc", "add", "dev", there, "root", *SHAPE)
        yield space, here
    finally:
        left = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, timeout=30).stdout
        for process in map(int, left.split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("link", "del", here)  # with its other end
        ip("netns", "del", space)


class Trainer(Bench):
    """The weights, the fp32 ones behind them, and a publisher that sends over HTTP."""

    def __init__(self, model: Any, url: str, token: str, interface: str) -> None:
        super().__init__(model, url, None)
        self.engines = ww.connect(url, token=token)
        self.publisher = ww.Publisher(model, self.engines, transport="http", baseline="host")
        self._sent = Path(f"/sys/class/net/{interface}/statistics/tx_bytes")
        generator = torch.Generator().manual_seed(1)
        self._masters = [_before_rounding(weights.detach(), generator) for weights in model.parameters()]
        self._scale = self._find_scale()

    def _find_scale(self) -> float:
        weights = max(self._masters, key=torch.Tensor.numel).view(-1)[: 1 << 22]
        noise = torch.randn(weights.shape)
        low, high = 1e-9, 1e-3
        for _ in range(30):
            scale = math.sqrt(low * high)
            share = ((weights - scale * noise).bfloat16() != weights.bfloat16()).float().mean()
            low, high = (low, scale) if share > CHANGED else (scale, high)
        return scale

    @torch.no_grad()
    def step(self) -> None:
        for master, weights in zip(self._masters, self.model.parameters(), strict=True):
            master.add_(torch.randn(master.shape), alpha=self._scale)
            weights.copy_(master)

    def send(self, kind: Any) -> dict[str, float]:
        """Bytes, and seconds from the weights in the trainer's memory to a token from them."""
        self.step()
        self.version += 1
        sent, start = int(self._sent.read_text()), time.perf_counter()
        receipt = self.publisher.publish(self.version, kind=kind)
        published = time.perf_counter()
        self.first_token()
        total = time.perf_counter() - start
        on_the_wire = int(self._sent.read_text()) - sent
        if receipt.kind != kind or not self.agrees():
            raise SystemExit(f"after a {receipt.kind} update the server does not serve the trainer's weights")
        print(receipt, flush=True)
        seconds = {f"trainer {phase}": value for phase, value in receipt.seconds.items()}
        engine = next(iter(receipt.engines.values()))
        seconds |= {f"engine {phase}": value for phase, value in engine.seconds.items()}
        seconds |= {"pause": receipt.pause, "first token": total - (published - start)}
        return {"total": total, "nbytes": receipt.nbytes, "on the wire": on_the_wire, **seconds}


def _before_rounding(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What may have stood there in float32: as after many steps, anywhere between two bf16 values."""
    exponents = torch.frexp(weights.float()).exponent
    return weights + torch.ldexp(torch.rand(weights.shape, generator=generator) - 0.5, exponents - 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwinds, as Ctrl-C does
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = make_model()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save(model, folder / "model")
        with link() as (space, interface), serving(space, folder) as (url, token):
            trainer = Trainer(model, url, token, interface)
            trainer.send("dense")  # there is nothing to start from
            trainer.send("delta")  # and things that are done once
            runs: dict[str, list[dict[str, float]]] = {"delta": [], "dense": []}
            for _ in range(rounds):
                for kind in ("delta", "delta", "delta", "dense"):
                    runs[kind].append(trainer.send(kind))
    report(runs, sum(weights.nbytes for weights in model.parameters()))


@contextlib.contextmanager
def serving(space: str, folder: Path) -> Iterator[tuple[str, str]]:
    token, url = folder / "token", f"http://{THERE}:{PORT}"
    command = [
        "ip", "netns", "exec", space, sys.executable, "-m", "weightwire.cli.main", "serve", str(folder / "model"),
        "--token-file", str(token), "--host", THERE, "--port", str(PORT), "--dtype", "bfloat16", "--enforce-eager",
        "--max-model-len", "256", "--enable-scale-out",
    ]  # fmt: skip
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    with Server(command, url, log=folder / "server.log", environment=environment) as server:
        server.wait_until_ready()
        yield url, token.read_text().strip()


def report(runs: dict[str, list[dict[str, float]]], nbytes: int) -> None:
    medians = {
        kind: {what: statistics.median(run[what] for run in results) for what in results[0]}
        for kind, results in runs.items()
    }
    delta, dense = medians["delta"], medians["dense"]
    phases = [what for what in delta if what not in ("total", "nbytes", "on the wire")]
    rows = [
        ["total", f"{dense['total']:.2f} s", f"{delta['total']:.2f} s", f"{dense['total'] / delta['total']:.1f}"],
        *(
            [what, f"{dense[what] / 1e6:.2f} MB", f"{delta[what] / 1e6:.2f} MB", f"{dense[what] / delta[what]:.1f}"]
            for what in ("nbytes", "on the wire")
        ),
        *([what, f"{dense.get(what, 0):.3f} s", f"{delta[what]:.3f} s", ""] for what in phases),
    ]
    text = "\n\n".join(
        [
            "# Over a link of 100 Mbit/s",
            f"vLLM on the CPU in a network namespace, reached over a virtual link shaped by `tc ... {' '.join(SHAPE)}`"
            f" in both directions; {nbytes / 2e9:.2f} B parameters, {nbytes / 1e6:.0f} MB in bfloat16, about"
            f" {CHANGED:.0%} of which changes from one version to the next. Medians of {len(runs['delta'])} deltas"
            f" and of {len(runs['dense'])} times everything, all over http; `total` is from the weights in the"
            " trainer's memory to a token from the new weights, and `on the wire` is what the trainer's interface sent,"
            " headers included.",
            table(["what", "everything", "delta", "everything / delta"], rows),
            f"Bars: at least {BARS['bytes']} times fewer bytes: {dense['on the wire'] / delta['on the wire']:.0f}; and"
            f" {BARS['time']} times less time: {dense['total'] / delta['total']:.1f}.",
        ]
    )
    write("slow_link", COMMAND, text, {"nbytes": nbytes, "shape": SHAPE, "medians": medians, "runs": runs})


if __name__ == "__main__":
    main()
