"""A LoRA adapter of which only what changed is sent.

It is decoded against a revision that the engine holds, and goes from there the way of an adapter that was sent whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from weightwire.engines.staged_delta import ArrivingDelta
from weightwire.errors import EngineError, VersionError
from weightwire.revisions import Revision
from weightwire.target import AdapterStaging
from weightwire.updates.boxes import Box
from weightwire.updates.digest import Digest, Scan
from weightwire.updates.manifest import Manifest, dtype_name

__all__ = ["AdapterDelta", "Held"]

Held = Callable[[], Mapping[str, torch.Tensor]]
"""Gives what was sent of a revision, by name, contiguous on the CPU; may wait for it."""


class AdapterDelta(ArrivingDelta):
    """`target.AdapterStaging`, and `target.Encoded`: a delta from `base`, of which the engine holds what `held` gives;
    from `seal` on the adapter in `inner` that it amounts to, as if it had been sent whole."""

    def __init__(self, manifest: Manifest, inner: AdapterStaging, base: Revision, held: Held) -> None:
        super().__init__(manifest)
        self._inner = inner
        self._base = base
        self._of_base: Held | None = held
        self.after: Sequence[Digest] = ()
        self.nbytes += inner.nbytes
        self.check, self.commit, self.proof, self.held = inner.check, inner.commit, inner.proof, inner.held

    @property
    def takes(self) -> Sequence[Sequence[Box]] | None:
        return self._inner.takes

    def seal(self, scans: Sequence[Scan]) -> None:
        tensors = self._read_base()
        self._refuse_others(tensors)
        bases = [tensors[spec.name].reshape(-1) for spec in self._specs]
        rebuilt = [(delta.after, scanned) for delta, _, scanned in self._rebuild(bases, self._inner)]
        self.after = [after for after, _ in rebuilt]
        self._memory = None
        self._inner.seal([scanned for _, scanned in rebuilt])

    def _read_base(self) -> Mapping[str, torch.Tensor]:
        assert self._of_base is not None
        try:
            return self._of_base()
        except EngineError as error:
            raise _other_base(f"{self._base.label} cannot be read: {error}") from error

    def _refuse_others(self, tensors: Mapping[str, torch.Tensor]) -> None:
        announced = {spec.name for spec in self._specs}
        if gone := next((name for name in tensors if name not in announced), None):
            raise _other_base(f"{self._base.label} has {gone}, of which nothing was announced")
        for spec in self._specs:
            here = tensors.get(spec.name)
            if here is None or (here.dtype, tuple(here.shape)) != (getattr(torch, spec.dtype), spec.shape):
                found = "not there" if here is None else f"{dtype_name(here.dtype)} {tuple(here.shape)}"
                raise _other_base(
                    f"{spec.name} is {found} in {self._base.label}, {spec.dtype} {spec.shape} was announced"
                )

    def discard(self) -> None:
        self._memory = None
        self._of_base = None
        self._inner.discard()


def _other_base(what: str) -> VersionError:
    return VersionError(what, next_step="Publish the whole adapter.")
