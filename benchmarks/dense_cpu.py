"""From weights in the trainer's memory to tokens from the new weights: weightwire, and what one does today.

    python benchmarks/dense_cpu.py [--rounds 11]

Today: `save_pretrained` to a folder, then `reload_weights` from it in a plain `vllm serve`, with generation paused
meanwhile as vLLM's documentation of weight updates has it. All ways take turns in one run, with a Qwen3-shaped model of
0.3 B parameters in bfloat16 and untied embeddings (with tied ones vLLM's reload is not exact on a CPU). Two servers are
up, of which one is asked at a time: `weightwire serve` and vLLM's own command without the plugin. The first keeps freed
memory for the next update, from which vLLM's reload profits too, so that is measured there as well.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import psutil
import torch
from report import table, write
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

import weightwire as ww
from weightwire.demo.model import save
from weightwire.demo.server import Server, free_port

BUCKET = 4 << 20
WARM_UP = 3  # rounds in which processes still take memory that they have not had before
TO_DISK = "save_pretrained to disk + reload_weights, plain server"
TO_MEMORY = "save_pretrained to /dev/shm + reload_weights, plain server"
TUNED = "save_pretrained to /dev/shm + reload_weights, weightwire serve"
PROMPT = [5, 6, 7, 8]


def make_model() -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=32768, hidden_size=1024, intermediate_size=3072, num_hidden_layers=14, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=1024, tie_word_embeddings=False,
        eos_token_id=1, pad_token_id=0, architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


class Memory:
    """The most resident memory that processes had over what they had at the start, in bytes, while it watched. Buckets
    in shared memory count for the trainer, whose they are, and not for the worker that maps them."""

    def __init__(self, **processes: psutil.Process) -> None:
        self._processes = processes
        self.grown = dict.fromkeys(processes, 0)

    def __enter__(self) -> Memory:
        self._start = {name: _own(name, process) for name, process in self._processes.items()}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            for name, process in self._processes.items():
                self.grown[name] = max(self.grown[name], _own(name, process) - self._start[name])

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def _own(name: str, process: psutil.Process) -> int:
    memory = process.memory_info()
    return int(memory.rss - (memory.shared if name == "worker" else 0))


class Bench:
    """One server, and the ways of updating it."""

    def __init__(self, model: PreTrainedModel, url: str, token: str | None) -> None:
        self.model = model
        self.client = httpx.Client(base_url=url, timeout=600, trust_env=False)
        self.version = 0
        if token is not None:
            self.engines = ww.connect(url, token=token)
            self.publisher = ww.Publisher(model, self.engines, bucket_bytes=BUCKET)

    def step(self) -> None:
        """As an optimiser would: every weight moves a little."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1.001)

    def first_token(self) -> None:
        body = {"token_ids": PROMPT, "sampling_params": {"max_tokens": 1, "temperature": 0}}
        self.client.post("/inference/v1/generate", json=body).raise_for_status()

    def publish(self) -> dict[str, float]:
        self.version += 1
        start = time.perf_counter()
        receipt = self.publisher.publish(self.version)
        published = time.perf_counter()
        self.first_token()
        seconds = {f"trainer {phase}": value for phase, value in receipt.seconds.items()}
        engine = next(iter(receipt.engines.values()))
        seconds |= {f"engine {phase}": value for phase, value in engine.seconds.items()}
        total = time.perf_counter() - start
        return {"total": total, "pause": receipt.pause, "first token": total - (published - start), **seconds}

    def save_and_reload(self, folder: Path) -> dict[str, float]:
        start = time.perf_counter()
        self.model.save_pretrained(folder)
        saved = time.perf_counter()
        self.client.post("/pause", params={"mode": "keep"}).raise_for_status()
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self.client.post("/collective_rpc", json=body).raise_for_status()
        self.client.post("/resume").raise_for_status()
        resumed = time.perf_counter()
        self.first_token()
        end = time.perf_counter()
        return {"total": end - start, "pause": resumed - saved, "save": saved - start, "first token": end - resumed}

    def agrees(self) -> bool:
        """Whether the server now says what this model says."""
        body = {"token_ids": PROMPT, "sampling_params": {"max_tokens": 4, "temperature": 0, "logprobs": 0}}
        choice = self.client.post("/inference/v1/generate", json=body).json()["choices"][0]
        ids = torch.tensor([[*PROMPT, *choice["token_ids"]]])
        with torch.no_grad():
            scores = torch.log_softmax(self.model(ids).logits[0].float(), -1)
        said = [step["logprob"] for step in choice["logprobs"]["content"]]
        own = [float(scores[len(PROMPT) - 1 + i, t]) for i, t in enumerate(choice["token_ids"])]
        return max(abs(a - b) for a, b in zip(said, own, strict=True)) < 0.05


