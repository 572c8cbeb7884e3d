"""Run as a script: of two engines, the worker of one is killed in the middle of an update.

    python killed_worker.py FOLDER TRANSPORT

TRANSPORT is "nccl" (the trainer on GPU 0, both engines on GPU 1), "cuda-ipc" (all on GPU 0) or, without a GPU, "gloo".
NCCL takes no two ranks of one GPU, so there each engine has a publisher of its own; else one publisher has both. The
trainer is one process, which has to survive. Prints one line of JSON.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import servers
import torch
from servers import ON_GPU, Trainer, load, renew, save_large, say, serving, url_of

import weightwire as ww
from weightwire.engines.http import HttpEngine
from weightwire.transports import gloo, nccl

DEADLINE = 60.0
HOW: dict[str, Any] = {"bucket_bytes": 8 << 20 if ON_GPU else 1 << 18, "lease": DEADLINE, "deadline": DEADLINE}
MIDDLE = 4  # the bucket before which the worker is killed


def main(folder: str, transport: str) -> None:
    model = save_large(Path(folder))
    gpu = "1" if transport == "nccl" else "0"
    urls = [url_of(Path(folder), name) for name in ("victim", "beside")]
    with (
        # It imports what it needs while the servers do, and then waits.
        contextlib.closing(Trainer(__file__, transport, *urls, model)) as process,
        serving(model, Path(folder), ["victim", "beside"], gpu=gpu) as (victim, _),
    ):
        process.go(victim.worker())
        results = process.next()
        results["exit"] = process.process.wait(60)
    print("\n" + json.dumps(results))


def trainer(transport: str, victim: str, beside: str, model: str) -> None:
    worker = int(sys.stdin.readline())
    faulthandler.dump_traceback_later(100)  # of one that hangs, where
    weights = load(Path(model), "cuda:0" if ON_GPU else "cpu", seed=1)
    results: dict[str, Any] = {"deadline": DEADLINE}
    together = transport != "nccl"

    def publisher(*urls: str) -> ww.Publisher:
        return ww.Publisher(weights, opened.enter_context(ww.connect([*urls])), transport=transport, **HOW)

    with contextlib.ExitStack() as opened:
        doomed = opened.enter_context(publisher(victim, beside) if together else publisher(victim))
        doomed.publish(1)
        others = None if together else opened.enter_context(publisher(beside))
        if others is not None:
            others.publish(1)
        before = servers.generate(beside, Path(model))
        renew(weights, 2)
        started = time.monotonic()
        with killing(worker, victim, transport):
            results["lost"] = error_of(lambda: doomed.publish(2))
        results["seconds"] = time.monotonic() - started
        results["victim"] = error_of(lambda: ww.connect(victim)[0].status(timeout=10))
        results["old"] = {**state_of(beside), "same text": servers.generate(beside, Path(model)) == before}
        doomed.close()
        results["after"] = []
        if others is not None:
            # Its group was made before, and is another than that which was aborted.
            results["after"].append(facts(others.publish(2), beside))
        fresh = opened.enter_context(publisher(beside))
        results["after"].append(facts(fresh.publish(3), beside))
        results["new"] = {**state_of(beside), "same text": servers.generate(beside, Path(model)) == before}
        if ON_GPU:
            # Nothing of what was sent in vain is still running here.
            torch.cuda.synchronize()
    say(**results)


@contextlib.contextmanager
def killing(worker: int, victim: str, transport: str) -> Iterator[None]:
    """While it lasts, the worker is killed once it has some of an update, and before it could have sealed it."""
    with contextlib.ExitStack() as undo:
        if transport == "cuda-ipc":
            # It has opened the memory, or is about to.
            seal = HttpEngine.seal

            def kill_and_seal(engine: HttpEngine, *args: Any, **kwargs: Any) -> None:
                if engine.name == victim:
                    servers.kill(worker)
                seal(engine, *args, **kwargs)

            HttpEngine.seal = kill_and_seal  # type: ignore[method-assign]
            undo.callback(setattr, HttpEngine, "seal", seal)
        else:
            # Over NCCL buckets of weights that are whole are not filled: they are sent from where these are.
            sender, step = {"nccl": (nccl._Sender, "_broadcast"), "gloo": (gloo._Sender, "buffer")}[transport]
            go_on, steps = getattr(sender, step), itertools.count()

            def kill_and_go_on(this: Any, given: Any) -> Any:
                if next(steps) == MIDDLE:
                    servers.kill(worker)
                return go_on(this, given)

            setattr(sender, step, kill_and_go_on)
            undo.callback(setattr, sender, step, go_on)
        yield


def error_of(work: Any) -> dict[str, Any]:
    try:
        work()
    except ww.WeightwireError as error:
        return {"error": type(error).__name__, "engine": error.engine, "phase": error.phase, "message": str(error)}
    return {"error": None}


def state_of(url: str) -> dict[str, Any]:
    with ww.connect(url) as engines:
        status = engines[0].status()
    return {"state": status.state, "version": status.version}


def facts(receipt: Any, url: str) -> dict[str, Any]:
    own = receipt.engines[url]
    return {"version": receipt.version, "transport": own.transport, "proven": sorted(set(own.proven.values()))}


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 3 else trainer(*sys.argv[1:])
