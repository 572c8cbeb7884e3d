"""What a trainer published last, kept on the host, so that the next update can be the delta from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from weightwire.errors import NonFinite
from weightwire.updates.delta import DELTA_DTYPES, Delta, decode, encode
from weightwire.updates.digest import Digest, Pending, Scan, settle
from weightwire.updates.manifest import TensorSpec

__all__ = ["Baseline"]

Read = Callable[[int, int, torch.Tensor], Scan | Pending]
_DTYPES = {str(dtype).removeprefix("torch.") for dtype in DELTA_DTYPES}


class Baseline:
    """A copy of every tensor as of `version`; None while there is none, or it is being made."""

    def __init__(self) -> None:
        self.version: int | None = None
        self._specs: tuple[TensorSpec, ...] = ()
        self._tensors: list[torch.Tensor] = []
        self._digests: list[Digest] = []

    def refusal(self, specs: tuple[TensorSpec, ...]) -> str | None:
        """Why there is no delta from here to tensors of these specs."""
        if self.version is None:
            return "nothing was published before that a delta could start from"
        if specs != self._specs:
            return "the tensors are not those of the version before"
        odd = next((spec for spec in specs if spec.dtype not in _DTYPES), None)
        return None if odd is None else f"{odd.name} is {odd.dtype}, of which there is no delta"

    def encode(self, read: Read, *, finite: bool, limit: int) -> list[Delta] | None:
        """A delta for each tensor, to what `read(tensor, start, out)` gives; None once they take `limit` bytes.
        Raises `NonFinite`."""
        deltas: list[Delta] = []
        for number, (spec, base, before) in enumerate(zip(self._specs, self._tensors, self._digests, strict=True)):
            new = torch.empty_like(base)
            scanned = settle([read(number, 0, new)])[0]
            if finite and scanned.nonfinite:
                raise NonFinite(
                    f"NaN or Inf in {spec.name} ({scanned.nonfinite} of {spec.numel})",
                    phase="stage",
                    next_step="Nothing was changed. Look at the training step, or publish with finite=False.",
                )
            deltas.append(encode(spec.name, base, new, before=before))
            limit -= deltas[-1].nbytes
            if limit <= 0:
                return None
        return deltas

    def advance(self, version: int, deltas: Sequence[Delta]) -> None:
        """Take over what was published as these deltas."""
        self.version = None
        for number, delta in enumerate(deltas):
            base = self._tensors[number]
            decode(self._specs[number].name, delta, base, before=delta.before).apply(base)
            self._digests[number] = delta.after
        self.version = version

    def start(self, specs: tuple[TensorSpec, ...]) -> None:
        """Make room for tensors that are published whole; `write` and then `finish` follow."""
        self.version = None
        if specs != self._specs:
            self._specs = specs
            self._tensors = [torch.empty(spec.numel, dtype=getattr(torch, spec.dtype)) for spec in specs]

    def write(self, tensor: int, start: int, data: torch.Tensor) -> None:
        self._tensors[tensor][start : start + data.numel()].copy_(data.reshape(-1))

    def finish(self, version: int, scans: Sequence[Scan]) -> None:
        self._digests = [scanned.digest for scanned in scans]
        self.version = version
