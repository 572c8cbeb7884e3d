"""Tiny random models of several families, with a character tokenizer, made locally."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB = ["<pad>", "<eos>", "<unk>", *string.printable]
_COMMON = {
    "vocab_size": len(VOCAB),
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
_EXTRA = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "gemma": {"architectures": ["GemmaForCausalLM"]},
    # The queries, key and value of each group of heads lie together, and vLLM's loader makes one matrix out of them in
    # which all queries come first: that is computed, not copied slice by slice.
    "falcon": {
        "architectures": ["FalconForCausalLM"],
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "bias": True,
        "head_dim": None,
    },
    # ... which here are all matrices of all layers, turned around.
    "gpt2": {"architectures": ["GPT2LMHeadModel"], "num_key_value_heads": 4, "n_inner": 256, "n_positions": 512},
    "bloom": {"architectures": ["BloomForCausalLM"], "num_key_value_heads": 4},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}


# A cache of fixed size: to find out how much would fit, vLLM must be alone on its GPU.
ON_GPU_SIZE = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30}


def new_model(family: str, *, tied: bool, seed: int, vocab_size: int = len(VOCAB), **sizes: int) -> PreTrainedModel:
    """A float32 model with random weights, large enough that outputs depend on all of them."""
    torch.manual_seed(seed)
    facts = {**_COMMON, **_EXTRA[family], **sizes, "vocab_size": vocab_size}
    facts = {name: fact for name, fact in facts.items() if fact is not None}
    config = AutoConfig.for_model(family, **facts, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.08) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
            assert name
    return model.eval()


def shake_adapter(model: PreTrainedModel, seed: int) -> None:
    """Random weights for the adapter of a PEFT model."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)


def save(model: PreTrainedModel, path: Path) -> Path:
    """A checkpoint folder that vLLM can load."""
    model.save_pretrained(path)
    save_tokenizer(path)
    return path


def save_tokenizer(path: Path) -> None:
    vocab = {token: number for number, token in enumerate(VOCAB)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
