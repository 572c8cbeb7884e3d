"""The source port: where weights come from on the trainer's side.

A source can be read again and again. It is asked for runs of elements rather than for whole tensors, so that no rank
needs more memory than the bucket being filled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from weightwire.updates.boxes import Part
from weightwire.updates.digest import Pending, Scan, scan_and_copy, scan_any
from weightwire.updates.manifest import TensorSpec, dtype_name

if TYPE_CHECKING:
    from weightwire.sources.ranks import Ranks

__all__ = ["LocalSource", "Source", "SpreadSource", "spec_of", "without_aliases"]


class Source(Protocol):
    """Weights on the trainer's side. A source on a GPU also has a property `device`, which decides how they can travel,
    and a method `whole()`: every tensor in the order of `metadata()`, or None when they are not whole here."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Further names of tensors that are listed once (tied weights)."""

    @property
    def ranks(self) -> Ranks | None:
        """The trainer's ranks that must read together; None when each process has everything."""

    @property
    def lora(self) -> Mapping[str, Any] | None:
        """The config, of a source that is a LoRA adapter, as of the last `metadata()`; None for whole models. A source
        without this attribute is a whole model too."""

    def metadata(self) -> Sequence[TensorSpec]:
        """Every tensor's name, dtype and full shape, without moving data."""

    def read(self, tensor: int, start: int, out: torch.Tensor) -> Scan | Pending:
        """Fill `out` (1-D, of the tensor's dtype, on any device) with elements `start .. start + len(out)`, row-major,
        of tensor number `tensor`. With `ranks`, all of them call this together and rank 0's `out` is filled.

        Returns the scan of the elements that this rank itself holds; over all ranks they add up to the whole run.
        """

    def release(self) -> None:
        """Let go of the tensors that `metadata` looked up, so that a trainer may free or move them."""


class SpreadSource(Source, Protocol):
    """A source with `ranks` of which there can be deltas, since each rank can say what of it is its own."""

    def parts(self, tensor: int) -> Mapping[int, Part]:
        """By rank, the parts that make up tensor number `tensor`, as the last `metadata` found them: the same on all
        ranks, and each element in one part."""

    @property
    def gathers(self) -> bool:
        """Whether `gather` and `scan_own` are to be used, and not `read`: its ranks are on GPUs."""

    def gather(self, runs: Callable[[], Sequence[tuple[int, int, torch.Tensor]]]) -> None:
        """`read` of many runs (tensor, start, out) at once, without scans. `runs` is called on every rank, and what it
        raises on one is raised on all."""

    def scan_own(self) -> list[Scan | Pending]:
        """For each tensor the scan of the elements of it that this rank is to send."""

    def own(self) -> Mapping[str, torch.Tensor]:
        """By name, this rank's part of each tensor, as it lies in memory; not collective."""

    def read_part(self, tensor: int, start: int, out: torch.Tensor) -> Scan:
        """Fill `out` (1-D, on the CPU) with this rank's own elements from `start` on, in the order of its part; their
        scan, as elements of the tensor. Not collective."""


class LocalSource:
    """Base of sources whose tensors are whole and in this process; `tensors` is looked up anew at each read."""

    ranks: Ranks | None = None
    aliases: Mapping[str, str] = {}
    lora: Mapping[str, Any] | None = None
    _tensors: Sequence[torch.Tensor] = ()
    _known: Mapping[tuple[str, torch.dtype, torch.Size], TensorSpec] = {}

    def named(self) -> Mapping[str, torch.Tensor]:
        """The tensors, each under one name."""
        raise NotImplementedError

    def metadata(self) -> Sequence[TensorSpec]:
        named = self.named()
        self._tensors = list(named.values())
        self._flat: dict[int, torch.Tensor] = {}
        # Mostly they are as they were: to make hundreds of specs, and all that follows from them, anew takes longer.
        facts = {(name, tensor.dtype, tensor.shape): (name, tensor) for name, tensor in named.items()}
        self._known = {fact: self._known.get(fact) or spec_of(*what) for fact, what in facts.items()}
        return [*self._known.values()]

    def read(self, tensor: int, start: int, out: torch.Tensor) -> Scan | Pending:
        if tensor not in self._flat:
            # One at a time, since it may be a copy.
            self._flat = {tensor: self._tensors[tensor].detach().reshape(-1)}
        run = self._flat[tensor][start : start + out.numel()]
        # Of the weights themselves, so that the copy into the bucket is covered too.
        if run.device.type == out.device.type == "cpu" and run.is_contiguous():
            return scan_and_copy(run, start, out)
        out.copy_(run)
        return scan_any(run, start)

    @property
    def device(self) -> torch.device:
        return next((tensor.device for tensor in self.whole()), torch.device("cpu"))

    def whole(self) -> Sequence[torch.Tensor]:
        return self._tensors or list(self.named().values())

    def release(self) -> None:
        self._tensors, self._flat = [], {}


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """A tensor's entry in a manifest.

    >>> spec_of("w", torch.zeros(2, 3, dtype=torch.bfloat16))
    TensorSpec(name='w', dtype='bfloat16', shape=(2, 3))
    """
    return TensorSpec(name=name, dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape))


def without_aliases(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors with one name each, and the further names of those that share memory and geometry.

    >>> w = torch.zeros(2)
    >>> tensors, aliases = without_aliases({"embed": w, "head": w})
    >>> list(tensors), aliases
    (['embed'], {'head': 'embed'})
    """
    seen: dict[tuple[object, ...], str] = {}
    unique: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and tensor.device.type != "meta" and place in seen:
            aliases[name] = seen[place]
        else:
            seen[place] = name
            unique[name] = tensor
    return unique, aliases
