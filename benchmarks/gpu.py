"""Updates of a real vLLM on GPUs, phase by phase, beside what stock vLLM does on the same machine.

    python benchmarks/gpu.py kernels same pair pulled nccl adapter direct delta [--updates 12] [--peer S] [--out F]
    python benchmarks/gpu.py load [--updates 24] [--lengths 200 1000] [--transports T ...] [--compilation C] [--out F]

A Qwen3-8B-shaped model with random bf16 weights: 8.19 B parameters, 399 tensors, 16.38 GB. One server on the last GPU.
`same`: the trainer on that GPU too, over `cuda-ipc`; `pair`, `pulled`, `nccl` and `direct`: the trainer on the first,
over `cuda-ipc` and over NCCL, each staged and with `staging="none"`; `delta`: over NCCL what changed since the last,
1 % of the elements by one unit in the last place; `adapter`: a LoRA of rank 32 on all linears from the trainer's GPU;
`load`: what an update every 2 s costs 48 running requests of so many tokens, on a server of its own with vLLM's own
settings or C, over the first transport that works or each T. With torch.compile, the first start takes minutes; C may
be '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}'. `kernels` are the copy and the digest alone. S is a script that
times stock vLLM's own transfers (`nccl`, `ipc`, `lora`).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2 as httpx
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

import weightwire as ww
from weightwire.engines.vllm.batched_copy import BatchedCopy, Move
from weightwire.sources.peft import AdapterSource
from weightwire.updates.digest import scan_tensors_any, settle

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "vllm"))
import models

WARM_UP = 3
ADAPTERS = 6  # before as many revisions are held as are kept, each takes pinned memory that is new
RANK = 32
LINEARS = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 1024), "self_attn.v_proj": (4096, 1024),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (4096, 12288), "mlp.up_proj": (4096, 12288),
    "mlp.down_proj": (12288, 4096),
}  # fmt: skip
SHAPE = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 4096,
    "tie_word_embeddings": False, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
SERVE = ["--max-model-len", "1024", "--gpu-memory-utilization", "0.4"]
IDLE = ["--enforce-eager", "--enable-lora", "--max-lora-rank", str(RANK), "--max-loras", "2"]
LOADED = ["--max-num-seqs", "64"]
REQUESTS, EVERY, TURN, AFTER = 48, 2.0, 4.0, 0.05


def weights(device: torch.device) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**SHAPE), dtype=torch.bfloat16)
    state = model.state_dict()
    return {n: torch.empty(t.shape, dtype=t.dtype, device=device).normal_(0, 0.02) for n, t in state.items()}


def step(tensor: torch.Tensor, share: float) -> None:
    """Move a share of the elements by one unit in the last place."""
    for part in tensor.view(-1).view(torch.int16).split(1 << 26):
        part += (torch.rand(part.shape, device=part.device) < share).to(torch.int16)


def adapter(device: torch.device) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.01)

    tensors = {}
    for layer in range(int(SHAPE["num_hidden_layers"])):
        for name, (fan_in, fan_out) in LINEARS.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = (
                new(RANK, fan_in),
                new(fan_out, RANK),
            )
    modules = [name.partition(".")[2] for name in LINEARS]
    return tensors, {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": modules}


@contextlib.contextmanager
def serving(gpu: str, flags: list[str]) -> Iterator[str]:
    """A server with dummy weights on this GPU; gives the path of its Unix socket."""
    folder = Path(tempfile.mkdtemp(prefix="weightwire-benchmark-"))
    models.save_tokenizer(folder)
    Qwen3Config(**SHAPE, architectures=["Qwen3ForCausalLM"], dtype="bfloat16").save_pretrained(folder)
    socket = folder / "socket"
    command = [
        sys.executable, "-m", "weightwire.cli.main", "serve", str(folder), "--load-format", "dummy", "--uds",
        str(socket), "--served-model-name", "model", *SERVE, *flags,
    ]  # fmt: skip
    log = folder / "log"
    with log.open("w") as out:
        server = subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu}, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 600
        while True:
            with contextlib.suppress(ww.WeightwireError, OSError), ww.connect(f"unix:{socket}") as engines:
                engines[0].status(timeout=5)
                break
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the server did not start")
            time.sleep(1)
        yield str(socket)
    except BaseException:
        print(log.read_text()[-6000:], file=sys.stderr)
        raise
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def timed(publish: Callable[[int], Any], version: int) -> dict[str, Any]:
    """One update. Until the engine generates again is all phases without the verification, which follows then."""
    started = time.perf_counter()
    receipt = publish(version)
    wall = time.perf_counter() - started
    engine = next(iter(receipt.engines.values()))
    return {
        "resumed": sum(receipt.seconds.values()) - engine.seconds.get("verify", 0.0),
        "wall": wall,
        "paused": engine.pause,
        **{f"trainer {phase}": seconds for phase, seconds in receipt.seconds.items()},
        **{f"engine {phase}": seconds for phase, seconds in engine.seconds.items()},
        "wire GB/s": receipt.nbytes / 1e9 / engine.seconds["stage"],
        "transport": engine.transport,
        "proven": ", ".join(sorted(set(engine.proven.values()))),
        "GB": receipt.nbytes / 1e9,
    }


class Idle:
    """A server that generates nothing meanwhile, and the ways to update it."""

    def __init__(self, url: str, updates: int) -> None:
        self.url, self.updates, self.version = url, updates, 0
        self.last = torch.device("cuda", torch.cuda.device_count() - 1)
        self.first = torch.device("cuda", 0)

    def measure(
        self, publish: Callable[[int], Any], change: Callable[[], Any], warm_up: int = WARM_UP
    ) -> list[dict[str, Any]]:
        rounds = []
        for _ in range(self.updates + warm_up):
            change()
            torch.cuda.synchronize()
            self.version += 1
            rounds.append(timed(publish, self.version))
            print(json.dumps(rounds[-1]), flush=True)
        return rounds[warm_up:]

    def dense(self, device: torch.device, transport: str, **how: Any) -> list[dict[str, Any]]:
        torch.cuda.set_device(device)
        source = weights(device)
        with ww.connect(self.url) as engines:
            with ww.Publisher(source, engines, transport=transport, lease=20, deadline=60) as publisher:
                return self.measure(
                    lambda version: publisher.publish(version, **how), lambda: source["model.norm.weight"].add_(0.01)
                )

    def same(self) -> list[dict[str, Any]]:
        return self.dense(self.last, "cuda-ipc")

    def pair(self) -> list[dict[str, Any]]:
        return self.dense(self.first, "cuda-ipc")

    def pulled(self) -> list[dict[str, Any]]:
        return self.dense(self.first, "cuda-ipc", staging="none")

    def nccl(self) -> list[dict[str, Any]]:
        return self.dense(self.first, "nccl")

    def direct(self) -> list[dict[str, Any]]:
        return self.dense(self.first, "nccl", staging="none")

    def delta(self) -> list[dict[str, Any]]:
        torch.cuda.set_device(self.first)
        source = weights(self.first)
        with ww.connect(self.url) as engines:
            with ww.Publisher(source, engines, transport="nccl", baseline="device", lease=20, deadline=60) as publisher:
                return self.measure(publisher.publish, lambda: [step(tensor, 0.01) for tensor in source.values()])

    def adapter(self) -> list[dict[str, Any]]:
        torch.cuda.set_device(self.last)
        tensors, config = adapter(self.last)
        some = next(iter(tensors.values()))
        with ww.connect(self.url) as engines, ww.Publisher(AdapterSource(tensors, config), engines) as publisher:
            return self.measure(publisher.publish, lambda: some.add_(0.01), ADAPTERS)


def kernels() -> dict[str, float]:
    """The copy and the digest alone, on the last GPU: milliseconds, the median of 10; `limit` is one large copy."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    torch.cuda.set_device(device)
    source = list(weights(device).values())
    target = [torch.empty_like(tensor) for tensor in source]
    copy = BatchedCopy(
        (Move(s.data_ptr(), t.data_ptr(), 1, s.nbytes, 0, 0) for s, t in zip(source, target, strict=True)), device
    )
    half = (
        torch.empty(1 << 32, dtype=torch.uint8, device=device),
        torch.empty(1 << 32, dtype=torch.uint8, device=device),
    )
    total = sum(tensor.nbytes for tensor in source)

    def milliseconds(work: Callable[[], Any]) -> float:
        took = []
        for _ in range(13):
            torch.cuda.synchronize()
            started = time.perf_counter()
            work()
            torch.cuda.synchronize()
            took.append(1000 * (time.perf_counter() - started))
        return statistics.median(took[WARM_UP:])

    return {
        "copy": milliseconds(copy.run),
        "copy one by one": milliseconds(lambda: [t.copy_(s) for s, t in zip(source, target, strict=True)]),
        "digest": milliseconds(lambda: settle(scan_tensors_any(source))),
        "limit": milliseconds(lambda: half[1].copy_(half[0])) * total / (1 << 32),
    }


