"""What a trainer published last, kept on the GPU that its parameters are on: compared and encoded there.

The comparison reads the parameters themselves and the copy of them, once each; only the deltas leave the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from weightwire.baseline import Baseline, Look, Read
from weightwire.errors import NonFinite, UnsupportedError, VerificationError
from weightwire.sources.base import Source, SpreadSource
from weightwire.updates.boxes import Part
from weightwire.updates.delta import Delta
from weightwire.updates.digest import Scan, Scans, scan_boxes_any, settle
from weightwire.updates.manifest import TensorSpec

if TYPE_CHECKING:
    from weightwire.updates.delta_cuda import Compared, Pairs  # needs Triton
    from weightwire.updates.patch_cuda import Sites

__all__ = ["DeviceBaseline"]

# Elements that are compared together, by a bit each: beyond the copy encoding takes 1 GB for these, and 2 GB for the
# changes that are encoded together (`delta_cuda.CHANGES`); more only where one tensor has more than so many.
_ELEMENTS = 1 << 33
_SAMPLE = 1024  # elements of each tensor
_SPARSE = 0.1  # where less has changed, all is compared the next time, and no sample taken before


@dataclass(frozen=True, slots=True)
class _Look(Look):
    """And what all tensors are beside what is kept of them, if that was looked at."""

    compared: Compared | None = None


class DeviceBaseline(Baseline):
    """`Baseline` of a source whose tensors, or this rank's parts of them, are each one piece on one GPU, and runs of
    the whole; else it raises `UnsupportedError`, by name."""

    reads_along = False

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source
        self._written = False
        self._sites: tuple[tuple[int, int], Sites] | None = None
        self._paired: tuple[object, list[Pairs]] | None = None  # where the tensors were, and what was made of that
        self._arriving: Sequence[torch.cuda.Event] = ()
        self._sparse = False  # whether little had changed the last time
        if source.ranks is None:  # else it is known only once the ranks have agreed on what there is
            self._device = next(iter(self._current().values())).device

    def look(self, read: Read) -> _Look:
        from weightwire.updates.delta_cuda import compare_all, density  # needs Triton

        if self._sparse and len(self._batches) == 1:
            # Most likely it is again, and what is compared now is encoded next.
            (pairs,) = self._pairs()
            compared = compare_all(pairs)
            look = _Look(compared.density, compared)
        else:
            look = _Look(density(self._tensors, self._news(), sample=_SAMPLE))
        self._sparse = look.density < _SPARSE
        return look

    def encode(self, read: Read, look: Look | None = None, *, finite: bool) -> list[Delta]:
        from weightwire.updates.delta_cuda import compare_all, encode_compared

        seen = look.compared if isinstance(look, _Look) else None
        deltas: list[Delta] = []
        for (first, last), compared in zip(
            self._batches, map(compare_all, self._pairs()) if seen is None else [seen], strict=True
        ):
            self.wait()
            made = encode_compared(compared)
            self._arriving = made.arriving
            names = [spec.name for spec in self._specs[first:last]]
            for number, (name, delta, nonfinite) in enumerate(
                zip(names, made.deltas, made.nonfinite, strict=True), first
            ):
                if finite and nonfinite:
                    raise NonFinite(
                        f"NaN or Inf in {name} ({nonfinite} of {delta.numel})",
                        phase="stage",
                        next_step="Nothing was changed. Look at the training step, or publish with finite=False.",
                    )
                if delta.before != self._digests[number]:
                    raise VerificationError(
                        f"{name}: what was published last is no longer what is kept of it",
                        phase="stage",
                        next_step="Publish with kind='dense'.",
                    )
                deltas.append(delta)
        return deltas

    @property
    def _batches(self) -> list[tuple[int, int]]:
        from weightwire.updates.delta_cuda import batches

        return [*batches([base.numel() for base in self._tensors], _ELEMENTS)]

    def _pairs(self) -> list[Pairs]:
        """Of each batch the tensors beside what is kept of them. They are mostly where they were; meanwhile none of
        them is held."""
        from weightwire.updates.delta_cuda import pair_up

        now = self._own()
        where = [(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device) for tensor in now]
        if self._paired is None or self._paired[0] != where:
            news, pairs = self._news(), []
            for first, last in self._batches:
                names = [spec.name for spec in self._specs[first:last]]
                starts = [part.start for part in self._parts[first:last]]
                pairs.append(pair_up(names, self._tensors[first:last], news[first:last], starts=starts))
            self._paired = where, pairs
        found = self._paired[1]
        if any(each.of_copies for each in found):
            self._paired = None
        return found

    def _own(self) -> list[torch.Tensor]:
        if self._source.ranks is not None:
            return [*cast(SpreadSource, self._source).own().values()]
        whole = getattr(self._source, "whole", None)
        return [*((whole() if whole else None) or ())]

    def wait(self) -> None:
        arriving, self._arriving = self._arriving, ()
        for event in arriving:
            event.synchronize()

    def advance(self, version: int, deltas: Sequence[Delta]) -> None:
        from weightwire.updates.delta_cuda import CHANGES, batches, decode_all, together
        from weightwire.updates.patch_cuda import Patches, Sites

        self.wait()
        start, self.version = self.version, None
        for first, last in batches([delta.count for delta in deltas], CHANGES):
            here = together(deltas[first:last], self._device)
            changes = decode_all([spec.name for spec in self._specs[first:last]], here)
            # Of one batch, as mostly, they are the same each time.
            if self._sites is None or self._sites[0] != (first, last):
                self._sites = ((first, last), Sites.of_whole(self._tensors[first:last]))
            patches = Patches(changes, self._sites[1])
            patches.look()
            patches.write()
        self._digests = [delta.after for delta in deltas]
        self.version = version
        if start is not None and not self._spread:
            # In the pinned memory that they were made in. To copy it would take longer than all the rest, and the next
            # deltas take what the oldest leave.
            self.chain.add(start, deltas)

    def start(self, specs: tuple[TensorSpec, ...], parts: tuple[Part, ...] = ()) -> None:
        self.version, self._written = None, False
        self._sites = self._paired = None
        if odd := next((spec.name for spec, part in zip(specs, parts, strict=bool(parts)) if not part.is_run), None):
            raise _unsupported(f"{odd} is cut along an inner dimension", "Take baseline='host'.")
        self._device = next(iter(self._current().values())).device
        super().start(specs, parts)

    def write(self, tensor: int, start: int, data: torch.Tensor) -> None:
        super().write(tensor, start, data)
        self._written = True

    def take_own(self, read: Read) -> Scans:
        self._copy()
        self._written = True
        return self._scan()

    def finish(self, version: int, scans: Sequence[Scan]) -> None:
        """What nobody has written is as the parameters are."""
        if not self._written:
            self._copy()
        self._digests = [scanned.digest for scanned in scans]
        # Weights that changed while they were published are no base for a delta.
        self.version = version if [scanned.digest for scanned in self._scan()] == self._digests else None

    def _copy(self) -> None:
        for base, new in zip(self._tensors, self._news(), strict=True):
            base.copy_(new)

    def _scan(self) -> Scans:
        parts = zip(self._tensors, self._parts, strict=True)
        return settle(scan_boxes_any([(base.view(part.box.shape), part.box, part.shape) for base, part in parts]))

    def _current(self) -> dict[str, torch.Tensor]:
        if self._source.ranks is not None:
            named = {name: tensor.detach() for name, tensor in cast(SpreadSource, self._source).own().items()}
        else:
            specs, tensors = self._source.metadata(), self._own()
            named = {spec.name: tensor.detach() for spec, tensor in zip(specs, tensors, strict=bool(tensors))}
        if not named:
            raise _unsupported(
                f"{type(self._source).__name__} does not have its tensors whole on a GPU", "Take baseline='host'."
            )
        device = next(iter(named.values())).device
        for name, tensor in named.items():
            if tensor.device.type not in _DEVICES or tensor.device != device or not tensor.is_contiguous():
                raise _unsupported(
                    f"{name} is on {tensor.device} with strides {tensor.stride()}",
                    "All tensors must be contiguous on one GPU; else take baseline='host'.",
                )
        return named

    def _news(self) -> list[torch.Tensor]:
        named = self._current()
        return [named[spec.name].view(-1) for spec in self._specs]


_DEVICES = {"cuda"}


def _unsupported(why: str, next_step: str) -> UnsupportedError:
    return UnsupportedError(f"baseline='device': {why}", next_step=next_step)
