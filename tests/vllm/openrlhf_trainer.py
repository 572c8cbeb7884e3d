"""Run as a script: a trainer written to OpenRLHF's worker interface, which knows nothing of weightwire.

It is rank 0 of a group with all workers of the engine. Its engine is whoever reads its calls: one line of JSON each on
its standard output, answered by one on its standard input, as Ray would carry them.

    python openrlhf_trainer.py WORKERS CUSTOM

CUSTOM: `gloo` or `nccl`, a group of torch's own; `stateless`, one of vLLM's with NCCL alone; `ipc`, no group: the GPU's
memory is shared.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

sys.path.insert(0, str(Path(__file__).parent))
import models

from weightwire.demo.server import free_port

_out = sys.stdout
sys.stdout = sys.stderr
SECONDS = timedelta(seconds=60)


class EngineError(Exception):
    """What `ray.get` raises for a call that failed."""


class Call:
    """A call under way: `get` waits for its answer."""

    def __init__(self, method: str, *args: Any) -> None:
        say({"call": method, "args": args})

    def get(self) -> None:
        answer = json.loads(sys.stdin.readline())
        if "error" in answer:
            raise EngineError(answer["error"])


def say(line: Any) -> None:
    print(json.dumps(line), file=_out, flush=True)


def join(port: int, world: int, name: str, custom: str) -> Any:
    """A further group beside whatever default group there is: the store is met by TCP, keys go under the name."""
    if custom == "stateless":
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup

        return PyNcclCommunicator(StatelessProcessGroup.create("127.0.0.1", port, 0, world), device=0)
    store, rank, world = next(dist.rendezvous(f"tcp://127.0.0.1:{port}", 0, world, timeout=SECONDS))
    store.set_timeout(SECONDS)
    group, _ = c10d._new_process_group_helper(
        world, rank, [], dist.Backend(custom), c10d.PrefixStore(name, store), group_name=name, timeout=SECONDS
    )
    c10d._world.pg_group_ranks[group] = {number: number for number in range(world)}
    return group


class Trainer:
    def __init__(self, workers: int, custom: str) -> None:
        self.workers, self.custom = workers, custom
        self.device = torch.device("cpu" if custom == "gloo" else "cuda:0")
        self.joined = 0
        self.group: Any = None

    def init(self) -> None:
        if self.custom == "ipc":
            return
        port = free_port()
        self.joined += 1
        name = f"openrlhf{self.joined}"  # torch wants another name for each group of one process
        backend = "gloo" if self.custom == "gloo" else "nccl"
        call = Call("init_process_group", "127.0.0.1", port, 1, self.workers + 1, name, backend, False)
        self.group = join(port, self.workers + 1, name, self.custom)
        call.get()

    def loop(self, seed: int, three_arguments: bool = False, change: str = "", at: int = -1) -> int:
        """Send every parameter. `change` says what is wrong with number `at`. Gives how many were sent."""
        Call("reset_prefix_cache").get()
        parameters = list(models.new_model("qwen3", tied=True, seed=seed).named_parameters())
        for number, (name, parameter) in enumerate(parameters):
            data, last = parameter.data.to(self.device), number == len(parameters) - 1
            if number == at:
                name, data, last = changed(change, name, data, last)
            arguments = [name, str(data.dtype), list(data.shape)]
            if self.custom == "ipc":
                call = Call("update_weight_cuda_ipc", *arguments, shared(data), *([] if three_arguments else [last]))
            else:
                call = Call("update_weight", *arguments, *([] if three_arguments else [last]))
            if number == at and change == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            self.broadcast(data)
            call.get()
            if last and number < len(parameters) - 1:
                return number + 1
        return len(parameters)

    def broadcast(self, data: torch.Tensor) -> None:
        if self.custom == "stateless":
            self.group.broadcast(data, src=0, stream=torch.cuda.current_stream())
        elif self.custom != "ipc":
            dist.broadcast(data, 0, group=self.group)


def shared(data: torch.Tensor) -> dict[str, Any]:
    """What `reduce_tensor` gives, under this GPU's name, as JSON: without its function and its classes."""
    from torch.multiprocessing.reductions import reduce_tensor

    _, arguments = reduce_tensor(data)
    plain = [value.hex() if isinstance(value, bytes) else value for value in arguments]
    plain[0], plain[4], plain[5] = None, None, str(data.dtype)
    return {str(torch.cuda.get_device_properties(0).uuid): plain}


def changed(change: str, name: str, data: torch.Tensor, last: bool) -> tuple[str, torch.Tensor, bool]:
    if change == "name":
        return f"other.{name}", data, last
    if change in ("shape", "slice"):
        return name, torch.zeros(data.shape[0] + 2, *data.shape[1:], device=data.device), last
    if change == "kind":
        return name, data.long(), last
    if change == "nan":
        data = data.clone()
        data.view(-1)[3] = float("nan")
        return name, data, last
    if change == "last":
        return name, data, True
    return name, data, last


def main(workers: int, custom: str) -> None:
    torch.set_num_threads(1)
    trainer = Trainer(workers, custom)
    for line in sys.stdin:
        task = json.loads(line)
        try:
            say({"done": {"sent": getattr(trainer, task.pop("do"))(**task)}})
        except EngineError as error:
            say({"done": {"error": str(error)}})


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(int(sys.argv[1]), sys.argv[2])
