"""The port between a worker's receiver and its model: how an update is laid out, staged, made live and read back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from weightwire.revisions import Revision
from weightwire.updates.boxes import Box
from weightwire.updates.buckets import Bucket
from weightwire.updates.digest import Digest, Scan
from weightwire.updates.manifest import Manifest
from weightwire.updates.receipt import Proof

__all__ = [
    "AdapterStaging",
    "Computes",
    "DeltaStaging",
    "Encoded",
    "HasPlaces",
    "Queues",
    "Staging",
    "TakesBuckets",
    "Target",
    "computed_by",
]


class Staging(Protocol):
    """One update's staged copy, made by a `Target`. Live weights change in `commit` and nowhere else."""

    nbytes: int
    """Bytes of host or device memory the staged copy needs on this rank."""

    @property
    def takes(self) -> Sequence[Sequence[Box]] | None:
        """Which parts of each tensor go anywhere on this rank, in manifest order; None when all of each does."""

    def write(self, tensor: int, start: int, data: torch.Tensor) -> Scan | None:
        """Take elements `start ..` (row-major) of tensor number `tensor` of the manifest: 1-D, the manifest's dtype.
        `data` is only lent; it is overwritten after the call. Gives their scan, if it came with the copying."""

    def lend(self, tensor: int, data: torch.Tensor) -> None:
        """Take a whole tensor, in memory that stays as it is until `discard`; it need not be copied."""

    def seal(self, scans: Sequence[Scan]) -> None:
        """Everything has arrived and is what was sent, with these scans, one a tensor: make ready all that `commit`
        needs."""

    def check(self, seconds: float) -> bool:
        """Do, for about `seconds`, what of making ready only the engine's own thread may do; True when nothing is left
        of it. Called there, between two model steps, while buckets arrive and after `seal`."""

    def commit(self) -> None:
        """Make it live. Called on the engine's own thread, between two model steps, with generation paused. It may only
        be queued on a GPU, in front of whatever the engine does next (`Queues`)."""

    def proof(self) -> dict[str, Proof]:
        """After `commit`: each live parameter bound, and how it was shown to be right (`updates.receipt.Proof`).
        Raises when what is live is not what was staged."""

    def discard(self) -> None:
        """Let go of the staged memory."""


@runtime_checkable
class TakesBuckets(Protocol):
    """A `Staging` where one launch or call for a bucket is much cheaper than one for each of its pieces."""

    def write_bucket(self, bucket: Bucket, data: torch.Tensor) -> Sequence[Scan] | None:
        """`Staging.write` of each of its pieces. `data`: the whole bucket, uint8. Gives their scans, if these came with
        the copying."""

    def copy_all(self, room: int) -> bool:
        """Stage a copy of what is lent too, if that needs no more than `room` bytes: its memory is another GPU's, and
        the engine stands still while it is read at commit. Whether it will be staged, or goes to live weights at
        once."""


@runtime_checkable
class HasPlaces(Protocol):
    """A `Staging` on a GPU, in which pieces can arrive where they are to stay, so that nothing has to copy them."""

    def places(self, bucket: Bucket) -> Sequence[torch.Tensor | None]:
        """Memory for all of each of its pieces, 1-D, of its tensor's dtype; None where it has to be taken apart."""

    def write_parts(self, bucket: Bucket, parts: Sequence[torch.Tensor]) -> None:
        """`Staging.write` of each piece of a bucket, of which these are the elements; those that have a place are
        there."""


@runtime_checkable
class Queues(Protocol):
    """A `Staging` whose `commit` does not wait for the GPU: while weights are copied, the engine can make the next step
    ready."""

    def finish(self) -> bool:
        """Wait until what `commit` has queued is done; whether it had."""


@runtime_checkable
class Computes(Protocol):
    """A `Staging` of which some parameters are not what was sent."""

    computed: Sequence[str]
    """Those that the model's own loader makes of what was sent, by more than slicing, casting and copying."""


class AdapterStaging(Staging, Protocol):
    """A LoRA adapter's staged copy. With `check` it enters the engine, beside the revisions being served and unknown to
    requests; `commit` has nothing left to do but to keep it, and `discard` forgets it only if it was not committed."""

    def held(self) -> str:
        """After `commit`: a digest of what this rank's modules hold of it."""


@runtime_checkable
class Encoded(Protocol):
    """A `Staging` to which encoded deltas are sent."""

    after: Sequence[Digest]
    """Of each tensor as it will be, in manifest order; known from `seal` on."""


class DeltaStaging(Staging, Encoded, Protocol):
    """A delta's staged copy: its encoded bytes, and from `seal` on what to write where."""

    def undo(self) -> None:
        """Put back, bit for bit, what `commit` has changed, however far it came. Raises when that cannot be shown."""


def computed_by(staging: Staging) -> Sequence[str]:
    """`Computes.computed`, or none."""
    return staging.computed if isinstance(staging, Computes) else ()


class Target(Protocol):
    """A worker's model, as the receiver sees it."""

    @property
    def adapter_dtype(self) -> str | None:
        """The dtype to which it casts LoRA adapters (`updates.manifest.TensorSpec.dtype`); None: it takes them as they
        are, or not at all."""

    def prepare(self, manifest: Manifest) -> Staging:
        """Check names, shapes and dtypes against the model and lay the update out. Must not change the model.
        Raises `UnknownTensor`, `MissingTensor`, `ShapeMismatch` or `UnsupportedError`."""

    def prepare_adapter(self, manifest: Manifest, revision: Revision) -> AdapterStaging:
        """The same for a LoRA adapter. Also raises `UnsupportedError` when the engine takes none."""

    def prepare_adapter_delta(self, manifest: Manifest, revision: Revision, base: Revision) -> AdapterStaging:
        """The same for what has changed of one since `base`, which is held here; it is `Encoded`, too. Also raises
        `VersionError` when that cannot be read."""

    def prepare_delta(self, manifest: Manifest) -> DeltaStaging:
        """The same for a delta. Also raises `UnsupportedError` where live weights cannot be patched."""

    def drop(self, revision: Revision) -> None:
        """Forget a revision, which no request has in use any more. Called on the engine's own thread."""

    def room(self) -> int:
        """Bytes that a staged copy may take on this rank now."""