def lost(
    gaps: Sequence[tuple[float, float]],
    updates: Sequence[tuple[float, float]],
    busy: Sequence[tuple[float, float]],
) -> list[float]:
    """Seconds that each update, from when until when, has kept a request waiting: by how much longer it waited for
    chunks of its answer meanwhile than for as many when there was none of any way (`busy`). Only of updates that one
    request has seen whole."""
    quiet = [b - a for a, b in gaps if not any(b > begin and a < end + AFTER for begin, end in busy)]
    near = [(begin, end + AFTER) for begin, end in updates]
    seen = [[b - a for a, b in gaps if b > begin and a < end] for begin, end in near]
    whole = [each for each, (begin, end) in zip(seen, near, strict=True) if sum(each) >= end - begin]
    return [sum(each) - len(each) * statistics.mean(quiet) for each in whole]


def mean_and_error(values: Sequence[float]) -> tuple[float, float] | None:
    if len(values) < 2:
        return None
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def load(
    updates: int, lengths: Sequence[int], transports: Sequence[str | None], compilation: str | None
) -> dict[str, Any]:
    """Tokens a second without updates and with one every `EVERY` seconds, by `keep_cache`, in turns so short that
    neighbours are alike; which share was kept, and its standard error. Requests are of `lengths` from, to. Starts of
    requests make that uncertain by a percent in two minutes; so one of them tells how long each update kept it waiting.
    """
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    source = weights(device)
    flags = [*LOADED, "--max-model-len", str(lengths[1] + 24)]
    if compilation is not None:
        flags += ["--compilation-config", compilation]
    with serving(str(torch.cuda.device_count() - 1), flags) as socket:
        client = httpx.Client(base_url="http://localhost", transport=httpx.HTTPTransport(uds=socket), timeout=120)
        body = {"model": "model", "prompt": "hello", "ignore_eos": True, "temperature": 1.0}
        over = threading.Event()

        @contextlib.contextmanager
        def until_over() -> Iterator[None]:
            """The last requests are cut off; what fails before spoils what is measured."""
            try:
                yield
            except httpx.HTTPError as error:
                if not over.is_set():
                    failed.append(error)

        def generate(number: int) -> None:
            some = random.Random(number)  # of all alike, all would be long at the same time
            with until_over():
                while not over.is_set():
                    said = client.post("/v1/completions", json={**body, "max_tokens": some.randint(*lengths)})
                    said.raise_for_status()

        def tokens() -> float:
            lines = client.get("/metrics").text.splitlines()
            return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total"))

        gaps: list[tuple[float, float]] = []
        failed: list[Exception] = []

        def follow() -> None:
            with until_over():
                while not over.is_set():
                    asked = {**body, "stream": True, "max_tokens": lengths[1]}
                    with client.stream("POST", "/v1/completions", json=asked) as answer:
                        answer.raise_for_status()
                        came = (time.perf_counter() for line in answer.iter_lines() if line.startswith("data: {"))
                        gaps.extend(itertools.pairwise(came))

        requests = [threading.Thread(target=generate, args=(n,), daemon=True) for n in range(REQUESTS - 1)]
        requests.append(threading.Thread(target=follow, daemon=True))
        receipts: dict[tuple[int, Any], list[Any]] = {}
        rates: dict[tuple[int, Any], list[tuple[float, float]]] = {}
        times: dict[tuple[int, Any], list[tuple[float, float]]] = {}
        versions = itertools.count(1)
        with contextlib.ExitStack() as stack:
            engines = stack.enter_context(ww.connect(f"unix:{socket}"))
            publishers = [
                stack.enter_context(ww.Publisher(source, engines, transport=name, lease=20, deadline=60))
                for name in transports
            ]
            for publisher in publishers:
                for version in itertools.islice(versions, WARM_UP):
                    publisher.publish(version)
            for request in requests:
                request.start()
            time.sleep(max(10.0, lengths[1] / 100))  # until requests have ended and others have begun
            ways: list[tuple[int, Any]] = [(number, "running") for number in range(len(publishers))]
            # Without comes first and last in turn, so that what changes meanwhile is on neither side.
            for way in [*ways * max(round(updates * EVERY / TURN / 2), 1), (0, False)]:
                found_here = []
                for updating in (False, True, True, False):
                    started, before = time.perf_counter(), tokens()
                    if not updating:
                        time.sleep(TURN)
                    while updating and (since := time.perf_counter() - started) < TURN:
                        source["model.norm.weight"].add_(0.001)
                        begun = time.perf_counter()
                        publish = functools.partial(publishers[way[0]].publish, keep_cache=way[1])
                        receipts.setdefault(way, []).append(timed(publish, next(versions)))
                        times.setdefault(way, []).append((begun, time.perf_counter()))
                        print(json.dumps(receipts[way][-1]), flush=True)
                        time.sleep(max(0.0, EVERY - (time.perf_counter() - started - since)))
                    found_here.append((tokens() - before) / (time.perf_counter() - started))
                    if failed:
                        raise failed[0]
                rates.setdefault(way, []).extend([(found_here[0], found_here[1]), (found_here[3], found_here[2])])
                print(json.dumps({"way": way, "tokens/s": found_here}), flush=True)
            over.set()
    for request in requests:
        request.join(30)
    until = times[0, False][0][0]
    seen = [(a, b) for a, b in gaps if b < until]
    busy = [update for way in ways for update in times[way]]
    found = {
        f"{receipts[way][-1]['transport']}, {way[1]}": {
            "kept": mean_and_error([rate / without for without, rate in rates[way]]),
            "waited": mean_and_error(lost(seen, times[way], busy)) if way in ways else None,
            "tokens/s": rates[way],
            "updates": receipts[way],
        }
        for way in rates
    }
    print(json.dumps({name: {key: each[key] for key in ("kept", "waited")} for name, each in found.items()}))
    return {"lengths": [*lengths], "compilation": compilation, **found}


