"""From an adapter in the trainer's memory to a server that serves it: weightwire, and what one does today.

    python benchmarks/adapter_cpu.py [--rounds 21]

Today: PEFT's `save_pretrained` to a folder in /dev/shm, then vLLM's `/v1/load_lora_adapter` under a new name, as an old
one would go on from a stale cache. Both take turns in one run, each on a server of its own, with a LoRA of rank 16 on
all linear layers of the model of `dense_cpu.py`, in float32 as PEFT trains it. Servable: the call has returned. The
first token under the new revision is measured beside it.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
import torch
from dense_cpu import PROMPT, make_model, serving
from peft import LoraConfig, get_peft_model
from report import table, write

import weightwire as ww
from weightwire.demo.model import save

WARM_UP = 3
SETTLE = 1.5  # after its last call, a vLLM server spins for a second on one core: it is not to be felt by the other
OURS, TODAY = "weightwire", "save_pretrained to /dev/shm + load_lora_adapter"
FLAGS = ["--enable-lora", "--max-lora-rank", "16", "--max-loras", "1", "--max-cpu-loras", "4"]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Bench:
    """One server, and how an adapter gets into it."""

    def __init__(self, model: Any, url: str) -> None:
        self.model = model
        self.client = httpx.Client(base_url=url, timeout=600, trust_env=False)
        self.version = 0

    def first_token(self, name: str) -> dict[str, Any]:
        body = {"model": name, "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "logprobs": 1}
        reply = self.client.post("/v1/completions", json=body)
        reply.raise_for_status()
        return dict(reply.json()["choices"][0]["logprobs"])

    def measure(self) -> tuple[dict[str, float], Any]:
        """Seconds by phase, bytes written to files, and what the server then says."""
        self.version += 1
        start = time.perf_counter()
        name, found = self.load()
        loaded = time.perf_counter()
        said = self.first_token(name)
        return {"servable": loaded - start, "first token": time.perf_counter() - loaded, **found}, said

    def load(self) -> tuple[str, dict[str, float]]:
        raise NotImplementedError


class Weightwire(Bench):
    def __init__(self, model: Any, url: str, token: str) -> None:
        super().__init__(model, url)
        self.publisher = ww.Publisher(model, ww.connect(url, token=token))

    def load(self) -> tuple[str, dict[str, float]]:
        return "policy", {**self.publisher.publish(self.version).seconds, "bytes": 0}


class Today(Bench):
    def __init__(self, model: Any, url: str, folder: Path) -> None:
        super().__init__(model, url)
        self.folder = folder

    def load(self) -> tuple[str, dict[str, float]]:
        start = time.perf_counter()
        name, path = f"policy{self.version}", self.folder / str(self.version)
        self.model.save_pretrained(path)
        saved = time.perf_counter()
        self.client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)}).raise_for_status()
        return name, {"save": saved - start, "bytes": sum(file.stat().st_size for file in path.iterdir())}

    def clean_up(self) -> None:
        """Not part of the time: the folder and the name of this round."""
        self.client.post("/v1/unload_lora_adapter", json={"lora_name": f"policy{self.version}"}).raise_for_status()
        shutil.rmtree(self.folder / str(self.version))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as disk, tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        measure(rounds, Path(disk), Path(memory))


def measure(rounds: int, disk: Path, memory: Path) -> None:
    torch.set_num_threads(1)
    base = make_model()
    save(base, disk / "model")
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS))
    adapter = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    nbytes = sum(parameter.nbytes for parameter in adapter)
    token = disk / "token"
    plain = ["weightwire.engines.vllm.launch", "serve", *FLAGS]
    ours = ["weightwire.cli.main", "serve", "--token-file", str(token), *FLAGS]
    with serving(plain, disk, "plain", VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as plain_url:
        with serving(ours, disk, "weightwire") as url:
            today = Today(model, plain_url, memory)
            ways = {OURS: Weightwire(model, url, token.read_text().strip()), TODAY: today}
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
            for number in range(rounds + WARM_UP):
                with torch.no_grad():
                    for parameter in adapter:
                        parameter.add_(torch.randn_like(parameter) * 0.02)
                said = {}
                for name, way in ways.items():
                    time.sleep(SETTLE)
                    result, said[name] = way.measure()
                    if number >= WARM_UP:
                        runs[name].append(result)
                if said[OURS] != said[TODAY]:
                    raise SystemExit(f"the servers disagree: {said}")
                today.clean_up()
    report(runs, nbytes)


def report(runs: dict[str, list[dict[str, float]]], nbytes: int) -> None:
    medians = {
        name: {phase: statistics.median(run[phase] for run in results) for phase in results[0]}
        for name, results in runs.items()
    }
    ours = medians[OURS]
    rows = [
        [name, m["servable"], m["first token"], int(m["bytes"]), m["servable"] / ours["servable"]]
        for name, m in medians.items()
    ]
    phases = ", ".join(f"{phase} {ours[phase]:.3f}" for phase in ("begin", "stage", "seal", "commit"))
    text = "\n\n".join(
        [
            "# LoRA adapters on a CPU",
            f"Qwen3-shaped, 0.29 B parameters, rank 16 on all linears, {nbytes / 1e6:.1f} MB in float32; median of"
            f" {len(runs[OURS])} rounds, seconds from the adapter in the trainer's memory to servable.",
            table(["way", "servable s", "then first token s", "bytes written to files", "this / weightwire's"], rows),
            f"Phases of weightwire, in seconds: {phases}. Of today's way, saving takes {medians[TODAY]['save']:.3f}.",
            f"Bar: at least 2 times as fast: {medians[TODAY]['servable'] / ours['servable']:.2f}.",
        ]
    )
    write("adapter_cpu", "python benchmarks/adapter_cpu.py", text, {"nbytes": nbytes, "medians": medians, "runs": runs})


if __name__ == "__main__":
    main()