def worker_of(server: psutil.Process) -> psutil.Process:
    """The largest process under the server: the one that holds the model."""
    return max(server.children(recursive=True), key=lambda process: process.memory_info().rss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as disk, tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        measure(rounds, Path(disk), Path(memory))


@contextlib.contextmanager
def serving(command: list[str], folder: Path, name: str, **more: str) -> Iterator[str]:
    """The URL of a server of the model in `folder`, ready."""
    port = free_port()
    flags = [
        str(folder / "model"), "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--enforce-eager",
        "--max-model-len", "256", "--enable-scale-out",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, "-m", *command, *flags]
    with Server(command, url, log=folder / f"{name}.log", environment={**environment, **more}) as server:
        server.wait_until_ready()
        yield url


def measure(rounds: int, disk: Path, memory: Path) -> None:
    torch.set_num_threads(1)
    model = make_model()
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    save(model, disk / "model")
    token = disk / "token"
    ours = ["weightwire.cli.main", "serve", "--token-file", str(token)]
    with serving(["weightwire.engines.vllm.launch", "serve"], disk, "plain") as plain_url:
        plain = Bench(model, plain_url, None)
        with serving(ours, disk, "weightwire") as url:
            bench = Bench(model, url, token.read_text().strip())
            grown = watch_memory(bench)
            ways = {
                "weightwire": (bench, bench.publish),
                TO_DISK: (plain, lambda: plain.save_and_reload(disk / "saved")),
                TO_MEMORY: (plain, lambda: plain.save_and_reload(memory / "saved")),
                TUNED: (bench, lambda: bench.save_and_reload(memory / "saved")),
            }
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
            for number in range(rounds + WARM_UP):
                for name, (server, way) in ways.items():
                    server.step()
                    result = way()
                    if not server.agrees():
                        raise SystemExit(f"after {name} the server does not serve the trainer's weights")
                    if number >= WARM_UP:
                        runs[name].append(result)
    report(runs, grown, nbytes)


def watch_memory(bench: Bench) -> dict[str, int]:
    """What the first complete updates take, once everything that an update needs has been imported and compiled, and
    the server has generated: its first token takes memory of its own."""
    name, tensor = min(bench.model.state_dict().items(), key=lambda item: item[1].nbytes)
    bench.version += 1
    with ww.Publisher({name: tensor}, bench.engines) as one:
        one.publish(bench.version, partial=True)
    bench.first_token()
    server = psutil.Process().children()[-1]
    with Memory(trainer=psutil.Process(), worker=worker_of(server)) as memory:
        for _ in range(10):
            bench.publish()
    return memory.grown


def report(runs: dict[str, list[dict[str, float]]], grown: dict[str, int], nbytes: int) -> None:
    medians = {
        name: {phase: statistics.median(run[phase] for run in results) for phase in results[0]}
        for name, results in runs.items()
    }
    ours = medians["weightwire"]
    least = min(medians[name]["total"] for name in (TO_DISK, TO_MEMORY))
    rows = [[name, m["total"], m["pause"], m["first token"], ours["total"] / m["total"]] for name, m in medians.items()]
    phases = ", ".join(f"{k} {v:.3f}" for k, v in ours.items() if " " in k)
    text = "\n\n".join(
        [
            "# Dense updates on a CPU",
            f"Qwen3-shaped, {nbytes / 2e9:.2f} B parameters, {nbytes / 1e6:.0f} MB in bfloat16; median of"
            f" {len(runs['weightwire'])} rounds, seconds from weights in the trainer's memory to a token from the new"
            " weights. The plain server is vLLM's own command without weightwire; the last row is vLLM's reload on"
            " `weightwire serve`, whose malloc settings help it too.",
            table(["way", "total s", "pause s", "of it first token s", "weightwire's total / this"], rows),
            f"Phases of weightwire, in seconds: {phases}.",
            f"Bars: total at most 0.5 of the better of what one does today: {ours['total'] / least:.2f}."
            f" Pause at most 0.25 of its total: {ours['pause'] / least:.3f}.",
            f"Extra memory at the peak of an update: trainer {grown['trainer'] / 1e6:.0f} MB (two buckets are"
            f" {2 * BUCKET / 1e6:.0f} MB), worker {grown['worker'] / 1e6:.0f} MB (one staged copy is"
            f" {nbytes / 1e6:.0f} MB).",
        ]
    )
    data = {"nbytes": nbytes, "bucket_bytes": BUCKET, "medians": medians, "runs": runs, "grown": grown}
    write("dense_cpu", "python benchmarks/dense_cpu.py", text, data)


if __name__ == "__main__":
    main()
