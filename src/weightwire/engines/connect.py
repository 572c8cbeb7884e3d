"""`connect`: from what a user has to engines a publisher can drive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, overload

from weightwire.engines.base import Engine, EngineStatus
from weightwire.errors import UsageError

__all__ = ["Engines", "connect"]


class Engines(Sequence[Engine]):
    """The engines that get every update together."""

    def __init__(self, engines: Iterable[Engine]) -> None:
        self._engines = tuple(engines)
        names = [engine.name for engine in self._engines]
        if len(set(names)) != len(names):
            raise UsageError(f"the same engine twice: {', '.join(names)}")

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
    """Engines from a URL, an `LLM`, an `AsyncLLM`, a Transformers model, an `Engine`, or a list of any of these.

    `token` is the one the server printed the file of, `api_key` what vLLM's own `--api-key` wants; both are for URLs.
    A URL is `http://host:port`, `https://...`, or `unix:/path/to/socket`.
    """
    if isinstance(engine, Engines):
        return engine
    if isinstance(engine, (list, tuple)):
        return Engines(each for item in engine for each in connect(item, token=token, api_key=api_key))
    return Engines([_one(engine, token, api_key)])


def _one(engine: Any, token: str | None, api_key: str | None) -> Engine:
    if isinstance(engine, str):
        from weightwire.engines.http import HttpEngine

        return HttpEngine(engine, token=token, api_key=api_key)
    if hasattr(engine, "begin") and hasattr(engine, "commit"):
        return engine  # type: ignore[no-any-return]
    families = {cls.__module__.partition(".")[0] for cls in type(engine).__mro__}
    if "vllm" in families:
        from weightwire.engines.vllm.local import VllmEngine

        return VllmEngine(engine)
    if "transformers" in families and hasattr(engine, "generate"):
        from weightwire.engines.transformers import TransformersEngine

        return TransformersEngine(engine)
    raise UsageError(
        f"cannot connect to a {type(engine).__module__}.{type(engine).__qualname__}",
        next_step="Pass a URL, an LLM, an AsyncLLM, a Transformers model, or a list of these; any other module as"
        " weightwire.TransformersEngine(module).",
    )
