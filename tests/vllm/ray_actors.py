"""Run as a script: two engines in Ray actors, one of them a subclass of `LLM` and one with an `AsyncLLM` in it.

    python ray_actors.py FOLDER

Prints one line of JSON: what the engines said and generated at each step, and what was left behind at the end.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from peft import LoraConfig, get_peft_model
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from vllm import LLM, SamplingParams

sys.path.insert(0, str(Path(__file__).parent))
import models
from reference import apart, logprobs

import weightwire as ww
from weightwire.sources.tensors import ModuleSource

PROMPT = [10, 20, 30, 40]
MARK = uuid.uuid4().hex
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 4,
    "enable_lora": True,
    "max_lora_rank": 8,
    "max_loras": 2,
    "worker_extension_cls": "faults.FaultyWorker",
}


def _said(output: Any) -> dict[str, Any]:
    last = output.outputs[0]
    return {
        "tokens": list(last.token_ids),
        "logprobs": [next(iter(step.values())).logprob for step in last.logprobs],
        "versions": [span.version for span in last.weight_versions or ()],
    }


def _sampling(tokens: int) -> SamplingParams:
    return SamplingParams(
        temperature=0, max_tokens=tokens, logprobs=0, ignore_eos=True, output_kind=RequestOutputKind.CUMULATIVE
    )


class Whole(LLM):
    """As in vLLM's own examples: the actor is an LLM."""

    def ask(self, tokens: int = 10, adapter: str | None = None) -> dict[str, Any]:
        lora = None if adapter is None else ww.vllm.lora_request(self, adapter)
        prompt = {"prompt_token_ids": PROMPT}
        return _said(self.generate(prompt, _sampling(tokens), use_tqdm=False, lora_request=lora)[0])


class Streaming:
    """As frameworks have it: the engine is an attribute, and many requests are in flight."""

    def __init__(self, path: str) -> None:
        self.tokens = 0
        self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(path, **SETTINGS))

    async def ask(self, tokens: int = 10, adapter: str | None = None) -> dict[str, Any]:
        lora = None if adapter is None else ww.vllm.lora_request(self.engine, adapter)
        request = self.engine.generate(
            {"prompt_token_ids": PROMPT}, _sampling(tokens), request_id=uuid.uuid4().hex, lora_request=lora
        )
        async for output in request:
            last = output
            self.tokens += 1
        return _said(last)

    async def generated(self) -> int:
        return self.tokens


class Nothing:
    def ready(self) -> bool:
        return True


class Killing(ModuleSource):
    """Kills an actor while its weights are being read."""

    def __init__(self, model: torch.nn.Module, actor: Any) -> None:
        super().__init__(model)
        self._actor = actor

    def read(self, tensor: int, start: int, out: torch.Tensor) -> Any:
        if tensor == 9:
            ray.kill(self._actor)
        return super().read(tensor, start, out)


def get(reference: Any, seconds: float = 120.0) -> Any:
    return ray.get(reference, timeout=seconds)


