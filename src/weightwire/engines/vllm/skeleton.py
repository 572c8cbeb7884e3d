"""A twin of the live model without any data.

vLLM's own loaders know where each tensor of a checkpoint goes: which fused parameter, which slice of it on this rank.
They are asked on a twin built on the meta device, so that asking costs milliseconds, needs no memory, and can fail in
any way without the live model noticing. The twin also still has what the live model may have lost: parameters that a
CPU kernel packed away, and names that LoRA wrappers changed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from weightwire.errors import UnsupportedError

__all__ = ["build"]


def build(vllm_config: Any) -> torch.nn.Module:
    """The model of `vllm_config`, as this rank would load it, on the meta device. Raises `UnsupportedError` when it
    cannot be built there."""
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    # Attention layers enter themselves into the configuration they are built from; this one has its own list.
    config = copy.copy(vllm_config)
    config.compilation_config = copy.copy(config.compilation_config)
    config.compilation_config.static_forward_context = {}
    try:
        with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"):
            return initialize_model(config, model_config=config.model_config)  # type: ignore[no-any-return]
    except RuntimeError as error:
        if "meta tensor" not in str(error):
            raise
        raise UnsupportedError(
            f"{', '.join(config.model_config.architectures)} reads values of its own while it is built: {error}",
            next_step="This architecture cannot be updated exactly yet.",
        ) from error
