"""`connect`: the engines that a trainer updates, and the adapters that they serve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self, overload

from weightwire.adapters import Adapters
from weightwire.engines.base import Engine, EngineStatus
from weightwire.engines.find import find

__all__ = ["Engines", "connect"]


class Engines(Sequence[Engine]):
    """The engines that get every update together."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = tuple(engines)

    @property
    def adapters(self) -> Adapters:
        """The LoRA adapters that they serve: load from memory, list, unload."""
        return Adapters(self._engines)

    def status(self, *, timeout: float = 30.0) -> dict[str, EngineStatus]:
        """Each engine's state, by name."""
        return {engine.name: engine.status(timeout=timeout) for engine in self._engines}

    def close(self) -> None:
        for engine in self._engines:
            engine.close()

    @overload
    def __getitem__(self, index: int) -> Engine: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Engine]: ...
    def __getitem__(self, index: int | slice) -> Engine | Sequence[Engine]:
        return self._engines[index]

    def __len__(self) -> int:
        return len(self._engines)

    def __iter__(self) -> Iterator[Engine]:
        return iter(self._engines)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def connect(engine: Any, *, token: str | None = None, api_key: str | None = None) -> Engines:
    """Engines from a URL, an `LLM`, an `AsyncLLM`, a Ray actor that has one, a Transformers model, an `Engine`, or a
    list of any of these.

    `token` is the one the server printed the file of, `api_key` what vLLM's own `--api-key` wants; both are for URLs.
    A URL is `http://host:port`, `https://...`, or `unix:/path/to/socket`.
    """
    return engine if isinstance(engine, Engines) else Engines(find(engine, token=token, api_key=api_key))
