"""The policy: a tiny random Qwen3 and a tokenizer of one token for each digit, made here. Nothing is downloaded."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
from transformers.utils import logging

from weightwire.demo.task import DIGITS

__all__ = ["RANK", "VOCABULARY", "adapted", "decode", "encode", "load", "make_policy", "round_into", "rounded", "save"]

VOCABULARY = ("<pad>", *DIGITS)
RANK = 16
"""Of the LoRA adapter."""


def make_policy(seed: int, width: int = 128) -> Any:
    """A Qwen3 of two layers, float32, which has learned nothing yet: 0.3 million parameters, 1.2 of width 256."""
    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        # How sure a policy can be is bounded by its last layer, which an adapter leaves as it is.
        initializer_range=0.06,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,  # a rollout ends by its length
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def adapted(policy: Any) -> Any:
    """The policy as a `peft.PeftModel`, of which a LoRA adapter on all linear layers is trained, and nothing else."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(policy, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))


def rounded(policy: Any) -> Any:
    """A copy in bfloat16: what is served where the float32 weights are the optimiser's own."""
    return copy.deepcopy(policy).bfloat16()


@torch.no_grad()
def round_into(served: Any, policy: Any) -> None:
    for held, trained in zip(served.parameters(), policy.parameters(), strict=True):
        held.copy_(trained)


def save(policy: Any, folder: Path) -> Path:
    """A checkpoint as any engine reads it, tokenizer included, or of an adapted policy its adapter; returns the
    folder."""
    logging.disable_progress_bar()
    policy.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(VOCABULARY)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)
    return folder


def load(folder: Path, adapter: Path | None = None) -> Any:
    """The model of a checkpoint, for inference; as PEFT loads it, if there is an adapter to it."""
    logging.disable_progress_bar()
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    if adapter is None:
        return policy
    from peft import PeftModel

    return PeftModel.from_pretrained(policy, adapter)


def encode(text: str) -> list[int]:
    """
    >>> encode("09")
    [1, 10]
    """
    return [VOCABULARY.index(character) for character in text]


def decode(ids: Iterable[int]) -> list[str]:
    """
    >>> decode([1, 10, 0])
    ['0', '9', '<pad>']
    """
    return [VOCABULARY[id] for id in ids]
