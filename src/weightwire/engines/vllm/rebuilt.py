"""Deltas where live weights cannot be patched, as on a CPU, where kernels keep packings of them.

Each rank keeps a copy of the checkpoint's tensors as they were last sent. A delta is decoded against that copy, and the
result goes the way of a dense update: only what travels is small. A commit that fails is undone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weightwire.engines.staged_delta import ArrivingDelta
from weightwire.engines.vllm.layout import Slot
from weightwire.target import Staging, computed_by
from weightwire.updates.boxes import Box
from weightwire.updates.delta import Patch
from weightwire.updates.digest import Digest, Scan
from weightwire.updates.manifest import Manifest, TensorSpec

__all__ = ["HostCopy", "Keeping", "Rebuilt"]


class HostCopy:
    """The tensors of a checkpoint, 1-D, on the host. `whole` while they are what was committed last."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self.specs = tuple(specs)
        self.tensors = [torch.empty(spec.numel, dtype=getattr(torch, spec.dtype)) for spec in specs]
        self.whole = False


class Keeping:
    """A dense update's staged copy that is also copied into `host`, for deltas to come."""

    def __init__(self, inner: Staging, host: HostCopy) -> None:
        self._inner = inner
        self._host = host
        self.nbytes = inner.nbytes + sum(tensor.nbytes for tensor in host.tensors)
        self.check, self.seal, self.proof, self.discard = inner.check, inner.seal, inner.proof, inner.discard
        self.computed = computed_by(inner)

    @property
    def takes(self) -> Sequence[Sequence[Box]] | None:
        return self._inner.takes

    def write(self, tensor: int, start: int, data: torch.Tensor) -> Scan | None:
        self._host.tensors[tensor][start : start + data.numel()].copy_(data)
        return self._inner.write(tensor, start, data)

    def lend(self, tensor: int, data: torch.Tensor) -> None:
        self.write(tensor, 0, data.reshape(-1))

    def commit(self) -> None:
        self._inner.commit()
        self._host.whole = True


class Rebuilt(ArrivingDelta):
    """`target.DeltaStaging`: a delta, and from `seal` on the dense update in `inner` that it amounts to.

    `slots` are those of `inner`, which keep what they replace.
    """

    def __init__(self, manifest: Manifest, inner: Staging, slots: Sequence[Slot], host: HostCopy) -> None:
        super().__init__(manifest)
        self._inner = inner
        self._slots = list(slots)
        self._host = host
        self._patches: list[Patch] = []
        self.after: Sequence[Digest] = ()
        self.nbytes += inner.nbytes
        self.proof = inner.proof
        self.computed = computed_by(inner)
        for slot in self._slots:
            slot.undoable = True

    @property
    def takes(self) -> Sequence[Sequence[Box]] | None:
        return self._inner.takes

    def seal(self, scans: Sequence[Scan]) -> None:
        after: list[Digest] = []
        whole: list[Scan] = []
        for delta, patch, scanned in self._rebuild(self._host.tensors, self._inner):
            whole.append(scanned)
            self._patches.append(patch)
            after.append(delta.after)
        self.after = after
        self._memory = None
        self._inner.seal(whole)

    def check(self, seconds: float) -> bool:
        return self._inner.check(seconds)

    def commit(self) -> None:
        self._inner.commit()
        for base, patch in zip(self._host.tensors, self._patches, strict=True):
            patch.apply(base)

    def undo(self) -> None:
        self._host.whole = False
        # Last first: a tensor that several modules share is replaced by each, and only the first found the old one.
        for slot in reversed(self._slots):
            slot.undo()
        for base, patch in zip(self._host.tensors, self._patches, strict=True):
            patch.undo(base)
        self._host.whole = True

    def discard(self) -> None:
        self._memory = None
        self._patches.clear()
        self._slots.clear()
        self._inner.discard()
