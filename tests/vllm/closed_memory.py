"""Run as a script: a trainer on the engine's GPU that lends its memory, and dies or frees it too early.

    python closed_memory.py FOLDER

What happens at which moment is set by taking the steps of a publish one by one. Prints one line of JSON.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from killed_worker import error_of, facts
from servers import Server, Trainer, load, renew, save_large, say, serving, url_of, wait_until_idle

import weightwire as ww
from weightwire import sources
from weightwire.reading import Weights
from weightwire.transports.cuda_ipc import CudaIpc
from weightwire.updates.digest import scan_tensors_any, settle
from weightwire.updates.manifest import Manifest, decode_manifest

LEASE = 5.0
DEADLINE = 60.0
DYING = ("lent", "staged", "sealed")
"""How far a trainer comes: it has lent its memory and nobody knows of it; the engine has read it; has sealed."""


def main(folder: str) -> None:
    model = save_large(Path(folder))
    with contextlib.ExitStack() as opened:
        # They import what they need while the server does; none touches the GPU before it is told to go.
        trainers = {
            how: opened.enter_context(contextlib.closing(Trainer(__file__, how, url_of(Path(folder), "engine"), model)))
            for how in (*DYING, "frees")
        }
        (server,) = opened.enter_context(serving(model, Path(folder), ["engine"]))
        results = scenario(server, model, trainers)
    print("\n" + json.dumps(results))


def scenario(server: Server, model: Path, trainers: dict[str, Trainer]) -> dict[str, Any]:
    results: dict[str, Any] = {
        "lease": LEASE,
        "weights": (model / "model.safetensors").stat().st_size,
        "used": [used()],
    }
    frees = trainers["frees"]
    frees.go()
    results["first"] = frees.next()
    before = server.generate()
    for how in DYING:
        trainer = trainers[how]
        trainer.go()
        said = trainer.next()
        trainer.kill()
        if how == "lent":
            results["opened too late"] = open_too_late(server.url, said)
        results["used"].append(used())
        idle = wait_until_idle(server.url, seconds=60)
        results[how] = {**idle, "same text": server.generate() == before}
    # The trainer that is left is a new one to the engine, which had others since.
    for step in ("next", "freed before", "after freed before", "freed after", "after freed after"):
        frees.go()
        results[step] = {**frees.next(), "text": server.generate()}
    frees.go()
    results["exit"] = frees.process.wait(60)
    results["used"].append(used())
    deadline = time.monotonic() + LEASE + 15
    while used() > results["used"][0] + results["weights"] // 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    results["used"].append(used())
    return results


def used() -> int:
    """Bytes of GPU memory in use by whomever."""
    free, total = torch.cuda.mem_get_info(0)
    return total - free


def open_too_late(url: str, said: dict[str, Any]) -> dict[str, Any]:
    manifest = decode_manifest(said["manifest"].encode())
    with ww.connect(url) as engines:
        return error_of(lambda: stage(engines[0], manifest, said["address"], said["digests"]))


def stage(engine: Any, manifest: Manifest, address: str, digests: list[str], seal: bool = True) -> str:
    """Begin, with what is to be read, and seal: the update's id."""
    id = engine.begin(manifest, holder="a trainer", lease=LEASE, address=address, timeout=DEADLINE).id
    if seal:
        engine.seal(id, digests, timeout=DEADLINE)
        return str(id)
    deadline = time.monotonic() + DEADLINE
    while (held := engine.status().update or {}).get("received") != held.get("buckets"):
        if time.monotonic() > deadline:
            raise RuntimeError(f"not read in {DEADLINE:g} s: {held}")
        time.sleep(0.01)
    return str(id)


@contextlib.contextmanager
def lending(weights: dict[str, torch.Tensor], version: int) -> Iterator[tuple[Manifest, str, list[str]]]:
    """What `stage` takes, as a publisher would make it."""
    source = sources.find(weights, timeout=DEADLINE)
    specs = tuple(source.metadata())
    tensors = source.whole()
    digests = [scan.digest.hex() for scan in settle(scan_tensors_any(tensors))]
    with CudaIpc(Weights(source)).lend(tensors) as address:
        source.release()
        del tensors
        yield Manifest(version=version, tensors=specs, staging="lent").check(), address, digests


def trainer(how: str, url: str, model: str) -> None:
    sys.stdin.readline()
    faulthandler.dump_traceback_later(150)  # of one that hangs, where
    with ww.connect(url) as engines:
        weights = load(Path(model), "cuda:0", seed=1 + ["frees", *DYING].index(how))
        if how == "frees":
            free(engines, weights)
        else:
            die(how, engines[0], weights)


def die(how: str, engine: Any, weights: dict[str, torch.Tensor]) -> None:
    """Come so far, and wait there for the end."""
    with lending(weights, 2) as (manifest, address, digests):
        if how != "lent":
            stage(engine, manifest, address, digests, seal=how == "sealed")
        say(manifest=msgspec.json.encode(manifest).decode(), address=address, digests=digests)
        time.sleep(3600)


def free(engines: Any, weights: dict[str, torch.Tensor]) -> None:
    def publish(version: int, lease: float = LEASE) -> dict[str, Any]:
        with ww.Publisher(weights, engines, transport="cuda-ipc", lease=lease, deadline=DEADLINE) as publisher:
            return facts(publisher.publish(version), engines[0].name)

    say(**publish(1, DEADLINE))  # the engine may have kernels to compile yet
    sys.stdin.readline()
    renew(weights, 10)
    say(**publish(2))

    for version, sealed in ((3, False), (5, True)):
        sys.stdin.readline()
        # Other memory than before, which the engine has open still.
        weights.update(again(weights, 10 + version))
        say(**freed(engines[0], weights, version, sealed))
        sys.stdin.readline()
        weights.update(again(weights, 10 + version + 1))
        say(**publish(version + 1))
    sys.stdin.readline()


def freed(engine: Any, weights: dict[str, torch.Tensor], version: int, sealed: bool) -> dict[str, Any]:
    """Free the memory that was lent before the engine has opened it, or once it has `sealed`; what comes of that."""
    said: dict[str, Any] = {}
    with lending(weights, version) as (manifest, address, digests):
        if not sealed:
            release(weights)
            said = error_of(lambda: stage(engine, manifest, address, digests))
        else:
            id = stage(engine, manifest, address, digests)
            release(weights)

            def commit() -> None:
                said.update(engine.commit(id, pause="keep", keep_cache=False, timeout=DEADLINE).proven)

            said = {**error_of(commit), "proven": sorted(set(said.values()))}
    status = engine.status()
    return {**said, "state": status.state, "version": status.version, "poisoned": status.poisoned}


def release(weights: dict[str, torch.Tensor]) -> None:
    """Give the memory back to the GPU, whoever still has the tensors."""
    torch.cuda.synchronize()
    for tensor in weights.values():
        tensor.untyped_storage().resize_(0)
    torch.cuda.empty_cache()


def again(weights: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Tensors of the same names and shapes, in memory of their own."""
    fresh = {name: torch.zeros(tensor.shape, dtype=tensor.dtype, device="cuda:0") for name, tensor in weights.items()}
    renew(fresh, seed)
    return fresh


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 2 else trainer(*sys.argv[1:])
