"""Run as a script: an engine, and trainers that speak OpenRLHF's worker interface to it.

    python openrlhf_process.py FOLDER CUSTOM

CUSTOM as for `openrlhf_trainer.py`. With `gloo` the engine has two ranks on a CPU, else one on GPU 0, and with NCCL the
trainer has GPU 1. Prints one line of JSON: what each scenario came to.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from vllm import LLM, SamplingParams

sys.path.insert(0, str(Path(__file__).parent))
import models
from reference import apart, logprobs

import weightwire as ww
from weightwire.updates.manifest import Manifest, TensorSpec

PROMPT = [10, 20, 30, 40]
CUSTOM = sys.argv[2]
WORKERS = 2 if CUSTOM == "gloo" else 1


class Trainer:
    """A trainer's process, and the engine's answers to its calls."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        command = [sys.executable, str(Path(__file__).parent / "openrlhf_trainer.py"), str(WORKERS), CUSTOM]
        gpu = {"CUDA_VISIBLE_DEVICES": "1"} if CUSTOM in ("nccl", "stateless") else {}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **gpu}
        )

    def do(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Have it done. An error of a call that the trainer did not live to hear of is `lost`."""
        self._say({"do": what, **arguments})
        answer: dict[str, Any] = {}
        began = time.monotonic()
        while line := self.process.stdout.readline():
            said = json.loads(line)
            if "done" in said:
                return {**said["done"], "seconds": time.monotonic() - began}
            answer = self.call(said["call"], said["args"])
            try:
                self._say(answer)
            except BrokenPipeError:
                break
        return {"lost": answer.get("error"), "seconds": time.monotonic() - began}

    def call(self, method: str, args: list[Any]) -> dict[str, Any]:
        try:
            if method == "reset_prefix_cache":
                self.llm.reset_prefix_cache()
            elif method.startswith("update_weight"):
                # As Ray hands them on: torch's own dtype and shape, and what `reduce_tensor` gave.
                name, dtype, shape, *more = args
                if method == "update_weight_cuda_ipc":
                    more[0] = {uuid: _handle(plain) for uuid, plain in more[0].items()}
                dtype = getattr(torch, dtype.removeprefix("torch."))
                self.llm.collective_rpc(method, args=(name, dtype, torch.Size(shape), *more))
            else:
                self.llm.collective_rpc(method, args=tuple(args))
        except Exception as error:
            return {"error": str(error)}
        return {}

    def _say(self, line: Any) -> None:
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.wait(30)


def _handle(plain: list[Any]) -> Any:
    values = [bytes.fromhex(value) if place in (7, 11, 13) else value for place, value in enumerate(plain)]
    values[0], values[4] = torch.Tensor, torch.storage.TypedStorage
    values[1], values[2] = torch.Size(values[1]), tuple(values[2])
    values[5] = getattr(torch, plain[5].removeprefix("torch."))
    return rebuild_cuda_tensor, tuple(values)


class Engine:
    def __init__(self, llm: Any, engines: Any) -> None:
        self.llm, self.engines = llm, engines

    def says(self, seed: int) -> dict[str, Any]:
        """What it generates, how far that is from the model of this seed, and what it says that it serves."""
        sampling = SamplingParams(temperature=0, max_tokens=10, logprobs=0, ignore_eos=True)
        output = self.llm.generate({"prompt_token_ids": PROMPT}, sampling, use_tqdm=False)[0].outputs[0]
        said = [next(iter(step.values())).logprob for step in output.logprobs]
        reference = models.new_model("qwen3", tied=True, seed=seed)
        another = models.new_model("qwen3", tied=True, seed=seed + 1)
        status = self.engines[0].status()
        greedy = reference.generate(torch.tensor([PROMPT]), max_new_tokens=10, do_sample=False, eos_token_id=None)
        return {
            "apart": apart(said, logprobs(reference, PROMPT, list(output.token_ids))),
            "apart from another": apart(said, logprobs(another, PROMPT, list(output.token_ids))),
            "same tokens": list(output.token_ids) == greedy[0, len(PROMPT) :].tolist(),
            "version": status.version,
            "state": status.state,
            "transport": status.receipt and status.receipt.transport,
            "ranks": status.receipt and status.receipt.ranks,
            "proven": status.receipt and sorted(set(status.receipt.proven.values())),
        }


def main(folder: Path) -> None:
    models.save(models.new_model("qwen3", tied=True, seed=1), folder / "served")
    on_gpu = {} if CUSTOM == "gloo" else {**models.ON_GPU_SIZE, "enable_sleep_mode": True}
    llm = LLM(
        str(folder / "served"), dtype="float32", enforce_eager=True, max_model_len=256, tensor_parallel_size=WORKERS,
        worker_extension_cls="faults.FaultyWorker", **on_gpu,
    )  # fmt: skip
    engine = Engine(llm, ww.connect(llm))
    results: dict[str, Any] = {"at first": engine.says(1)}

    def note(name: str, came: Any, seed: int) -> None:
        results[name] = {"came": came, **engine.says(seed)}
        print(name, results[name], file=sys.stderr, flush=True)

    trainer = Trainer(llm)
    try:
        trainer.do("init")
        note("whole loop", trainer.do("loop", seed=2), 2)
        note("three arguments", trainer.do("loop", seed=3, three_arguments=True), 3)
        # Number 1 is sharded, and vLLM's loader takes each rank's slice out of a tensor that is too large.
        for change, at in (("name", 5), ("shape", 5), ("slice", 1), ("kind", 5), ("nan", 5), ("last", 5)):
            note(f"wrong {change}", trainer.do("loop", seed=4, change=change, at=at), 3)
        note("after all that", trainer.do("loop", seed=4), 4)
        with ww.Publisher(models.new_model("qwen3", tied=True, seed=5), engine.engines) as publisher:
            note("published", publisher.publish(20).version, 5)
        note("after a publish", trainer.do("loop", seed=6), 6)
        note("busy", held_by_another(trainer, engine), 6)
        note("asleep", asleep(trainer, engine), 6)
        note("asleep before its commit", asleep_before_commit(engine), 5)
        note("awake", trainer.do("loop", seed=7), 7)
        if CUSTOM != "gloo":
            note("woken from the deeper sleep", deeper_sleep(trainer, engine), 8)
        now = 7 if CUSTOM == "gloo" else 8
        note("died", trainer.do("loop", seed=11, change="die", at=5), now)
        trainer.end()
        trainer = Trainer(llm)
        note("joined no group", trainer.call("update_weight", ["model.norm.weight", "torch.float32", [128]]), now)
        if CUSTOM == "gloo":
            shared = ["model.norm.weight", "torch.float32", [128], {}]
            note("shared memory", trainer.call("update_weight_cuda_ipc", shared), 7)
        trainer.do("init")
        note("another trainer", trainer.do("loop", seed=12), 12)
        note("joined again", [trainer.do("init"), trainer.do("loop", seed=9)], 9)
        llm.collective_rpc("fail_next_commit", args=(WORKERS - 1,))
        results["poisoned"] = {"came": trainer.do("loop", seed=10), "state": engine.engines[0].status().state}
        try:
            engine.says(10)
        except Exception as error:
            results["poisoned"]["generating"] = repr(error)
    finally:
        trainer.end()
        os.write(1, ("\n" + json.dumps(results) + "\n").encode())


def held_by_another(trainer: Trainer, engine: Engine) -> Any:
    named = dict(models.new_model("qwen3", tied=True, seed=5).named_parameters())
    begun = engine.engines[0].begin(whole(named, 30), holder="somebody", lease=600, timeout=60)
    came = trainer.do("loop", seed=7)
    engine.engines[0].abort(begun.id, timeout=60)
    return came


def asleep(trainer: Trainer, engine: Engine) -> Any:
    engine.llm.sleep(level=1)
    came = [trainer.do("loop", seed=7)]
    try:
        with ww.Publisher(models.new_model("qwen3", tied=True, seed=5), engine.engines) as publisher:
            publisher.publish(40)
    except ww.WeightwireError as error:
        came.append({"error": f"{type(error).__name__}: {error}"})
    engine.llm.wake_up()
    return came


def asleep_before_commit(engine: Engine) -> Any:
    """It falls asleep with everything staged and sealed."""
    # Not above: a worker imports this file too, and see `engines.vllm.worker` for what numba does to it.
    from weightwire.updates.buckets import cut
    from weightwire.updates.digest import scan

    named = dict(models.new_model("qwen3", tied=True, seed=5).named_parameters())
    target, manifest = engine.engines[0], whole(named, 40)
    id = target.begin(manifest, holder="somebody", lease=600, timeout=60).id
    sent = [parameter.detach().reshape(-1) for parameter in named.values()]
    for bucket in cut(manifest):
        data = torch.zeros(bucket.nbytes, dtype=torch.uint8)
        for piece in bucket.pieces:
            run = sent[piece.tensor][piece.start : piece.start + piece.count].view(torch.uint8)
            data[piece.offset : piece.offset + run.numel()] = run
        target.put(id, bucket.index, memoryview(data.numpy()), timeout=60)
    target.seal(id, [scan(tensor).digest.hex() for tensor in sent], timeout=60)
    engine.llm.sleep(level=1)
    came = []
    try:
        target.commit(id, pause="keep", keep_cache=False, timeout=60)
    except ww.WeightwireError as error:
        came.append({"error": f"{type(error).__name__}: {error}", "state": target.status().state})
    engine.llm.wake_up()
    came.append(target.commit(id, pause="keep", keep_cache=False, timeout=60).version)
    return came


def deeper_sleep(trainer: Trainer, engine: Engine) -> Any:
    engine.llm.sleep(level=2)
    engine.llm.wake_up(tags=["weights"])
    lost = engine.engines[0].status().poisoned
    came = trainer.do("loop", seed=8)
    engine.llm.wake_up(tags=["kv_cache"])
    return [lost, came]


def whole(named: dict[str, torch.Tensor], version: int) -> Manifest:
    specs = [TensorSpec(name=name, dtype="float32", shape=tuple(p.shape)) for name, p in named.items()]
    return Manifest(version=version, tensors=tuple(specs))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
