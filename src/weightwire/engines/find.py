"""`find`: from what a user has to the engines that are meant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weightwire.engines.base import Engine
from weightwire.errors import UsageError

__all__ = ["find"]


def find(engine: Any, *, token: str | None = None, api_key: str | None = None) -> tuple[Engine, ...]:
    """The engines behind a URL, an `LLM`, an `AsyncLLM`, a Ray actor that has one, a Transformers model, an `Engine`,
    or a sequence of these.

    Raises `UsageError` for anything else, and when one engine is named twice.
    """
    if isinstance(engine, Sequence) and not isinstance(engine, str):
        engines = tuple(each for item in engine for each in find(item, token=token, api_key=api_key))
    else:
        engines = (_one(engine, token, api_key),)
    names = [each.name for each in engines]
    if len(set(names)) != len(names):
        raise UsageError(f"the same engine twice: {', '.join(names)}")
    return engines


def _one(engine: Any, token: str | None, api_key: str | None) -> Engine:
    if isinstance(engine, str):
        from weightwire.engines.http import HttpEngine

        return HttpEngine(engine, token=token, api_key=api_key)
    families = {cls.__module__.partition(".")[0] for cls in type(engine).__mro__}
    if "ray" in families:
        from weightwire.engines.vllm.ray import RayEngine

        return RayEngine(engine)
    if hasattr(engine, "begin") and hasattr(engine, "commit"):
        return engine  # type: ignore[no-any-return]
    if "vllm" in families:
        from weightwire.engines.vllm.local import VllmEngine

        return VllmEngine(engine)
    if "transformers" in families and hasattr(engine, "generate"):
        from weightwire.engines.transformers import TransformersEngine

        return TransformersEngine(engine)
    raise UsageError(
        f"cannot connect to a {type(engine).__module__}.{type(engine).__qualname__}",
        next_step="Pass a URL, an LLM, an AsyncLLM, a Ray actor, a Transformers model, or a list of these; any other"
        " module as weightwire.TransformersEngine(module).",
    )
