"""What of vLLM this package leans on that is not public, in one place, and what this vLLM can do."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["PRIVATE", "missing_names", "rename_mapper", "supports"]

PRIVATE: dict[str, tuple[str, ...]] = {
    # module -> attributes, dotted where they are on a class
    "vllm.v1.worker.worker_base": ("WorkerBase.get_model",),
    "vllm.v1.executor.multiproc_executor": ("MultiprocExecutor.collective_rpc", "WorkerProc._execute_worker_rpc"),
    "vllm.distributed.device_communicators.shm_broadcast": ("MessageQueue.dequeue", "SpinCondition.wait"),
    "vllm.v1.worker.gpu_worker": ("Worker.execute_model", "Worker.sleep", "Worker.wake_up"),
    "vllm.device_allocator.cumem": ("CuMemAllocator",),
    "vllm.distributed.parallel_state": ("get_world_group",),
    "vllm.distributed.device_communicators.pynccl_wrapper": (
        "NCCLLibrary.ncclAllReduce",
        "NCCLLibrary.ncclBroadcast",
        "NCCLLibrary.ncclCommAbort",
        "NCCLLibrary.ncclCommInitRank",
        "ncclDataTypeEnum.from_torch",
        "ncclUniqueId",
    ),
    "vllm.model_executor.model_loader.utils": ("initialize_model",),
    "vllm.utils.torch_utils": ("set_default_torch_dtype",),
    "vllm.model_executor.layers.linear": ("UnquantizedLinearMethod.process_weights_after_loading",),
    "vllm.model_executor.layers.vocab_parallel_embedding": (
        "UnquantizedEmbeddingMethod.process_weights_after_loading",
    ),
    "vllm.model_executor.layers.attention": ("Attention",),
    "vllm.v1.engine.core_client": ("AsyncMPClient.call_utility_async", "AsyncMPClient.pause_scheduler_async"),
    "vllm.v1.engine": ("EngineCoreRequestType.WAKEUP",),
    "vllm.v1.engine.core": (
        "EngineCore.collective_rpc",
        "EngineCore.pause_scheduler",
        "EngineCore.resume_scheduler",
        "EngineCoreProc._notify_idle_state_callbacks",
    ),
    "vllm.v1.core.block_pool": ("BlockPool.get_num_free_blocks",),
    "vllm.v1.core.kv_cache_manager": ("KVCacheManager.reset_prefix_cache",),
    "vllm.v1.engine.async_llm": (
        "AsyncLLM.collective_rpc",
        "AsyncLLM.pause_generation",
        "AsyncLLM.resume_generation",
        "AsyncLLM.errored",
    ),
    "vllm.v1.engine.output_processor": ("OutputProcessor.get_num_unfinished_requests",),
    "vllm.v1.engine.llm_engine": ("LLMEngine.add_request", "LLMEngine.collective_rpc", "LLMEngine.reset_prefix_cache"),
    "vllm.lora.worker_manager": (
        "WorkerLoRAManager._load_adapter",
        "LRUCacheWorkerLoRAManager.add_adapter",
        "LRUCacheWorkerLoRAManager.remove_adapter",
        "LRUCacheWorkerLoRAManager.list_adapters",
    ),
    "vllm.lora.lora_model": ("LoRAModel.from_lora_tensors",),
    "vllm.lora.lora_weights": ("LoRALayerWeights.optimize",),
    "vllm.lora.peft_helper": ("PEFTHelper.from_dict", "PEFTHelper.validate_legal"),
    "vllm.lora.utils": ("parse_fine_tuned_lora_name",),
    "vllm.lora.request": ("LoRARequest",),
    "vllm.lora.layers": (
        "BaseLayerWithLoRA.set_lora",
        "MergedColumnParallelLinearWithLoRA.set_lora",
        "ReplicatedLinearWithLoRA.set_lora",
        "ColumnParallelLinearWithLoRA.slice_lora_a",
        "ColumnParallelLinearWithLoRA.slice_lora_b",
    ),
    "vllm.entrypoints.openai.models.serving": ("OpenAIServingModels.show_available_models",),
    "vllm.plugins.endpoint_plugins.interface": ("EndpointPlugin",),
}
"""Every private name used, by module. `missing_names` must find them all in every vLLM supported."""


def missing_names() -> list[str]:
    """The names of `PRIVATE` that this vLLM does not have."""
    missing = []
    for module_name, names in PRIVATE.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            missing.append(module_name)
            continue
        missing += [f"{module_name}.{name}" for name in names if _find(module, name) is None]
    return missing


def supports(owner: Any, name: str) -> bool:
    """Whether an object of this vLLM has a method that others lack (`update_weight_version` came after 0.26)."""
    return callable(getattr(owner, name, None))


def rename_mapper(model: Any) -> Any:
    """How a checkpoint's names are mapped to this model's, without what fuses modules; None when they are the same."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return None
    return mapper.get_rename_mapper() if supports(mapper, "get_rename_mapper") else mapper.get_unstacked_mapper()


def _find(owner: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        owner = getattr(owner, part, None)
    return owner
