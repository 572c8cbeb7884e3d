"""The policy behind an OpenAI API: `weightwire serve`, which takes updates, and vLLM's own server, which does not."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2 as httpx

from weightwire.connection import Engines, connect
from weightwire.demo.model import RANK, encode
from weightwire.demo.server import Server, free_port
from weightwire.demo.serving import Completion, Mode, Weights
from weightwire.demo.task import PROMPTS
from weightwire.errors import DeadlineError, EngineError, EngineLost

__all__ = ["ServedPolicy", "StockPolicy"]

_ANSWER_SECONDS = 60.0
_FLAGS = [
    "--host=127.0.0.1",
    "--enforce-eager",
    "--max-model-len=64",
    "--max-num-seqs=128",
    "--kv-cache-memory-bytes=67108864",
    "--generation-config=vllm",
    "--disable-uvicorn-access-log",
]
# An adapter is served as a model of its own, and beside it what it adapts.
_CHECKPOINT_NAMES: dict[Mode, str] = {"dense": "policy", "delta": "policy", "adapter": "base"}
_MODE_FLAGS: dict[Mode, list[str]] = {
    "dense": ["--dtype=float32"],
    "delta": ["--dtype=bfloat16"],
    "adapter": ["--dtype=float32", "--enable-lora", f"--max-lora-rank={RANK}"],
}


class _Completions:
    """A server of completions. Token ids in, token ids and log-probabilities out: nothing depends on how text is
    split."""

    def __init__(self, mode: Mode, command: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> None:
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        self._checkpoint_name = _CHECKPOINT_NAMES[mode]
        names = f"--served-model-name={self._checkpoint_name}"
        command = [*command, "--port", str(port), names, *_FLAGS, *_MODE_FLAGS[mode]]
        self._server = Server(command, self._url, log=log, environment=environment)
        self._client = httpx.Client(base_url=self._url, timeout=_ANSWER_SECONDS, trust_env=False)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._client)
            stack.enter_context(self._server)
            self._running = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._running.__exit__(kind, error, tb)

    def wait_until_ready(self) -> None:
        self._server.wait_until_ready()
        # The first answer takes seconds: what an engine makes on demand belongs to its start.
        self._complete(self._checkpoint_name, PROMPTS[:1], n=1, length=1, temperature=0.0)

    def complete(self, prompts: Sequence[str], *, n: int, length: int, temperature: float) -> list[Completion]:
        return self._complete("policy", prompts, n=n, length=length, temperature=temperature)

    def _complete(
        self, model: str, prompts: Sequence[str], *, n: int, length: int, temperature: float
    ) -> list[Completion]:
        answer = self._post(
            {
                "model": model,
                "prompt": [encode(prompt) for prompt in prompts],
                "n": n,
                "max_tokens": length,
                "temperature": temperature,
                "ignore_eos": True,
                "logprobs": 0,
                "return_token_ids": True,
            }
        )
        # The n completions of the first prompt come first, then those of the second.
        asked = [prompt for prompt in prompts for _ in range(n)]
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return [
            Completion(
                model=answer["model"],
                prompt=prompt,
                tokens=tuple(choice["token_ids"]),
                logprobs=tuple(choice["logprobs"]["token_logprobs"]),
            )
            for prompt, choice in zip(asked, choices, strict=True)
        ]

    def _post(self, body: dict[str, Any]) -> Any:
        where: dict[str, Any] = {"engine": self._url, "phase": "complete"}
        where["next_step"] = "The end of the server's log says why."
        try:
            response = self._client.post("/v1/completions", json=body)
        except httpx.TimeoutException as error:
            raise DeadlineError(f"no completion within {_ANSWER_SECONDS:.0f} s", **where) from error
        except httpx.TransportError as error:
            raise EngineLost(f"no connection: {error or type(error).__name__}", **where) from error
        if not response.is_success:
            raise EngineError(f"HTTP {response.status_code}: {response.text[:300]}", **where)
        return response.json()


class ServedPolicy(_Completions):
    """`weightwire serve` on a checkpoint."""

    def __init__(self, mode: Mode, checkpoint: Path, folder: Path) -> None:
        self._token_file = folder / "token"
        command = [sys.executable, "-m", "weightwire.cli.main", "serve", "--token-file", str(self._token_file)]
        super().__init__(mode, [*command, str(checkpoint)], log=folder / "served.log", environment={})

    def engines(self) -> Engines:
        return connect(self._url, token=self._token_file.read_text().strip())


class StockPolicy(_Completions):
    """vLLM's own server on a checkpoint, with no plugin loaded: nothing of weightwire is in that process.

    Not by `vllm serve`, which wants a distribution of the name vllm; that of the CPU build has another.
    """

    def __init__(self, mode: Mode, weights: Weights, folder: Path) -> None:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(weights.checkpoint)]
        if weights.adapter is not None:
            command += ["--lora-modules", f"policy={weights.adapter}"]
        log = folder / f"fresh-{(weights.adapter or weights.checkpoint).name}.log"
        super().__init__(mode, command, log=log, environment={"VLLM_PLUGINS": ""})
