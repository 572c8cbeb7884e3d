"""Real vLLM servers on the CPU, shared by the tests of this folder: starting one takes most of a minute."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from support.scripts import last_json
from support.sessions import end, left_over
from weightwire.demo.server import free_port

sys.path.insert(0, str(Path(__file__).parent))

# Scripts for processes of their own: importing them in search of docstring examples would start vLLM and Ray here.
collect_ignore_glob = ["[!t]*.py"]

_START_SECONDS = 600
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in Path(item.path).parents:
            item.add_marker(pytest.mark.vllm)


@pytest.fixture(scope="session", autouse=True)
def no_segments_left() -> Iterator[None]:
    """vLLM's own, and Python's, of engines that were killed before one of their processes could remove them."""
    before = {*Path("/dev/shm").iterdir()}
    yield
    for prefix in ("vllm_dist_", "psm_", "sem.mp-"):
        for segment in left_over(prefix) - before:
            segment.unlink(missing_ok=True)


@dataclass
class Server:
    """One `weightwire serve`, and a way to ask it."""

    url: str
    token: str | None
    process: subprocess.Popen[bytes]
    log: Path
    api_key: str | None = None
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx.Limits(max_connections=None)
        socket_path = self.url.removeprefix("unix:") if self.url.startswith("unix:") else None
        self.client = httpx.Client(
            base_url="http://localhost" if socket_path else self.url,
            headers=headers,
            timeout=180,
            transport=httpx.HTTPTransport(uds=socket_path, limits=limits),
            trust_env=False,
        )

    def engines(self) -> Any:
        import weightwire as ww

        return ww.connect(self.url, token=self.token, api_key=self.api_key)

    def version(self) -> int | None:
        with self.engines() as engines:
            return engines[0].status().version

    def generate(self, prompt: list[int], *, tokens: int = 10, temperature: float = 0.0) -> dict[str, Any]:
        """Output token ids, their logprobs and their weight versions, from vLLM's token-in-token-out route."""
        sampling = {"temperature": temperature, "max_tokens": tokens, "logprobs": 0, "ignore_eos": True}
        reply = self.client.post("/inference/v1/generate", json={"token_ids": prompt, "sampling_params": sampling})
        assert reply.status_code == 200, reply.text
        choice = reply.json()["choices"][0]
        return {
            "tokens": choice["token_ids"],
            "logprobs": [step["logprob"] for step in choice["logprobs"]["content"]],
            "versions": [(s["version"], s["start"], s["end"]) for s in choice["weight_versions"]],
        }

    def worker_rpc(self, method: str, *args: Any) -> list[Any]:
        """A method of the workers' test extension, by vLLM's own development route."""
        reply = self.client.post("/collective_rpc", json={"method": method, "args": list(args)})
        assert reply.status_code == 200, reply.text
        return list(reply.json()["results"])


@contextlib.contextmanager
def serving(
    model: Path, folder: Path, *flags: str, api_key: str | None = None, uds: Path | None = None, **environment: str
) -> Iterator[Server]:
    """`weightwire serve MODEL`, ready; ended with everything it started, also when the test fails."""
    port = free_port()
    log, token = folder / f"server-{port}.log", folder / f"token-{port}"
    where = ["--uds", str(uds)] if uds else ["--token-file", str(token), "--host", "127.0.0.1", "--port", str(port)]
    command = [
        sys.executable, "-m", "weightwire.cli.main", "serve", str(model), *where,
        "--enforce-eager", "--max-model-len", "256", "--enable-scale-out", *flags,
    ]  # fmt: skip
    env = {**os.environ, **ENVIRONMENT, **environment}
    if api_key:
        command += ["--api-key", api_key]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        url = f"unix:{uds}" if uds else f"http://127.0.0.1:{port}"
        server = Server(url, None, process, log, api_key)
        _wait_ready(server)
        if not uds:
            assert token.stat().st_mode & 0o777 == 0o600
            server.token = token.read_text().strip()
        yield server
        server.client.close()
    finally:
        end(process)


def run_script(name: str, *arguments: object, folder: Path, seconds: float) -> dict[str, Any]:
    """What a script of this folder printed last that is JSON; every process it started ends with it."""
    command = [sys.executable, str(Path(__file__).parent / name), *map(str, arguments)]
    output, errors = folder / f"{name}.out", folder / f"{name}.err"
    with output.open("wb") as out, errors.open("wb") as err:
        process = subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT}, stdout=out, stderr=err, start_new_session=True
        )
    try:
        assert process.wait(seconds) == 0, errors.read_text()[-4000:]
    except subprocess.TimeoutExpired:
        pytest.fail(f"{name} did not end in {seconds} s: {errors.read_text()[-4000:]}")
    finally:
        end(process)
    return last_json(output.read_text())


def _wait_ready(server: Server) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if server.client.get("/health", timeout=5).status_code == 200:
                return
        assert server.process.poll() is None, server.log.read_text()[-4000:]
        assert time.monotonic() < deadline, server.log.read_text()[-4000:]
        time.sleep(0.5)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="session")
def served_model(folder: Path) -> Any:
    """The model that every shared server starts with: Qwen3-shaped, tied, float32."""
    import models

    model = models.new_model("qwen3", tied=True, seed=1)
    models.save(model, folder / "model")
    return model


@pytest.fixture(scope="session")
def server(served_model: Any, folder: Path) -> Iterator[Server]:
    """The server that most tests share. Nothing may kill or poison it."""
    with serving(folder / "model", folder, "--dtype", "float32") as running:
        yield running


@pytest.fixture
def trained(served_model: Any) -> Any:
    """A copy of the served model with other weights, as a trainer would have it."""
    import copy

    import torch

    model = copy.deepcopy(served_model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model
