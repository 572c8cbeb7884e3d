"""Run as a script on GPUs: an engine that is updated by deltas, one of which fails, beside one loaded with the result.

    python deltas_gpu.py FAMILY TENSOR_PARALLEL TRANSPORT BASELINE FOLDER

Prints one line of JSON: what each generated, the receipts, and how the failed commit ended.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from vllm import LLM

sys.path.insert(0, str(Path(__file__).parent))
import models
from exactness import generate

import weightwire as ww


def start(path: Path, tensor_parallel: int) -> LLM:
    return LLM(
        str(path), dtype="bfloat16", tensor_parallel_size=tensor_parallel, enforce_eager=True, max_model_len=128,
        max_num_seqs=8, seed=0, worker_extension_cls="faults.FaultyWorker", **models.ON_GPU_SIZE,
    )  # fmt: skip


def step(weights: dict[str, torch.Tensor], seed: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    for tensor in weights.values():
        hit = torch.rand(tensor.shape, generator=generator, device="cuda") < 0.01
        tensor[hit] *= 1.5


def main(family: str, tensor_parallel: str, transport: str, baseline: Any, folder: str) -> None:
    model = models.new_model(family, tied=False, seed=1)
    first = models.save(model, Path(folder) / "first")
    ranks = int(tensor_parallel)
    llm = start(first, ranks)
    weights = {name: tensor.to("cuda", torch.bfloat16) for name, tensor in model.state_dict().items()}
    results: dict[str, Any] = {"kinds": [], "proven": []}
    with ww.Publisher(weights, ww.connect(llm), transport=transport, baseline=baseline) as publisher:
        for version in (1, 2, 3):
            receipt = publisher.publish(version, deadline=300)
            results["kinds"].append(receipt.kind)
            results["proven"] += set(next(iter(receipt.engines.values())).proven.values())
            step(weights, version)
        results["before"] = generate(llm)
        llm.collective_rpc("fail_next_delta", args=(ranks - 1,))
        try:
            publisher.publish(4, kind="delta", deadline=300)
        except ww.EngineError as error:
            results["failed"] = str(error)
        results["undone"] = generate(llm)
        results["kinds"].append(publisher.publish(4, kind="delta", deadline=300).kind)
    results["published"] = generate(llm)
    llm.llm_engine.engine_core.shutdown()
    del llm
    model.load_state_dict({name: tensor.to("cpu", torch.float32) for name, tensor in weights.items()})
    fresh = start(models.save(model, Path(folder) / "last"), ranks)
    results["loaded"] = generate(fresh)
    fresh.llm_engine.engine_core.shutdown()
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