def main(folder: Path, results: dict[str, Any], of_the_killed: set[Path]) -> None:
    first, second, third = (models.new_model("qwen3", tied=True, seed=seed) for seed in (1, 2, 3))
    path = str(models.save(first, folder / "first"))
    whole = ray.remote(Whole).options(name="whole").remote(path, **SETTINGS)
    streaming = ray.remote(Streaming).remote(path)
    actors = {"whole": whole, "streaming": streaming}
    engines = ww.connect(list(actors.values()))
    results["names"] = [engine.name for engine in engines]

    def compare(step: str, model: Any, adapter: str | None = None) -> None:
        said = {name: get(actor.ask.remote(10, adapter)) for name, actor in actors.items()}
        for name, output in said.items():
            output["apart"] = apart(output["logprobs"], logprobs(model, PROMPT, output["tokens"]))
            output["greedy"] = greedy(model, 10)
            results[f"{step}: {name}"] = output

    compare("first", first)
    with ww.Publisher(second, engines, deadline=120) as publisher:
        results["transports"] = [choice.name for choice in publisher.explain().engines.values()]
        publisher.publish(1)
        compare("second", second)
    with ww.Publisher(third, engines, deadline=120) as publisher:
        # The asynchronous one goes on generating, and ends under the new weights.
        before = get(streaming.generated.remote())
        running = streaming.ask.remote(200)
        while get(streaming.generated.remote()) < before + 5:
            time.sleep(0.01)
        publisher.publish(2)
        results["meanwhile"] = get(running)["versions"]
        compare("third", third)

    policy = get_peft_model(third, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "o_proj", "down_proj"]))
    models.shake_adapter(policy, seed=4)
    state = {name: tensor for name, tensor in policy.state_dict().items() if ".lora_" in name}
    results["adapter"] = engines.adapters.load("policy", state, policy.peft_config["default"]).version
    results["listed"] = engines.adapters.list()
    compare("adapter", policy, "policy")
    policy.unload()

    get(whole.collective_rpc.remote("fail_next_commit", args=(0,)))
    with ww.Publisher(first, engines, deadline=120) as publisher:
        try:
            publisher.publish(3)
        except ww.PublishError as error:
            results["outcomes"] = {name: str(outcome) for name, outcome in error.outcomes.items()}
        try:
            get(whole.ask.remote())
        except ww.PoisonedError as error:
            results["refused"] = str(error)
        publisher.publish(4)
    compare("healed", first)

    of_the_killed |= mapped()
    began = time.monotonic()
    with ww.Publisher(Killing(second, streaming), engines, bucket_bytes=65536, deadline=60) as publisher:
        try:
            publisher.publish(5)
        except ww.WeightwireError as error:
            results["killed"] = [type(error).__name__, str(error), error.engine, time.monotonic() - began]
    results["survivor"] = engines[0].status().version
    del actors["streaming"]
    compare("survivor", first)
    get(whole.__ray_call__.remote(lambda llm: llm.llm_engine.engine_core.shutdown()))
    nothing = ray.remote(Nothing).remote()
    for name, actor in (("dead", streaming), ("empty", nothing)):
        try:
            ww.connect(actor)
        except ww.WeightwireError as error:
            results[name] = [type(error).__name__, str(error)]
    engines.close()


@torch.no_grad()
def greedy(model: Any, tokens: int) -> list[int]:
    ids = torch.tensor([PROMPT])
    for _ in range(tokens):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(PROMPT) :].tolist()


def left_over(before: set[str], seconds: float = 30.0) -> list[str]:
    """Processes that came of this one, and shared memory of theirs, once they had time to go."""
    deadline = time.monotonic() + seconds
    while True:
        found = [str(process) for process in offspring()] + sorted(shared() - before)
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def offspring() -> list[psutil.Process]:
    """By what they have inherited, since some change their parent."""
    return [process for process in psutil.process_iter() if process.pid != os.getpid() and _has_mark(process)]


def _has_mark(process: psutil.Process) -> bool:
    try:
        return process.environ().get("RAY_ACTORS_TEST") == MARK
    except psutil.Error:
        return False


def shared() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(("weightwire", "plasma"))}


def mapped() -> set[Path]:
    """Shared memory in use by what came of this process."""
    lines = [line for each in offspring() for line in Path(f"/proc/{each.pid}/maps").read_text().splitlines()]
    return {Path(line.split(maxsplit=5)[5]) for line in lines if " /dev/shm/" in line}


if __name__ == "__main__":
    torch.set_num_threads(1)
    before = shared()
    # Neither a token in the home folder nor a report to its makers, and engines as fast as anybody else.
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    os.environ["RAY_ACTORS_TEST"] = MARK
    results: dict[str, Any] = {}
    of_the_killed: set[Path] = set()
    # Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as temporary:
        ray.init(
            num_cpus=2, object_store_memory=80 << 20, include_dashboard=False, log_to_driver=False, _temp_dir=temporary
        )
        try:
            main(Path(sys.argv[1]), results, of_the_killed)
        finally:
            ray.shutdown()
        results["left over"] = left_over(before)
        for path in of_the_killed:
            path.unlink(missing_ok=True)  # vLLM's queues: an engine that is killed does not remove them
    print("\n" + json.dumps(results))
