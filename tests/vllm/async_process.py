"""Run as a script: an `AsyncLLM` of this process, updated from a thread while it streams.

    python async_process.py FOLDER

Prints one line of JSON: the receipt, and what was generated before, meanwhile and after.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from vllm import SamplingParams

sys.path.insert(0, str(Path(__file__).parent))
import models
from reference import apart, logprobs

import weightwire as ww

PROMPT = [10, 20, 30, 40]


async def generate(engine: AsyncLLM, tokens: int, started: asyncio.Event | None = None) -> dict[str, Any]:
    sampling = SamplingParams(
        temperature=0, max_tokens=tokens, logprobs=0, ignore_eos=True, output_kind=RequestOutputKind.CUMULATIVE
    )
    last: Any = None
    async for output in engine.generate({"prompt_token_ids": PROMPT}, sampling, request_id=f"r{id(sampling)}"):
        last = output.outputs[0]
        if started is not None:
            started.set()
    said = [next(iter(step.values())).logprob for step in last.logprobs]
    return {"tokens": list(last.token_ids), "logprobs": said, "versions": [s.version for s in last.weight_versions]}


async def sleeping(engine: AsyncLLM, engines: Any) -> dict[str, Any]:
    """An update while it sleeps; then one between the two halves of waking up, which must not end its pause."""
    third = models.new_model("llama", tied=False, seed=3)
    with ww.Publisher(third, engines) as publisher:
        await engine.sleep(level=1)
        try:
            await asyncio.to_thread(publisher.publish, 3)
            refused = ""
        except ww.StateError as error:
            refused = str(error)
        await engine.wake_up(tags=["weights"])
        version = (await asyncio.to_thread(publisher.publish, 3)).version
        paused = await engine.is_paused()
        await engine.wake_up(tags=["kv_cache"])
    after = await generate(engine, 10)
    return {
        "refused": refused,
        "version": version,
        "paused": paused,
        "apart": apart(after["logprobs"], logprobs(third, PROMPT, after["tokens"])),
    }


async def main(folder: Path) -> None:
    first, second = (models.new_model("llama", tied=False, seed=seed) for seed in (1, 2))
    models.save(first, folder / "first")
    arguments = AsyncEngineArgs(str(folder / "first"), dtype="float32", enforce_eager=True, max_model_len=256)
    engine = AsyncLLM.from_engine_args(arguments)
    stops: list[str] = []
    results: dict[str, Any] = {"stops": stops}
    engines = ww.connect(engine)
    pause = engines[0]._control.host.pause

    async def noted(mode: Any, keep_cache: Any) -> None:
        stops.append(mode)
        await pause(mode, keep_cache)

    engines[0]._control.host.pause = noted
    try:
        with ww.Publisher(first, engines) as publisher:
            # What is compiled and found out once takes longer than the tokens that come meanwhile.
            await asyncio.to_thread(publisher.publish, 0)
        with ww.Publisher(second, engines) as publisher:
            try:
                publisher.publish(1)
            except ww.UsageError as error:
                results["on the loop"] = str(error)
            started = asyncio.Event()
            streaming = asyncio.create_task(generate(engine, 200, started))
            await started.wait()
            receipt = await asyncio.to_thread(publisher.publish, 1)
            results["meanwhile"] = (await streaming)["versions"]
            after = await generate(engine, 10)
            await asyncio.to_thread(publisher.publish, 2, pause="wait")
        results["apart"] = apart(after["logprobs"], logprobs(second, PROMPT, after["tokens"]))
        results["after"] = after["versions"]
        results["receipt"] = str(receipt)
        results["sleep"] = await sleeping(engine, engines)
    finally:
        engine.shutdown()
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
