"""Run as a script: one engine, whose adapters from memory are compared with the same adapters from files.

    python adapters.py FAMILY DTYPE TENSOR_PARALLEL STEPS FOLDER

STEPS: names of the functions below, joined by commas. Prints one line of JSON: what each step found.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model
from vllm.lora.request import LoRARequest

from vllm import LLM, SamplingParams

sys.path.insert(0, str(Path(__file__).parent))
import models

import weightwire as ww

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
PROMPTS = ["hello world", "the quick brown fox"]
LONG_PROMPT = "a prompt that is shared by all and longer than a few blocks of the cache"
VARIANTS: dict[str, dict[str, Any]] = {
    "r1": {"r": 1, "lora_alpha": 1, "target_modules": ATTENTION + MLP},
    "r8 alpha 24": {"r": 8, "lora_alpha": 24, "target_modules": ATTENTION + MLP},
    "r16": {"r": 16, "lora_alpha": 16, "target_modules": ATTENTION + MLP},
    "rslora": {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": ATTENTION + MLP},
    "attention": {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION},
    "mlp": {"r": 8, "lora_alpha": 16, "target_modules": MLP},
    "q and down": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {
        "r": 8,
        "lora_alpha": 16,
        "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {"layers.0.mlp.up_proj": 5},
        "target_modules": ATTENTION + MLP,
    },
}


class Bench:
    """The engine, the base model that it serves, and ways to ask both."""

    def __init__(self, family: str, dtype: str, tensor_parallel: int, folder: Path) -> None:
        self.folder = folder
        self.base = self.new_base(family, seed=1)
        self.files = 0
        self.llm = LLM(
            str(models.save(self.base, folder / "base")),
            dtype=dtype,
            tensor_parallel_size=tensor_parallel,
            enable_lora=True,
            max_lora_rank=16,
            max_loras=2,
            max_cpu_loras=4,
            enforce_eager=True,
            block_size=32,
            max_model_len=128,
            max_num_seqs=8,
            seed=0,
            worker_extension_cls="faults.FaultyWorker",
            **(models.ON_GPU_SIZE if DEVICE == "cuda" else {}),
        )
        self.engines = ww.connect(self.llm)
        self.dtype = getattr(torch, dtype)

    def new_base(self, family: str, seed: int) -> Any:
        # On a GPU, vLLM 0.26 takes no other width of a vocabulary than that of the model.
        return models.new_model(family, tied=True, seed=seed, vocab_size=128)

    def peft(self, seed: int, **config: Any) -> Any:
        """A PEFT model with an adapter of random weights."""
        model = get_peft_model(self.new_base(self.base.config.model_type, seed=1), LoraConfig(**config))
        models.shake_adapter(model, seed)
        return model.to(DEVICE, self.dtype)

    def publish(self, model: Any, version: int, **how: Any) -> Any:
        with ww.Publisher(model, self.engines, **how) as publisher:
            return publisher.publish(version)

    def generate(self, name: str | LoRARequest | None, prompts: list[str] = PROMPTS) -> list[Any]:
        """Tokens and logprobs under an adapter; of ours by name, of a file by vLLM's request."""
        sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=2, ignore_eos=True)
        request = ww.vllm.lora_request(self.llm, name) if isinstance(name, str) else name
        outputs = self.llm.generate(prompts, sampling, lora_request=request, use_tqdm=False)
        self.cached = sum(o.num_cached_tokens for o in outputs)
        return [
            [list(o.outputs[0].token_ids), [{str(k): v.logprob for k, v in s.items()} for s in o.outputs[0].logprobs]]
            for o in outputs
        ]

    def from_file(self, model: Any, prompts: list[str] = PROMPTS) -> list[Any]:
        """The same by way of a folder, as vLLM has it."""
        self.files += 1
        path = self.folder / f"adapter{self.files}"
        model.save_pretrained(path)
        return self.generate(LoRARequest(f"file{self.files}", self.files, str(path)), prompts)

    def rpc(self, method: str, *args: Any) -> list[Any]:
        return self.llm.collective_rpc(method, args=args)


