"""What a model says of tokens: reference logprobs, by Transformers in float32."""

from __future__ import annotations

import torch


@torch.no_grad()
def logprobs(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> list[float]:
    """Logprob of each of `tokens` after `prompt` and the tokens before it."""
    ids = torch.tensor([[*prompt, *tokens]])
    scores = torch.log_softmax(model(ids).logits[0].float(), dim=-1)
    first = len(prompt) - 1
    return [float(scores[first + i, token]) for i, token in enumerate(tokens)]


def apart(a: list[float], b: list[float]) -> float:
    """The largest difference between two lists of logprobs."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))
