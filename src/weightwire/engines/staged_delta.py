"""A delta's staged copy for live weights that are plain tensors on the CPU: patched in place, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch

from weightwire.errors import NonFinite, UnsupportedError, VerificationError
from weightwire.target import Staging
from weightwire.updates.buckets import ALIGNMENT
from weightwire.updates.delta import Delta, Patch, decode, parse
from weightwire.updates.digest import Digest, Scan, scan
from weightwire.updates.manifest import Manifest
from weightwire.updates.receipt import Proof
from weightwire.updates.tiles import ends_of

__all__ = ["ArrivingDelta", "StagedDelta", "refuse_split_ties"]

_PATCH = 12  # decoded, a change takes some ten times its encoded bytes


class ArrivingDelta:
    """A delta's encoded bytes as they come in, a tensor at a time. `nbytes` is what they take decoded."""

    def __init__(self, manifest: Manifest, device: torch.device | None = None) -> None:
        self._specs = manifest.tensors
        self._finite = manifest.finite
        self._encoded = manifest.encoded
        self._memory_on = device
        self._memory: torch.Tensor | None = None
        # Each begins where it does in a bucket.
        self._begins: list[int] = ends_of(np.array(manifest.encoded, np.int64), ALIGNMENT).tolist()
        self.nbytes = _PATCH * sum(manifest.encoded)

    def _arriving(self) -> torch.Tensor:
        """Memory for all of it. Made on the thread that receives, whose stream writes there: memory that the engine's
        has had may still be in use by what is queued on it."""
        if self._memory is None:
            self._memory = torch.empty(self._begins[-1], dtype=torch.uint8, device=self._memory_on)
        return self._memory

    def _bytes(self, tensor: int) -> torch.Tensor:
        begin = self._begins[tensor]
        return self._arriving()[begin : begin + self._encoded[tensor]]

    def write(self, tensor: int, start: int, data: torch.Tensor) -> None:
        self._bytes(tensor)[start : start + data.numel()].copy_(data)

    def lend(self, tensor: int, data: torch.Tensor) -> None:
        self.write(tensor, 0, data.reshape(-1))

    def _parse(self, tensor: int) -> Delta:
        name = self._specs[tensor].name
        delta = parse(name, self._bytes(tensor))
        if delta.start:
            raise VerificationError(f"{name!r}: its delta is of the elements from {delta.start} on, not of all")
        return delta

    def _decode(self, name: str, delta: Delta, base: torch.Tensor) -> Patch:
        patch = decode(name, delta, base)
        if patch.nonfinite and self._finite:
            raise NonFinite(
                f"NaN or Inf in {name} ({patch.nonfinite} of what changes)",
                next_step="Nothing was changed. Look at the training step, or publish with finite=False.",
            )
        return patch

    def _rebuild(self, bases: Sequence[torch.Tensor], inner: Staging) -> Iterator[tuple[Delta, Patch, Scan]]:
        """Write what it leads to from `bases` (1-D, of all tensors) into `inner`, whole, one tensor after the other."""
        for number, (spec, base) in enumerate(zip(self._specs, bases, strict=True)):
            delta = self._parse(number)
            patch = self._decode(spec.name, delta, base)
            new = base.clone()
            patch.apply(new)
            written = inner.write(number, 0, new)
            yield delta, patch, scan(new) if written is None else written


class StagedDelta(ArrivingDelta):
    """`target.DeltaStaging`. `places`: for each tensor of the manifest, the live tensors that hold it, by name.

    All is decoded and its result verified in `seal`, from live weights that are only read there.
    """

    takes = None

    def __init__(self, manifest: Manifest, places: Sequence[Mapping[str, torch.Tensor]]) -> None:
        for spec, taking in zip(manifest.tensors, places, strict=True):
            for name, live in taking.items():
                if live.dtype != getattr(torch, spec.dtype) or live.device.type != "cpu" or not live.is_contiguous():
                    raise UnsupportedError(
                        f"{name} is {live.dtype} on {live.device} with strides {live.stride()}, and a delta needs it as"
                        f" contiguous {spec.dtype} on the CPU",
                        next_step="Publish with kind='dense'.",
                    )
        super().__init__(manifest)
        self._places = places
        self._patches: list[tuple[str, torch.Tensor, Patch, Delta]] = []
        self.after: Sequence[Digest] = ()

    def seal(self, scans: Sequence[Scan]) -> None:
        after: list[Digest] = []
        for number, taking in enumerate(self._places):
            delta = self._parse(number)
            for own, live in taking.items():
                self._patches.append((own, live, self._decode(own, delta, live), delta))
            after.append(delta.after)
        self.after = after
        self._memory = None
        refuse_split_ties(
            (live.data_ptr(), name, delta.after) for name, live, _, delta in self._patches if live.numel()
        )

    def check(self, seconds: float) -> bool:
        return True

    def commit(self) -> None:
        for _, live, patch, _ in self._patches:
            patch.apply(live)

    def undo(self) -> None:
        for _, live, patch, _ in self._patches:
            patch.undo(live)
        for name, live, _, delta in self._patches:
            _expect(name, live, delta.before)

    def proof(self) -> dict[str, Proof]:
        for name, live, _, delta in self._patches:
            _expect(name, live, delta.after)
        return {name: "read back" for name, *_ in self._patches}

    def discard(self) -> None:
        self._memory = None
        self._patches.clear()


def refuse_split_ties(held: Iterable[tuple[object, str, object]]) -> None:
    """Of live tensors, where each is, its name, and what it is to hold: raise if one is to hold two things."""
    first: dict[object, tuple[str, object]] = {}
    for place, name, content in held:
        other, expected = first.setdefault(place, (name, content))
        if content != expected:
            raise VerificationError(
                f"{other} and {name} are one tensor here, and two different ones were sent",
                next_step="Nothing was changed. Tie them in the trainer, or untie them in the engine.",
            )


def _expect(name: str, live: torch.Tensor, digest: Digest) -> None:
    if scan(live).digest != digest:
        raise VerificationError(f"{name} was read back from the live model and is not what it should be")