def variants(bench: Bench) -> dict[str, Any]:
    """Each kind of adapter, against its twin."""
    found: dict[str, Any] = {"base": bench.generate(None)}
    for number, (name, config) in enumerate(VARIANTS.items()):
        model = bench.peft(seed=number, **config)
        try:
            receipt = bench.publish(model, 100 + number, adapter="kinds")
        except ww.UnsupportedError as error:  # 0.26 knows no patterns
            found[name] = {"refused": str(error)}
            continue
        mine = next(iter(receipt.engines.values()))
        found[name] = {
            "ours": bench.generate("kinds"),
            "twin": bench.from_file(model),
            "proven": mine.proven,
            "held": mine.held,
            "adapter": mine.adapter,
        }
    found["base again"] = bench.generate(None)
    return found


def traps(bench: Bench) -> dict[str, Any]:
    """One load a revision; no prefix of an old revision; eviction; a dense update of the base."""
    adapters = {version: bench.peft(seed=version, **VARIANTS["r8 alpha 24"]) for version in (7, 8, 9)}
    found: dict[str, Any] = {}
    long = [LONG_PROMPT]
    for version in (7, 8):
        bench.publish(adapters[version], version)
        first, cached = bench.generate("policy", long), bench.cached
        again, cached_again = bench.generate("policy", long), bench.cached
        twin = bench.from_file(adapters[version], long)
        found[f"long {version}"] = {"ours": [first, again], "twin": twin, "cached": [cached, cached_again]}
    for _ in range(5):
        bench.generate("policy")
    found["loads"] = bench.rpc("adapter_loads", "policy@8")
    bench.publish(adapters[9], 9)
    pinned = {version: bench.generate(f"policy@{version}") for version in adapters}
    for number in range(6):  # more than `max_cpu_loras`, so that all of ours are evicted
        bench.from_file(bench.peft(seed=50 + number, **VARIANTS["r1"]))
    found["evicted"] = [bench.generate(f"policy@{version}") == pinned[version] for version in adapters]
    found["loads after eviction"] = bench.rpc("adapter_loads", "policy@8")
    base = bench.new_base(bench.base.config.model_type, seed=2).to(bench.dtype)
    with ww.Publisher(base, bench.engines) as publisher:
        publisher.publish(1)
    found["under the new base"] = [
        [bench.generate(f"policy@{version}"), bench.from_file(model), pinned[version]]
        for version, model in adapters.items()
    ]
    with ww.Publisher(bench.base, bench.engines) as publisher:
        publisher.publish(2)
    found["under the old base"] = [bench.generate(f"policy@{version}") == pinned[version] for version in adapters]
    return found


def hundred(bench: Bench) -> dict[str, Any]:
    """A hundred versions in a row, each against its twin, and the memory of all processes."""
    model = bench.peft(seed=0, **VARIANTS["r16"])
    processes = [psutil.Process(), *(psutil.Process(pid) for pid in bench.rpc("process_id"))]
    unequal: list[int] = []
    memory: dict[int, list[int]] = {}
    for version in range(1000, 1100):
        models.shake_adapter(model, version)
        bench.publish(model, version, adapter="many")
        if bench.generate("many") != bench.from_file(model):
            unequal.append(version)
        if version in (1010, 1099):
            gc.collect()
            memory[version] = [process.memory_info().rss for process in processes]
    held = bench.rpc("adapters_held")
    return {"unequal": unequal, "memory": memory, "held": held, "listed": list(bench.engines.adapters.list().values())}


