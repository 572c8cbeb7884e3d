"""Deltas straight into live parameters on a GPU: decoded beside them, written through the copy plan, and put back.

A tensor-parallel rank holds slices, and digests are of whole tensors. So each rank knows, from the last update that was
proven, the digest of every region that it holds: that the live weights are still those is checked before, that they
became what they should is checked after. Where it holds all of a tensor, the delta's own digests say the same.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch

from weightwire.engines.staged_delta import ArrivingDelta
from weightwire.engines.vllm.copy_plan import Plan
from weightwire.engines.vllm.device import Held, Region, Version, synchronize, table_of, totals
from weightwire.errors import NonFinite, ShapeMismatch, UnsupportedError, VerificationError, VersionError
from weightwire.updates.boxes import Rows, rows_of, strides_of
from weightwire.updates.delta import DELTA_DTYPES, Delta
from weightwire.updates.delta_cuda import Changes, decode_all, parse_all
from weightwire.updates.digest import NO_DIGEST, Digest, Scan, settle
from weightwire.updates.manifest import Manifest
from weightwire.updates.patch_cuda import Patches, Site
from weightwire.updates.receipt import Proof

__all__ = ["DeviceDelta"]


class DeviceDelta(ArrivingDelta):
    """`target.DeltaStaging` on one rank. `live` and `held` are as in `DeviceStaging`; `held` must be of this plan."""

    def __init__(
        self,
        manifest: Manifest,
        plan: Plan,
        live: Mapping[str, Sequence[torch.Tensor]],
        device: torch.device,
        held: Held,
    ) -> None:
        if held.version is None:
            raise VersionError(
                "what this worker holds was not proven, and a delta needs to know what it starts from",
                next_step="Publish everything first.",
            )
        self.takes = plan.takes
        self._regions = [
            Region(spec, number, copy, tensor, 0, ())
            for number, (spec, copies) in enumerate(zip(manifest.tensors, plan.copies, strict=True))
            for copy in copies
            for tensor in live[copy.parameter]
        ]
        _refuse(self._regions, plan)
        super().__init__(manifest, device)
        self._plan, self._device, self._held, self._before = plan, device, held, held.version
        numbered = [(n, line) for n, r in enumerate(self._regions) for line in r.lines(r.target, r.copy.strides)]
        self._lines, self._lines_of = table_of(numbered, device)
        self._patches: Patches | None = None
        self._expected: list[Digest] = []
        self.after: Sequence[Digest] = ()

    def seal(self, scans: Sequence[Scan]) -> None:
        names = [spec.name for spec in self._specs]
        deltas = parse_all(names, self._bytes)
        self._check_bases(deltas)
        if not deltas:
            return
        _warm_up(self._device)
        changes = decode_all(names, deltas)
        self._bytes.clear()
        sites = [(n, site) for n, region in enumerate(self._regions) for site in _sites(region)]
        self._patches = Patches(changes, [site for _, site in sites])
        found = [Scan(NO_DIGEST, 0)] * len(self._regions)
        for (n, _), scan in zip(sites, settle(self._patches.look()), strict=True):
            found[n] += scan
        self._check_results(deltas, found)
        self.after = [delta.after for delta in deltas]
        # The engine's own thread commits, on another stream.
        synchronize(self._device)

    def check(self, seconds: float) -> bool:
        return True

    def commit(self) -> None:
        self._held.take(None, None)
        if self._patches is not None:
            self._patches.write()
        synchronize(self._device)

    def undo(self) -> None:
        self._held.take(None, None)
        if self._patches is not None:
            self._patches.undo()
        self._expect(self._before.regions)
        self._held.take(self._plan, self._before)

    def proof(self) -> dict[str, Proof]:
        self._expect(self._expected)
        self._held.take(self._plan, Version(self.after, self._expected))
        return {region.copy.parameter: "read back" for region in self._regions}

    def discard(self) -> None:
        self._bytes.clear()
        self._patches = None

    def _check_bases(self, deltas: Sequence[Delta]) -> None:
        for spec, delta, held in zip(self._specs, deltas, self._before.tensors, strict=True):
            if (delta.start, delta.numel, str(delta.dtype)) != (0, spec.numel, f"torch.{spec.dtype}"):
                raise ShapeMismatch(
                    f"{spec.name!r}: the delta is of {delta.numel} elements of {delta.dtype} from {delta.start} on, not"
                    f" of {spec.numel} of {spec.dtype}",
                    next_step="Send a delta of this very tensor.",
                )
            if delta.before != held:
                raise VersionError(
                    f"{spec.name!r}: the delta starts from elements of digest {delta.before.hex()}, here is"
                    f" {held.hex()}",
                    next_step="Send the tensor dense, or the delta from what is here.",
                )
        if wrong := self._unlike(self._before.regions):
            raise VersionError(
                f"{len(wrong)} live parameters are not what was committed last: {', '.join(wrong[:5])}",
                next_step="Publish everything.",
            )

    def _check_results(self, deltas: Sequence[Delta], found: Sequence[Scan]) -> None:
        self._expected = [before + more.digest for before, more in zip(self._before.regions, found, strict=True)]
        for region, scan, expected in zip(self._regions, found, self._expected, strict=True):
            name, after = region.spec.name, deltas[region.number].after
            if region.is_whole and expected != after:
                raise VerificationError(
                    f"{name!r}: after the delta its digest is {expected.hex()}, it should be {after.hex()}",
                    next_step="Send the update again.",
                )
            if scan.nonfinite and self._finite:
                raise NonFinite(
                    f"NaN or Inf in {name} ({scan.nonfinite} of what changes)",
                    next_step="Nothing was changed. Look at the training step, or publish with finite=False.",
                )

    def _unlike(self, digests: Sequence[Digest]) -> list[str]:
        found = totals(self._lines, self._lines_of, len(self._regions))
        pairs = zip(self._regions, found, digests, strict=True)
        return sorted({region.copy.parameter for region, scan, digest in pairs if scan.digest != digest})

    def _expect(self, digests: Sequence[Digest]) -> None:
        if wrong := self._unlike(digests):
            raise VerificationError(
                f"{len(wrong)} live parameters were read back and are not what they should be: {', '.join(wrong[:5])}",
                next_step="Publish a complete update.",
            )


def _refuse(regions: Sequence[Region], plan: Plan) -> None:
    for spec, live, parameter in ((r.spec, r.live, r.copy.parameter) for r in regions):
        if live.dtype not in DELTA_DTYPES or live.dtype != getattr(torch, spec.dtype):
            raise UnsupportedError(
                f"{parameter} is {live.dtype} and {spec.name} is {spec.dtype}; a delta needs both alike, of"
                f" {', '.join(map(str, DELTA_DTYPES))}",
                next_step="Publish with kind='dense'.",
            )
        if plan.covered[parameter] > live.numel():
            raise UnsupportedError(
                f"several tensors are one in {parameter}, and only one delta could be written there",
                next_step="Tie them in the trainer, or publish with kind='dense'.",
            )


@functools.cache
def _warm_up(device: torch.device) -> None:
    """Compile what a commit runs, before an engine stands still for it."""
    changes = Changes(
        keys=torch.zeros(1, dtype=torch.int64, device=device), steps=torch.ones(1, dtype=torch.int32, device=device),
        ends=[0, 1], origins=[0],
    )  # fmt: skip
    for dtype in DELTA_DTYPES:
        spare = torch.zeros(1, dtype=dtype, device=device)
        patches = Patches(changes, [Site(0, dtype, Rows(0, 0, 1, 1, 1, 0), spare.data_ptr())])
        patches.look()
        patches.write()
        patches.undo()


def _sites(region: Region) -> list[Site]:
    strides = strides_of(region.spec.shape)
    start = sum(at * stride for at, stride in zip(region.copy.source.start, strides, strict=True))
    rows = rows_of(region.copy.source.shape, strides, region.copy.strides)
    return [
        Site(region.number, region.live.dtype, part._replace(first=start + part.first), region.target) for part in rows
    ]
