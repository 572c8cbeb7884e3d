"""The policy-gradient loop: sample from the engine, learn, publish; again."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import torch

from weightwire.demo import task
from weightwire.demo.model import decode, encode, round_into
from weightwire.demo.serving import Completion, Mode, Serving
from weightwire.publisher import Publisher

__all__ = ["Step", "train"]

_ROLLOUTS_PER_PROMPT = 8
# Adam moves every element by about as much; plain SGD most of them by less than what bfloat16 can tell apart.
_OPTIMIZERS: dict[Mode, Callable[..., torch.optim.Optimizer]] = {
    "dense": functools.partial(torch.optim.AdamW, lr=2e-3),
    "delta": functools.partial(torch.optim.SGD, lr=0.04),
    "adapter": functools.partial(torch.optim.AdamW, lr=5e-3),
}
_MAX_GRADIENT_NORM = 1.0
_PUBLISH_SECONDS = 120.0


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One step: rollouts of version `version - 1`, learned from, and `version` published.

    `reward` is the rollouts' mean. `mismatch` is the largest difference between the log-probabilities that the engine
    and the trainer give to the sampled tokens: it would jump if the engine served other weights than the trainer has.
    `kind` and `nbytes` are of the update.
    `seconds` are by phase: sample and learn, then the publisher's own. `pause` is how long generation stood still.
    """

    step: int
    version: int
    reward: float
    mismatch: float
    kind: str
    nbytes: int
    seconds: dict[str, float]
    pause: float


def train(
    policy: Any, served: Any, mode: Mode, serving: Serving, publisher: Publisher, *, steps: int
) -> Iterator[Step]:
    """Yields each step once its version is live. `served` is what is published: the policy, or its rounded copy."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = _OPTIMIZERS[mode](trained)
    for step in range(1, steps + 1):
        start = time.perf_counter()
        rollouts = serving.complete(task.PROMPTS, n=_ROLLOUTS_PER_PROMPT, length=task.LENGTH, temperature=1.0)
        sampled = time.perf_counter()

        rewards = torch.tensor([task.rewards(rollout.prompt, decode(rollout.tokens)) for rollout in rollouts])
        logprobs = token_logprobs(policy, rollouts)
        loss = policy_gradient_loss(logprobs, rewards)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, _MAX_GRADIENT_NORM)
        optimizer.step()
        if served is not policy:
            round_into(served, policy)
        learned = time.perf_counter()

        receipt = publisher.publish(version=step, deadline=_PUBLISH_SECONDS)
        yield Step(
            step=step,
            version=receipt.version,
            reward=rewards.mean().item(),
            mismatch=_mismatch(logprobs, rollouts),
            kind=receipt.kind,
            nbytes=receipt.nbytes,
            seconds={"sample": sampled - start, "learn": learned - sampled, **receipt.seconds},
            pause=receipt.pause,
        )


def token_logprobs(policy: Any, rollouts: Sequence[Completion]) -> torch.Tensor:
    """What the policy, as it is now, gives to each sampled token: rollouts x tokens. All rollouts have one length."""
    ids = torch.tensor([[*encode(rollout.prompt), *rollout.tokens] for rollout in rollouts])
    logprobs = policy(input_ids=ids[:, :-1]).logits.log_softmax(-1)
    sampled: torch.Tensor = logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return sampled[:, -len(rollouts[0].tokens) :]


def policy_gradient_loss(logprobs: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """REINFORCE with the batch's mean as baseline (Williams, 1992).

    Every token answers for its own reward alone: what comes after it can be right whatever it was.
    """
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    return -(advantages * logprobs).mean()


def _mismatch(logprobs: torch.Tensor, rollouts: Sequence[Completion]) -> float:
    served = torch.tensor([rollout.logprobs for rollout in rollouts])
    return (logprobs.detach() - served).abs().max().item()