def peer(script: str, way: str) -> list[dict[str, Any]]:
    done = subprocess.run([sys.executable, script, way], capture_output=True, text=True, timeout=400)
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ways = ["same", "pair", "pulled", "nccl", "adapter", "direct", "delta"]
    parser.add_argument("ways", nargs="+", choices=["kernels", *ways, "load"])
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--lengths", type=int, nargs=2, default=[200, 1000], help="tokens of a request, of `load`")
    parser.add_argument("--transports", nargs="+", default=[None], help="of `load`; by default the first that works")
    parser.add_argument("--compilation", help="vLLM's --compilation-config, of `load`")
    parser.add_argument("--peer", help="a script that times stock vLLM, by the argument nccl, ipc or lora")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    args = parser.parse_args()
    last = torch.cuda.device_count() - 1
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(last), "command": " ".join(sys.argv[1:])}

    def keep(name: str, found: Any) -> None:
        results[name] = found
        torch.cuda.empty_cache()
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        rounds = found if isinstance(found, list) else [found]
        medians = {
            key: round(statistics.median(each[key] for each in rounds if key in each), 4)
            for key, value in (rounds[0] if rounds else {}).items()
            if isinstance(value, float)
        }
        print(name, json.dumps(medians), flush=True)

    if args.peer:
        for way in ("ipc", "nccl", "lora"):
            keep(f"peer {way}", peer(args.peer, way))
    if "kernels" in args.ways:
        keep("kernels", kernels())
    if wanted := [way for way in ways if way in args.ways]:
        with serving(str(last), IDLE) as socket:
            idle = Idle(f"unix:{socket}", args.updates)
            for way in wanted:
                try:
                    keep(way, getattr(idle, way)())
                except ww.WeightwireError as error:
                    print(f"{way}: {error!r}", file=sys.stderr, flush=True)
    if "load" in args.ways:
        keep("load", load(args.updates, args.lengths, [*dict.fromkeys(args.transports)], args.compilation))


if __name__ == "__main__":
    main()
