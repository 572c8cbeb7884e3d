"""For scripts that kill: real servers started side by side, asked, and ended whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import psutil
import torch
from safetensors.torch import load_file

import weightwire as ww
from support.sessions import end

START_SECONDS = 240.0
ON_GPU = torch.cuda.is_available()


@dataclass(frozen=True, slots=True)
class Server:
    """One `weightwire serve` of its own process group."""

    url: str
    model: Path
    log: Path
    process: subprocess.Popen[bytes]

    def generate(self) -> Any:
        return generate(self.url, self.model)

    def worker(self) -> int:
        """The process id of its one worker. With one rank that is vLLM's engine core itself."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        titles = {child.pid: " ".join(child.cmdline()) for child in children}
        for name in ("VLLM::Worker", "VLLM::EngineCore"):
            if found := [pid for pid, title in titles.items() if name in title]:
                (pid,) = found
                return pid
        raise RuntimeError(f"no worker among {titles}")


@contextlib.contextmanager
def serving(model: Path, folder: Path, names: Sequence[str], *, gpu: str = "0") -> Iterator[list[Server]]:
    """Servers of one model, by name, all on one GPU (or the CPU). What they logged is shown if something goes wrong."""
    servers: list[Server] = []
    try:
        servers.extend(_start(model, folder, name, gpu) for name in names)
        for server in servers:
            _wait_until_up(server)
        yield servers
    except BaseException:
        for server in servers:
            print(f"--- {server.log}\n{server.log.read_text()[-3000:]}", file=sys.stderr)
        raise
    finally:
        for server in servers:
            end(server.process, seconds=20)


def url_of(folder: Path, name: str) -> str:
    """Of a server that is one of `serving`."""
    return f"unix:{folder}/{name}"


def _start(model: Path, folder: Path, name: str, gpu: str) -> Server:
    command = [
        sys.executable, "-m", "weightwire.cli.main", "serve", str(model), "--uds", f"{folder}/{name}",
        "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "8", "--dtype", "bfloat16",
    ]  # fmt: skip
    if ON_GPU:
        # A cache of fixed size: to find out how much would fit, vLLM must be alone on its GPU.
        command += ["--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(1 << 28)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    log = folder / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
    return Server(url_of(folder, name), model, log, process)


def _wait_until_up(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    with ww.connect(server.url) as engines:
        while True:
            try:
                engines[0].status(timeout=5)
                return
            except (ww.WeightwireError, OSError):
                if server.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the server did not start") from None
                time.sleep(0.5)


def kill(pid: int) -> None:
    """SIGKILL, and wait until it is gone, so that nothing it had queued goes on."""
    process = psutil.Process(pid)
    process.kill()
    deadline = time.monotonic() + 30
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{pid} outlives SIGKILL")
            time.sleep(0.01)


def generate(url: str, model: Path) -> Any:
    """What the model says, greedily."""
    return complete(url, model)["text"]


def complete(url: str, model: Path, **more: object) -> Any:
    """The completion itself; `more` is asked for beside it."""
    import httpx2 as httpx

    transport = httpx.HTTPTransport(uds=url.removeprefix("unix:"))
    with httpx.Client(transport=transport, timeout=60, trust_env=False) as client:
        body = {"model": str(model), "prompt": "hello", "max_tokens": 10, "temperature": 0, "ignore_eos": True}
        body |= more
        reply = client.post("http://localhost/v1/completions", json=body)
        reply.raise_for_status()
        return reply.json()["choices"][0]


def wait_until_idle(url: str, *, seconds: float) -> dict[str, Any]:
    """State and version once no update is held any more, or after so many seconds; and how long that took."""
    started = time.monotonic()
    with ww.connect(url) as engines:
        while (status := engines[0].status()).state != "idle" and time.monotonic() - started < seconds:
            time.sleep(0.1)
    return {"state": status.state, "version": status.version, "seconds": time.monotonic() - started}


def save_large(folder: Path) -> Path:
    """A checkpoint in bfloat16 with large matrices, so that an update is more than any queue on its way holds: 400 MB
    on a GPU."""
    width = 1 << 18 if ON_GPU else 1 << 13
    model = models.new_model("qwen3", tied=False, seed=99, intermediate_size=width)
    return models.save(model.to(torch.bfloat16), folder / "model")


def load(model: Path, device: str, seed: int) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, with other values."""
    tensors = {name: tensor.clone() for name, tensor in load_file(model / "model.safetensors", device=device).items()}
    renew(tensors, seed)
    return tensors


def renew(tensors: dict[str, torch.Tensor], seed: int) -> None:
    """Other values in the same memory."""
    for number, tensor in enumerate(tensors.values()):
        generator = torch.Generator(tensor.device).manual_seed(1000 * seed + number)
        if tensor.dim() > 1:
            tensor.normal_(0, 0.08, generator=generator)
        else:
            tensor.add_(torch.randn(tensor.shape, generator=generator, device=tensor.device) * 0.1)


class Trainer:
    """A script's own process, and no longer than four minutes. It says lines of JSON; what it has on stderr comes out
    on ours."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        # One that hangs is ended, and with it what waits for its next line.
        self._limit = _limit(self.process, 240.0)

    def go(self, word: object = "go") -> None:
        """A line that it waits for on its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def next(self) -> dict[str, Any]:
        """Its next line of JSON."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise RuntimeError(f"the trainer ended with {self.process.wait()} and has not said what it was to say")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self._limit.cancel()
        end(self.process, seconds=5)


def _limit(process: subprocess.Popen[Any], seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    return timer


def say(**facts: Any) -> None:
    """A line of JSON, for `Trainer.next`."""
    print(json.dumps(facts), flush=True)
