"""A source's tensors in the order in which they are sent, whole or the part that this rank holds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import msgspec
import torch

from weightwire import transports
from weightwire.baseline import Read
from weightwire.errors import SourceError, WeightwireError
from weightwire.sources.base import LocalSource, Source, SpreadSource
from weightwire.updates.boxes import NOTHING, Part
from weightwire.updates.buckets import Piece
from weightwire.updates.digest import Pending, Scan, scan_any, scan_runs
from weightwire.updates.manifest import TensorSpec
from weightwire.updates.packing import narrow, pack

__all__ = ["Reading", "Weights"]


class Weights:
    """A source as transports see it (`transports.base.Weights`)."""

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def device(self) -> torch.device:
        return getattr(self._source, "device", torch.device("cpu"))

    def whole(self) -> Sequence[torch.Tensor] | None:
        whole = getattr(self._source, "whole", None)
        return None if whole is None else whole()


class Reading:
    """Of a source with these `specs`. With `parts`, which part of each tensor is whose is found out too, if the source
    is spread over ranks. With `dtype`, what is wider is cast to that on the way, and `specs` say so; not of a source
    that is spread."""

    def __init__(self, source: Source, specs: Sequence[TensorSpec], *, parts: bool, dtype: str | None = None) -> None:
        self._source = source
        self._spread = cast(SpreadSource, source)  # where there are ranks, and parts are asked for
        self._order = _order(specs)
        self._dtypes = [getattr(torch, specs[n].dtype) for n in self._order]
        self.specs = tuple(specs[n] if dtype is None else _narrowed(specs[n], dtype) for n in self._order)
        self._sent = self._dtypes if dtype is None else [getattr(torch, spec.dtype) for spec in self.specs]
        self.parts: list[Mapping[int, Part]] = []
        self.mine: tuple[Part, ...] = ()
        if source.ranks is not None and parts:
            self.parts = [self._spread.parts(n) for n in self._order]
            self.mine = tuple(held.get(source.ranks.rank, NOTHING) for held in self.parts)

    def read(self, tensor: int, start: int, out: torch.Tensor) -> Scan | Pending:
        """Elements `start ..` of a tensor, read by all ranks together."""
        if self._dtypes[tensor] != out.dtype:
            own = torch.empty_like(out, dtype=self._dtypes[tensor])
            self._guard(self._source.read, tensor, start, own)
            return scan_any(out.copy_(own), start)
        return self._guard(self._source.read, tensor, start, out)

    def pack(self, pieces: Sequence[Piece], to: torch.Tensor) -> list[Scan] | None:
        """Every piece of a bucket, by one call, where the tensors are whole on the CPU and so is `to`; else None."""
        # A source that reads in its own way is left to it.
        plain = getattr(type(self._source), "read", None) is LocalSource.read
        whole = self.whole if plain and to.device.type == "cpu" else []
        if not whole or whole[0].device.type != "cpu":
            return None
        if self._dtypes == self._sent:
            return pack(pieces, whole, to)
        if {*self._dtypes} == {torch.float32} and {*self._sent} == {torch.bfloat16}:
            return narrow(pieces, whole, to)
        torch._foreach_copy_([p.within(to) for p in pieces], [p.of(whole[p.tensor].view(-1)) for p in pieces])
        return scan_runs(to, [(p.offset, p.count, p.start, p.dtype) for p in pieces])

    def gather(self, runs: Callable[[], Sequence[tuple[int, int, torch.Tensor]]]) -> None:
        """As `SpreadSource.gather`."""
        self._spread.gather(lambda: [(self._order[tensor], start, out) for tensor, start, out in runs()])

    def scan_own(self) -> list[Scan | Pending]:
        """As `SpreadSource.scan_own`."""
        scans = self._spread.scan_own()
        return [scans[n] for n in self._order]

    def read_own(self, tensor: int, start: int, out: torch.Tensor) -> Scan | Pending:
        """What this rank holds, by itself."""
        if self._source.ranks is None:
            return self.read(tensor, start, out)
        return self._guard(self._spread.read_part, tensor, start, out)

    @functools.cached_property
    def whole(self) -> list[torch.Tensor]:
        """The tensors themselves, where they are all of them contiguous and on one device; on a GPU cast."""
        whole = [t.detach() if t.requires_grad else t for t in Weights(self._source).whole() or ()]
        alike = len({tensor.device for tensor in whole}) == 1 and all(tensor.is_contiguous() for tensor in whole)
        ordered = [whole[n] for n in self._order] if alike else []
        if not ordered or ordered[0].device.type == "cpu":
            return ordered
        return [t if t.dtype == dtype else t.to(dtype) for t, dtype in zip(ordered, self._sent, strict=True)]

    def _guard(self, read: Read, tensor: int, start: int, out: torch.Tensor) -> Scan | Pending:
        try:
            return read(self._order[tensor], start, out)
        except WeightwireError:
            raise
        except Exception as error:
            raise SourceError(f"tensor number {tensor} could not be read: {error!r}", phase="stage") from error


def _narrowed(spec: TensorSpec, dtype: str) -> TensorSpec:
    if getattr(torch, dtype).itemsize >= spec.itemsize:
        return spec
    return msgspec.structs.replace(spec, dtype=dtype)


def _order(specs: Sequence[TensorSpec]) -> list[int]:
    # Large ones first: what an engine does with a tensor once it has all of it takes longest for them, and what it does
    # for the last one is waited for.
    return sorted(range(len(specs)), key=lambda n: specs[n].nbytes <= transports.BUCKET_BYTES)
