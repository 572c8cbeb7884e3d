"""What a trainer published last, kept on the host, so that the next update can be the delta from it.

Of weights that are spread over ranks each rank keeps its own part, and encodes that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from weightwire.chain import Chain
from weightwire.errors import NonFinite, VerificationError
from weightwire.updates.boxes import Part
from weightwire.updates.delta import DELTA_DTYPES, Delta, decode, encode, estimate
from weightwire.updates.digest import Digest, Pending, Scan, Scans, settle
from weightwire.updates.manifest import TensorSpec, dtype_name

__all__ = ["Baseline", "Look", "Read"]

Read = Callable[[int, int, torch.Tensor], Scan | Pending]
_SAMPLES, _RUN = 4, 1024  # of each tensor, and their elements
_DTYPES = {*map(dtype_name, DELTA_DTYPES)}


@dataclass(frozen=True, slots=True)
class Look:
    """What a baseline finds out before it encodes: about which share of the elements has changed."""

    density: float


class Baseline:
    """A copy of every tensor as of `version`; None while there is none, or it is being made. `chain` has the deltas
    that led to it. With `parts` it is of these parts of the tensors alone, and in their elements all is read and
    written."""

    reads_along = True
    """Whether all that is read to be sent has to be given to `write` too."""

    def __init__(self) -> None:
        self.version: int | None = None
        self.chain = Chain()
        self._specs: tuple[TensorSpec, ...] = ()
        self._parts: tuple[Part, ...] = ()
        self._spread = False
        self._device = torch.device("cpu")
        self._tensors: list[torch.Tensor] = []
        self._digests: list[Digest] = []

    @property
    def numel(self) -> int:
        return sum(tensor.numel() for tensor in self._tensors)

    def refusal(self, specs: tuple[TensorSpec, ...], parts: tuple[Part, ...] = ()) -> str | None:
        """Why there is no delta from here to tensors of these specs."""
        if self.version is None:
            return "nothing was published before that a delta could start from"
        if specs != self._specs:
            return "the tensors are not those of the version before"
        if parts and parts != self._parts:
            return "the tensors are spread over the ranks otherwise than those of the version before"
        odd = next((spec for spec in specs if spec.dtype not in _DTYPES), None)
        return None if odd is None else f"{odd.name} is {odd.dtype}, of which there is no delta"

    def look(self, read: Read) -> Look:
        """About which share of the elements that `read(tensor, start, out)` gives has changed: of runs all over."""
        looked = changed = 0.0
        for number, base in enumerate(self._tensors):
            for place in range(_SAMPLES):
                start = max(base.numel() - _RUN, 0) * place // (_SAMPLES - 1)
                run = base[start : start + _RUN]
                new = torch.empty_like(run)
                read(number, start, new)
                weight = base.numel() / _SAMPLES
                looked += weight
                changed += weight * estimate(run, new)[0]
        return Look(changed / looked if looked else 0.0)

    def encode(self, read: Read, look: Look | None = None, *, finite: bool) -> list[Delta]:
        """A delta for each tensor, to what `read(tensor, start, out)` gives; `look`: what was found out about that just
        now. Raises `NonFinite`."""
        deltas: list[Delta] = []
        # One memory for all tensors: fresh pages for each took four times as long as all the rest.
        room = torch.empty(max((base.nbytes for base in self._tensors), default=0), dtype=torch.uint8)
        for number, (spec, part) in enumerate(zip(self._specs, self._parts, strict=True)):
            base, before = self._tensors[number], self._digests[number]
            new = room[: base.nbytes].view(base.dtype)
            scanned = settle([read(number, 0, new)])[0]
            if finite and scanned.nonfinite:
                raise NonFinite(
                    f"NaN or Inf in {spec.name} ({scanned.nonfinite} of {base.numel()})",
                    phase="stage",
                    next_step="Nothing was changed. Look at the training step, or publish with finite=False.",
                )
            deltas.append(encode(spec.name, base, new, part=part, before=before))
            if deltas[-1].after != scanned.digest:
                raise VerificationError(
                    f"{spec.name}: what was published last is no longer what is kept of it, or the weights change",
                    phase="stage",
                    next_step="Publish with kind='dense', while no optimiser step is under way.",
                )
        return deltas

    def wait(self) -> None:
        """Until the bytes of what was encoded last are there; all else is known before."""

    def advance(self, version: int, deltas: Sequence[Delta]) -> None:
        """Take over what was published as these deltas."""
        start, self.version = self.version, None
        for number, delta in enumerate(deltas):
            base = self._tensors[number]
            name, part = self._specs[number].name, self._parts[number]
            decode(name, delta, base, part=part, before=delta.before).apply(base)
            self._digests[number] = delta.after
        self.version = version
        if start is not None and not self._spread:
            self.chain.add(start, deltas)

    def start(self, specs: tuple[TensorSpec, ...], parts: tuple[Part, ...] = ()) -> None:
        """Make room for tensors that are published whole; `write` and then `finish` follow."""
        self.version = None
        self.chain.clear()
        self._spread = bool(parts)
        parts = parts or tuple(Part.whole(spec.shape) for spec in specs)
        if (specs, parts) != (self._specs, self._parts) or any(t.device != self._device for t in self._tensors):
            self._specs, self._parts, self._tensors = specs, parts, []  # before there are new ones
            self._tensors = [
                torch.empty(part.numel, dtype=getattr(torch, spec.dtype), device=self._device)
                for spec, part in zip(specs, parts, strict=True)
            ]

    def write(self, tensor: int, start: int, data: torch.Tensor) -> None:
        self._tensors[tensor][start : start + data.numel()].copy_(data.reshape(-1))

    def take(self, read: Read) -> Scans:
        """Write all that `read` gives; its scans."""
        scans: list[Scan] = []
        for number, tensor in enumerate(self._tensors):
            data = torch.empty(tensor.numel(), dtype=tensor.dtype)
            scans += settle([read(number, 0, data)])
            self.write(number, 0, data)
        return Scans.of(scans)

    def take_own(self, read: Read) -> Scans:
        """`take` of what is published now."""
        return self.take(read)

    def finish(self, version: int, scans: Sequence[Scan]) -> None:
        self._digests = [scanned.digest for scanned in scans]
        self.version = version
