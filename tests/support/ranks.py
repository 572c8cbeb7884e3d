"""What a rank of a test does to see that a source reads right, and how much memory that takes."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
import torch
import torch.distributed as dist

from weightwire.updates.boxes import NOTHING
from weightwire.updates.digest import scan, settle

__all__ = ["Model", "Peak", "bits", "default_group_works", "gathered", "holder", "reads_frugally", "reads_like"]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def default_group_works(size: int) -> None:
    one = torch.ones(1)
    dist.all_reduce(one)
    assert int(one) == size


def gathered(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The whole state of a module with DTensors; collective."""
    from torch.distributed.tensor import DTensor

    state = module.state_dict()
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}


def holder(tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """A module of these tensors, which are not trained."""
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    return module


_chance = random.Random(0)
"""The same on all ranks, and other runs at each reading."""


def runs_of(numel: int, chance: random.Random) -> Iterator[tuple[int, int]]:
    yield 0, numel
    for _ in range(4):
        start = chance.randrange(numel)
        yield start, chance.randrange(1, numel - start + 1)


def reads_like(source: Any, full: Mapping[str, torch.Tensor]) -> None:
    """Any run that ranks read together has the bits of the full tensors, and their scans add up to its scan."""
    specs = source.metadata()
    assert {spec.name for spec in specs} | source.aliases.keys() == set(full)
    for number, spec in enumerate(specs):
        whole = full[spec.name]
        assert (spec.shape, getattr(torch, spec.dtype)) == (tuple(whole.shape), whole.dtype)
        if not spec.numel:
            continue
        for start, length in runs_of(spec.numel, _chance):
            device = "cpu" if source.ranks.rank == 0 else "meta"
            out = torch.zeros(length, dtype=whole.dtype, device=device)
            read = source.read(number, start, out)
            wanted = whole.reshape(-1)[start : start + length]
            assert source.ranks.total([read]) == [scan(wanted, start)], (spec, start, length)
            if source.ranks.rank == 0:
                assert torch.equal(bits(out), bits(wanted)), (spec, start, length)
    if hasattr(source, "gather"):
        gathers_like(source, full)


def gathers_like(source: Any, full: Mapping[str, torch.Tensor]) -> None:
    """The same of many runs that are gathered at once, as ranks with GPUs do it."""
    specs = source.metadata()
    device = "cpu" if source.ranks.rank == 0 else "meta"
    runs, wanted = [], []
    for number, spec in enumerate(specs):
        for start, length in runs_of(spec.numel, _chance) if spec.numel else ():
            runs.append((number, start, torch.zeros(length, dtype=full[spec.name].dtype, device=device)))
            wanted.append(full[spec.name].reshape(-1)[start : start + length])
    source.gather(lambda: runs)
    if source.ranks.rank == 0:
        for (number, start, out), run in zip(runs, wanted, strict=True):
            assert torch.equal(bits(out), bits(run)), (specs[number], start)
    for number, (name, own) in enumerate(source.own().items()):
        part = source.parts(number).get(source.ranks.rank, NOTHING)
        read = torch.empty(part.numel, dtype=own.dtype)
        source.read_part(number, 0, read)
        assert torch.equal(bits(own), bits(read)), name
    totals = source.ranks.total(settle(source.scan_own()))
    assert totals == [scan(full[spec.name].reshape(-1)) for spec in specs]


class Model(torch.nn.Module):
    """Odd sizes, tied weights, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.up = torch.nn.Linear(6, 13)
        self.down = torch.nn.Linear(13, 6)
        self.gate = torch.nn.Linear(6, 1)
        self.norm = torch.nn.LayerNorm(6)
        self.scale = torch.nn.Parameter(torch.randn(5, 3, 7))
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("seen", torch.arange(9).reshape(3, 3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = self.norm(x + self.down(torch.relu(self.up(x)))) * self.gate(x)
        return self.head(x) * self.scale.mean()


class Peak(threading.Thread):
    """The most memory this process had, above what it had at the start; in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._process, self._over = psutil.Process(), threading.Event()
        self._base = self.most = self._process.memory_info().rss

    def run(self) -> None:
        while not self._over.wait(0.001):
            self.most = max(self.most, self._process.memory_info().rss)

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.most - self._base


def reads_frugally(source, rank, check=lambda number, out: None):
    """Reads all of a source piece by piece, as a publish does. `check` is given each piece that this rank got."""
    run = 4 << 20
    buffer = torch.zeros(run, dtype=torch.uint8, device="cpu" if rank == 0 else "meta").view(torch.bfloat16)
    # Compiles, connects, and warms up the allocator.
    source.read(0, 0, buffer)
    peak = Peak()
    peak.start()
    for number, spec in enumerate(source.metadata()):
        for start in range(0, spec.numel, len(buffer)):
            out = buffer[: spec.numel - start]
            source.read(number, start, out)
            if rank == 0:
                check(number, out)
    grown = peak.stop()
    assert grown < 3 * run + (16 << 20), f"grew by {grown / 1e6:.0f} MB"