def step(model: Any, seed: int) -> None:
    """As an optimiser might: one element in a hundred of the adapter changes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                chosen = torch.rand(parameter.shape, generator=generator) < 0.01
                parameter[chosen.to(parameter.device)] *= -1.5


def deltas(bench: Bench) -> dict[str, Any]:
    """Several deltas in a row from a float32 adapter, each against its twin; one rank that fails in one; another base;
    and a revision that came as a delta, loaded again after its eviction."""
    model = bench.peft(seed=0, **VARIANTS["r16"]).float()
    found: dict[str, Any] = {"steps": []}
    how = {"adapter": "steps", "transport": "shm"}  # over cuda-ipc nothing travels
    last = len(bench.rpc("process_id")) - 1

    def published(publisher: ww.Publisher, version: int) -> dict[str, Any]:
        receipt = publisher.publish(version)
        said = {"why": receipt.why, "nbytes": receipt.nbytes}
        return {**said, "ours": bench.generate("steps"), "twin": bench.from_file(model)}

    with ww.Publisher(model, bench.engines, baseline="host", **how) as publisher:
        for version in (1, 2, 3, 4):
            found["steps"].append(published(publisher, version))
            step(model, version)
        before = found["steps"][-1]["ours"]
        for at in ("write", "seal", "check", "commit"):
            bench.rpc("fail_next_adapter", last, at)
            try:
                publisher.publish(5)
                error = None
            except ww.WeightwireError as failed:
                error = str(failed)
            found[at] = {"error": error, "same": bench.generate("steps") == before}
        found["after"] = published(publisher, 6)
        other = bench.peft(seed=1, **VARIANTS["r16"])
        for version in (7, 8, 9, 10):
            bench.publish(other, version, **how)
        step(model, 11)
        try:
            publisher.publish(11, kind="delta")
        except ww.VersionError as refused:
            found["refused"] = str(refused)
        found["other base"] = published(publisher, 11)
        step(model, 12)
        found["then"] = published(publisher, 12)
    pinned = bench.generate("steps@12")
    for number in range(6):
        bench.from_file(bench.peft(seed=50 + number, **VARIANTS["r1"]))
    found["evicted"] = bench.generate("steps@12") == pinned
    return found


def failures(bench: Bench) -> dict[str, Any]:
    """One rank fails at each step, with another engine beside it: all of them stay where they were."""
    import copy

    other = ww.TransformersEngine(copy.deepcopy(bench.base).to(bench.dtype), name="other")
    both = ww.connect([bench.engines[0], other])
    ours = bench.engines[0].name
    old, new = (bench.peft(seed=seed, **VARIANTS["r8 alpha 24"]) for seed in (70, 71))
    found: dict[str, Any] = {}
    with ww.Publisher(old, both, adapter="pair") as publisher:
        publisher.publish(7)
    before = bench.generate("pair")
    last = len(bench.rpc("process_id")) - 1
    arrives = "lend" if DEVICE == "cuda" else "write_bucket"
    for at, step in (("arrival", arrives), ("seal", "seal"), ("check", "check"), ("commit", "commit")):
        bench.rpc("fail_next_adapter", last, step)
        with ww.Publisher(new, both, adapter="pair") as publisher:
            try:
                publisher.publish(8)
                error = None
            except ww.WeightwireError as failed:
                error = str(failed)
        versions = {
            name: [each["version"] for each in listed if each["name"] == "pair"]
            for name, listed in both.adapters.list().items()
        }
        found[at] = {"error": error, "same": bench.generate("pair") == before}
        found[at] |= {"here": versions[ours], "other": versions["other"]}
    with ww.Publisher(new, both, adapter="pair") as publisher:
        publisher.publish(9)
    found["after"] = [bench.generate("pair") != before, bench.generate("pair") == bench.from_file(new)]
    found["held"] = bench.rpc("adapters_held")
    return found


def refusals(bench: Bench) -> dict[str, Any]:
    """What does not fit is refused before anything changes."""
    config = VARIANTS["r8 alpha 24"]
    good = {n: t for n, t in bench.peft(seed=80, **config).state_dict().items() if ".lora_" in n}
    bench.engines.adapters.load("careful", good, config, 7)
    before = bench.generate("careful")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    wide = {n: t.repeat(4, 1) if ".lora_A." in n else t.repeat(1, 4) for n, t in good.items()}
    cases: dict[str, tuple[Any, Any]] = {
        "rank": (wide, {**config, "r": 32}),
        "module": ({n.replace("layers.1", "layers.9"): t for n, t in good.items()}, config),
        "A without B": ({n: t for n, t in good.items() if n != name.replace("lora_A", "lora_B")}, config),
        "shapes": ({**good, name: torch.zeros(8, 64)}, config),
        "NaN": ({**good, name: torch.full_like(good[name], float("nan"))}, config),
        "contradiction": (good, {**config, "r": 4}),
        "DoRA": (good, {**config, "use_dora": True}),
        "no modules": ({}, config),
    }
    found: dict[str, Any] = {}
    for case, (tensors, said) in cases.items():
        try:
            bench.engines.adapters.load("careful", tensors, said, 8)
            found[case] = "taken"
        except ww.WeightwireError as error:
            found[case] = f"{type(error).__name__}: {error}"
    found["same"] = bench.generate("careful") == before
    found["listed"] = list(bench.engines.adapters.list().values())
    return found


STEPS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    step.__name__: step for step in (variants, traps, hundred, deltas, failures, refusals)
}


def main(family: str, dtype: str, tensor_parallel: str, steps: str, folder: str) -> None:
    bench = Bench(family, dtype, int(tensor_parallel), Path(folder))
    results = {step: STEPS[step](bench) for step in steps.split(",")}
    bench.llm.llm_engine.engine_core.shutdown()
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
