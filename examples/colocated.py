"""Reinforcement learning with trainer and vLLM on one GPU: the engine sleeps while the trainer learns.

    python examples/colocated.py                # a tiny model made here learns to count; nothing is downloaded
    python examples/colocated.py --device cpu   # the same where nothing can be put to sleep

A step: sample, put the engine to sleep, learn, wake up its weights, publish, wake up the rest. The trainer lends the
engine its own parameters (`cuda-ipc`), so that no further copy of them exists while the new ones go live.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import weightwire as ww
from vllm import LLM, SamplingParams
from weightwire.demo import task

ROLLOUTS = 8  # of each prompt


def start_engine(checkpoint: Path, device: str) -> Any:
    on_gpu = {"enable_sleep_mode": True, "gpu_memory_utilization": 0.3, "dtype": "bfloat16"}
    return LLM(
        str(checkpoint),
        max_model_len=64,
        enforce_eager=device == "cpu",
        worker_extension_cls=ww.WORKER_EXTENSION,
        **(on_gpu if device == "cuda" else {"dtype": "float32"}),
    )


def sample(llm: Any) -> list[tuple[str, list[int]]]:
    """Each prompt with a continuation that the engine drew, as tokens."""
    from weightwire.demo.model import encode

    sampling = SamplingParams(n=ROLLOUTS, temperature=1.0, max_tokens=task.LENGTH, ignore_eos=True)
    prompts = [{"prompt_token_ids": encode(prompt)} for prompt in task.PROMPTS]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return [
        (prompt, list(one.token_ids))
        for prompt, output in zip(task.PROMPTS, outputs, strict=True)
        for one in output.outputs
    ]


def learn(policy: Any, optimizer: torch.optim.Optimizer, rollouts: list[tuple[str, list[int]]]) -> float:
    """One step of REINFORCE; gives the mean reward of the rollouts."""
    from weightwire.demo.model import decode, encode
    from weightwire.demo.train import policy_gradient_loss

    rewards = torch.tensor([task.rewards(prompt, decode(tokens)) for prompt, tokens in rollouts], device=policy.device)
    ids = torch.tensor([[*encode(prompt), *tokens] for prompt, tokens in rollouts], device=policy.device)
    logprobs = policy(input_ids=ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    loss = policy_gradient_loss(logprobs[:, -task.LENGTH :], rewards)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    return float(rewards.mean())


def main(device: str, steps: int, level: int) -> None:
    # Imported where they are used: vLLM's workers import this file as well, and need none of it.
    from weightwire.demo.model import make_policy, save

    policy = make_policy(seed=1)
    with tempfile.TemporaryDirectory() as folder:
        llm = start_engine(save(policy, Path(folder)), device)
    policy = policy.to(device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3)
    with ww.connect(llm) as engines, ww.Publisher(policy, engines) as publisher:
        for version in range(1, steps + 1):
            began = time.perf_counter()
            rollouts = sample(llm)
            llm.sleep(level=level)
            reward = learn(policy, optimizer, rollouts)
            # The weights first: an update needs them awake, and nothing else.
            llm.wake_up(tags=["weights"])
            receipt = publisher.publish(version)
            llm.wake_up(tags=["kv_cache"])
            took = time.perf_counter() - began
            print(f"reward {reward:.3f}, a step of {took:.2f} s, {receipt}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--level", type=int, choices=(1, 2), default=1, help="2: the engine's weights are not kept")
    arguments = parser.parse_args()
    main(arguments.device, arguments.steps, arguments.level)
