"""Run as a script: two stock engines, one of which is updated to what the other was loaded with, and back.

    python exactness.py FAMILY TIED DTYPE TENSOR_PARALLEL LORA PARTS FOLDER

Prints one line of JSON: what each engine generated before and after, and the receipts. Where there is a GPU, all of it
happens there, with `TRANSPORT`, `STAGING` and `CUDA_GRAPHS` from the environment.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from vllm import LLM, SamplingParams

sys.path.insert(0, str(Path(__file__).parent))
import models

import weightwire as ww

ON_GPU = torch.cuda.is_available()
# "1" with torch.compile, as vLLM does it; "alone" without, which takes minutes less.
GRAPHS = os.environ.get("CUDA_GRAPHS", "0") if ON_GPU else "0"
ALONE = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}} if GRAPHS == "alone" else {}
PARTS = ["q_proj", "up_proj", "norm.weight", "h.0.self_attention.query_key_value", "h.1.attn.c_attn"]
PROMPTS = ["hello world", "abc", "the quick brown fox jumps over"]


def start(path: Path, dtype: str, tensor_parallel: int, lora: bool) -> LLM:
    return LLM(
        str(path),
        dtype=dtype,
        tensor_parallel_size=tensor_parallel,
        enable_lora=lora,
        enforce_eager=GRAPHS == "0",
        max_model_len=128,
        max_num_seqs=8,
        seed=0,
        **ALONE,
        # Of this process and of stock vLLM, whose plugin need not be installed on a borrowed machine.
        **({**models.ON_GPU_SIZE, "worker_extension_cls": ww.WORKER_EXTENSION} if ON_GPU else {}),
    )


def generate(llm: LLM) -> list[dict[str, Any]]:
    sampling = SamplingParams(temperature=0, max_tokens=10, logprobs=2, ignore_eos=True)
    # One after the other: which of several come into one step is a matter of time, and on a GPU the sums depend on it.
    outputs = [llm.generate([prompt], sampling, use_tqdm=False)[0] for prompt in PROMPTS]
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [{k: v.logprob for k, v in step.items()} for step in output.outputs[0].logprobs],
            "versions": [span.version for span in getattr(output.outputs[0], "weight_versions", None) or ()],
        }
        for output in outputs
    ]


def main(family: str, tied: str, dtype: str, tensor_parallel: str, lora: str, parts: str, folder: str) -> None:
    # On a GPU, vLLM 0.26 with LoRA takes no other width of a vocabulary than that of the model.
    how: Any = {"tied": tied == "tied"} | ({"vocab_size": 128} if ON_GPU and lora == "lora" else {})
    first, second = models.new_model(family, seed=1, **how), models.new_model(family, seed=2, **how)
    paths = [models.save(model, Path(folder) / name) for model, name in ((first, "first"), (second, "second"))]
    results: dict[str, Any] = {}
    llm = start(paths[0], dtype, int(tensor_parallel), lora == "lora")
    engines = ww.connect(llm)
    results["first loaded"] = generate(llm)
    results["second published"], results["receipt"] = published(llm, engines, second, 1)
    if parts == "parts":
        # A few tensors of the first model on top of the second, some of them parts of a fused parameter.
        part = {n: t for n, t in first.state_dict().items() if any(part in n for part in PARTS)}
        results["part published"], results["partial receipt"] = published(llm, engines, part, 2, partial=True)
        mixed = models.new_model(family, seed=2, **how)
        mixed.load_state_dict(part, strict=False)
        paths.append(models.save(mixed, Path(folder) / "mixed"))
    results["first published"], _ = published(llm, engines, first, 3)
    llm.llm_engine.engine_core.shutdown()
    del llm, engines
    for name, path in zip(("second loaded", "part loaded"), paths[1:], strict=False):
        fresh = start(path, dtype, int(tensor_parallel), lora == "lora")
        results[name] = generate(fresh)
        fresh.llm_engine.engine_core.shutdown()
        del fresh
    print("\n" + json.dumps(results))


def published(llm: LLM, engines: Any, source: Any, version: int, **how: Any) -> tuple[Any, Any]:
    if ON_GPU:
        # In the engine's dtype, so that an engine can take what is lent as it is.
        dtype = llm.model_config.dtype
        if isinstance(source, torch.nn.Module):
            source = copy.deepcopy(source).to("cuda", dtype)
        else:
            source = {name: tensor.to("cuda", dtype) for name, tensor in source.items()}
    with ww.Publisher(source, engines, transport=os.environ.get("TRANSPORT")) as publisher:
        staging: Any = os.environ.get("STAGING", "copy")
        receipt = publisher.publish(version, deadline=300, staging=staging, **how)
    engine = next(iter(receipt.engines.values()))
    facts = {"proven": engine.proven, "parameters": engine.parameters, "version": engine.version}
    facts |= {"computed": engine.computed, "pause": engine.pause}
    return generate(llm), {**facts, "transport": engine.transport}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
