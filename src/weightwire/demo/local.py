"""The policy as a second model in this process, for machines without vLLM."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

import torch

from weightwire.connection import Engines, connect
from weightwire.demo.model import encode, load
from weightwire.demo.serving import Completion, Mode, Weights
from weightwire.engines.transformers import TransformersEngine

__all__ = ["LocalPolicy"]


class LocalPolicy:
    """A copy of the checkpoint's model, which generates with Transformers' own `generate`."""

    def __init__(self, mode: Mode, weights: Weights) -> None:
        self._model = load(weights.checkpoint, weights.adapter)
        self._mode = mode
        self._answering: Callable[[], AbstractContextManager[str]] = lambda: contextlib.nullcontext("policy")

    def wait_until_ready(self) -> None:
        pass

    def engines(self) -> Engines:
        engine = TransformersEngine(self._model)
        if self._mode == "adapter":
            self._answering = lambda: engine.adapter("policy")
        return connect(engine)

    def complete(self, prompts: Sequence[str], *, n: int, length: int, temperature: float) -> list[Completion]:
        asked = [prompt for prompt in prompts for _ in range(n)]
        ids = torch.tensor([encode(prompt) for prompt in asked])
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        with self._answering() as model:
            output = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=length,
                output_logits=True,
                return_dict_in_generate=True,
                **sampling,
            )
        tokens = output.sequences[:, ids.shape[1] :]
        logprobs = torch.stack(output.logits, dim=1).log_softmax(-1).gather(-1, tokens[:, :, None]).squeeze(-1)
        return [
            Completion(model=model, prompt=prompt, tokens=tuple(drawn), logprobs=tuple(given))
            for prompt, drawn, given in zip(asked, tokens.tolist(), logprobs.tolist(), strict=True)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass
