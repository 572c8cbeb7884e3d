"""LoRA adapters given as tensors, to any number of engines at once: what vLLM's issue 4068 asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from weightwire.engines.base import Engine
from weightwire.errors import WeightwireError
from weightwire.publisher import Publisher
from weightwire.sources.peft import AdapterSource
from weightwire.updates.receipt import Receipt

__all__ = ["Adapters"]


class Adapters:
    """The adapters that `engines` serve."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = engines

    def load(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        config: Any,
        version: int | None = None,
        *,
        transport: str | None = None,
        deadline: float = 600.0,
    ) -> Receipt:
        """Serve an adapter as `name`, on all engines or on none. `version` None: one more than any of them has.

        `tensors`: under PEFT's names (`base_model.model.<module>.lora_A.weight`, (r, in); `lora_B`, (out, r)).
        `config`: a `peft.LoraConfig`, a dict, or the text of an `adapter_config.json`. Requests for the model `name`
        get the newest version, `name@version` pins one. Raises a `WeightwireError`; the version before serves on.
        """
        source = AdapterSource(tensors, config)
        with Publisher(source, self._engines, adapter=name, transport=transport, deadline=deadline) as publisher:
            return publisher.publish(self.next_version(name) if version is None else version)

    def list(self, *, timeout: float = 30.0) -> dict[str, list[dict[str, Any]]]:
        """For each engine by name: its adapters' `name`, newest `version`, and the `versions` that can be pinned."""
        return {engine.name: engine.status(timeout=timeout).adapters for engine in self._engines}

    def unload(self, name: str, *, timeout: float = 30.0) -> None:
        """Serve it no more; requests in flight finish. Raises `AdapterNotFound` when an engine has none."""
        errors = []
        for engine in self._engines:
            try:
                engine.unload(name, timeout=timeout)
            except WeightwireError as error:
                errors.append(error.at(engine=engine.name, phase="unload"))
        if errors:
            raise errors[0]

    def next_version(self, name: str) -> int:
        """One more than this adapter ever had on any of the engines; 1 for a new one."""
        return max((engine.status().next_version(name) for engine in self._engines), default=1)
