"""Deltas straight into live parameters on a GPU: decoded beside them, written through the copy plan, and put back.

A tensor-parallel rank holds slices, and digests are of whole tensors. So each rank knows, from the last update that was
proven, the digest of every region that it holds: that the live weights are still those is checked before, that they
became what they should is checked after. Where it holds all of a tensor, the delta's own digests say the same.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from weightwire.engines.staged_delta import ArrivingDelta
from weightwire.engines.vllm.copy_plan import Plan
from weightwire.engines.vllm.device import (
    Digests,
    Held,
    Region,
    Version,
    parameters_of,
    scanned,
    synchronize,
    table_of,
    totals,
    whole_of,
)
from weightwire.errors import NonFinite, ShapeMismatch, UnsupportedError, VerificationError, VersionError
from weightwire.updates.boxes import Rows, rows_of, strides_of
from weightwire.updates.buckets import Bucket
from weightwire.updates.delta import DELTA_DTYPES, Heads
from weightwire.updates.delta_cuda import Changes, decode_all, parse_all
from weightwire.updates.digest import Digest, Scan
from weightwire.updates.digest_cuda import Table
from weightwire.updates.manifest import Manifest
from weightwire.updates.patch_cuda import Patches, Site, Sites
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
        if plan.computed:
            raise UnsupportedError(
                f"{plan.computed[0].parameters[0]} is computed by the model's loader, and not from a delta",
                next_step="Publish with kind='dense'.",
            )
        if held.version is None:
            raise VersionError(
                "what this worker holds was not proven, and a delta needs to know what it starts from",
                next_step="Publish everything first.",
            )
        self.takes = plan.takes_of(manifest.tensors)
        addresses = [tensor.data_ptr() for tensors in live.values() for tensor in tensors]
        if held.places is None or held.places.plan is not plan or held.places.addresses != addresses:
            held.places = _Places.find(manifest, plan, live, device)
        self._places: _Places = held.places
        self._regions = self._places.regions
        super().__init__(manifest, device)
        self._plan, self._device, self._held, self._before = plan, device, held, held.version
        # What is live is read while bytes are on their way, beside them: on the stream that receives, what arrives
        # would wait for it. The tables come to the device on this thread's stream.
        self._beside = _beside(device)
        if self._beside is not None:
            self._beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._beside):
            self._scanning = scanned(self._places.lines)
        self._patches: Patches | None = None
        self._expected: Digests = np.zeros((0, 2), np.uint64)
        self._after = self._expected
        self.after: Sequence[Digest] = ()

    def write_bucket(self, bucket: Bucket, data: torch.Tensor) -> None:
        starts = {self._begins[piece.tensor] + piece.start - piece.offset for piece in bucket.pieces}
        if len(starts) == 1:  # they lie there as they do in the bucket
            (start,) = starts
            self._arriving()[start : start + bucket.nbytes].copy_(data)
            return
        for piece in bucket.pieces:
            self.write(piece.tensor, piece.start, piece.within(data))

    def places(self, bucket: Bucket) -> list[torch.Tensor]:
        return [piece.of(self._bytes(piece.tensor)) for piece in bucket.pieces]

    def write_parts(self, bucket: Bucket, parts: Sequence[torch.Tensor]) -> None:
        """Each of them has come to its place."""

    def copy_all(self, room: int) -> bool:
        return False  # an engine that is lent the trainer's memory is sent no deltas

    def seal(self, scans: Sequence[Scan]) -> None:
        names = [spec.name for spec in self._specs]
        sizes = np.array(self._encoded, np.int64)
        deltas = parse_all(names, self._arriving(), np.array(self._begins[:-1], np.int64), sizes, scans)
        self._check_bases(deltas.heads)
        if not names:
            return
        _warm_up(self._device)
        changes = decode_all(names, deltas)
        self._memory = None
        self._check_live()
        self._patches = Patches(changes, self._places.sites)
        self._after = deltas.heads["after"]
        self._check_results(totals(self._patches.look(), self._places.sites_of, len(self._regions)))
        self.after = [Digest(*row) for row in self._after.tolist()]
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
        self._held.take(self._plan, Version(self._after, self._expected))
        return {region.copy.parameter: "read back" for region in self._regions}

    def discard(self) -> None:
        if self._beside is not None:
            self._beside.synchronize()  # it reads tables that may go now
        self._memory = None
        self._patches = None

    def _check_bases(self, heads: Heads) -> None:
        if heads["before"].shape != self._before.tensors.shape:
            raise VersionError("what is live are other tensors", next_step="Publish everything.")
        covered = np.stack([heads["start"], heads["numel"], heads["dtype"]], axis=1)
        other = (covered != self._places.covers).any(axis=1)
        for n in np.flatnonzero(other | (heads["before"] != self._before.tensors).any(axis=1)).tolist():
            spec, (start, numel, code) = self._specs[n], covered[n].tolist()
            if other[n]:
                dtype = next(dtype for dtype, number in DELTA_DTYPES.items() if number == code)
                raise ShapeMismatch(
                    f"{spec.name!r}: the delta is of {numel} elements of {dtype} from {start} on, not of"
                    f" {spec.numel} of {spec.dtype}",
                    next_step="Send a delta of this very tensor.",
                )
            raise VersionError(
                f"{spec.name!r}: the delta starts from elements of digest {_hex(heads['before'][n])}, here is"
                f" {_hex(self._before.tensors[n])}",
                next_step="Send the tensor dense, or the delta from what is here.",
            )

    def _check_live(self) -> None:
        """Also has the current stream wait for the tables."""
        if self._beside is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._beside)
        if wrong := self._unlike(self._before.regions, self._scanning):
            raise VersionError(
                f"{len(wrong)} live parameters are not what was committed last: {', '.join(wrong[:5])}",
                next_step="Publish everything.",
            )

    def _check_results(self, found: npt.NDArray[np.uint64]) -> None:
        self._expected = self._before.regions + found[:, :2]
        whole = np.flatnonzero(self._places.whole_of >= 0)
        after = self._after[self._places.whole_of[whole]]
        for n in whole[(self._expected[whole] != after).any(axis=1)].tolist():
            region = self._regions[n]
            raise VerificationError(
                f"{region.spec.name!r}: after the delta its digest is {_hex(self._expected[n])}, it should be"
                f" {_hex(self._after[region.number])}",
                next_step="Send the update again.",
            )
        for n in np.flatnonzero(found[:, 2]).tolist() if self._finite else ():
            raise NonFinite(
                f"NaN or Inf in {self._regions[n].spec.name} ({found[n, 2]} of what changes)",
                next_step="Nothing was changed. Look at the training step, or publish with finite=False.",
            )

    def _unlike(self, digests: Digests, sums: torch.Tensor | None = None) -> list[str]:
        sums = scanned(self._places.lines) if sums is None else sums
        found = totals(sums, self._places.lines_of, len(self._regions))
        return parameters_of(self._regions, (found[:, :2] != digests).any(axis=1))

    def _expect(self, digests: Digests) -> None:
        if wrong := self._unlike(digests):
            raise VerificationError(
                f"{len(wrong)} live parameters were read back and are not what they should be: {', '.join(wrong[:5])}",
                next_step="Publish a complete update.",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Places:
    """The regions of a plan in live parameters, and what each is made of, in memory: lines that are scanned and sites
    that are written. Kept from one delta to the next, as long as the parameters stay where they are."""

    plan: Plan
    addresses: Sequence[int]
    regions: Sequence[Region]
    whole_of: npt.NDArray[np.int64]
    """As in `device.Tables`."""
    covers: npt.NDArray[np.uint64]
    """What a delta of each tensor covers: its first element, how many, and the number of their dtype."""
    lines: Table
    lines_of: Sequence[int]
    sites: Sites
    sites_of: Sequence[int]

    @classmethod
    def find(
        cls, manifest: Manifest, plan: Plan, live: Mapping[str, Sequence[torch.Tensor]], device: torch.device
    ) -> _Places:
        regions = [
            Region(spec, number, copy, tensor, 0, ())
            for number, (spec, copies) in enumerate(zip(manifest.tensors, plan.copies, strict=True))
            for copy in copies
            for tensor in live[copy.parameter]
        ]
        _refuse(regions, plan)
        numbered = [(n, line) for n, r in enumerate(regions) for line in r.lines(r.target, r.copy.strides)]
        lines, lines_of = table_of(numbered, device)
        sites = [(n, site) for n, region in enumerate(regions) for site in _sites(region)]
        covers = [(0, spec.numel, DELTA_DTYPES.get(getattr(torch, spec.dtype), 0)) for spec in manifest.tensors]
        return cls(
            plan=plan, addresses=[tensor.data_ptr() for tensors in live.values() for tensor in tensors],
            regions=regions, whole_of=whole_of(regions), covers=np.array(covers, np.uint64).reshape(-1, 3),
            lines=lines, lines_of=lines_of,
            sites=Sites([site for _, site in sites]), sites_of=[n for n, _ in sites],
        )  # fmt: skip


def _hex(digest: Digests) -> str:
    return Digest(*digest.tolist()).hex()


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
def _beside(device: torch.device) -> torch.cuda.Stream | None:
    """One for all updates: torch keeps memory apart for each stream."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


@functools.cache
def _warm_up(device: torch.device) -> None:
    """Compile what a commit runs, before an engine stands still for it."""
    changes = Changes(
        keys=torch.zeros(1, dtype=torch.int64, device=device), steps=torch.ones(1, dtype=torch.int32, device=device),
        ends=[0, 1], origins=[0],
    )  # fmt: skip
    for dtype in DELTA_DTYPES:
        spare = torch.zeros(1, dtype=dtype, device=device)
        patches = Patches(changes, Sites([Site(0, dtype, Rows(0, 0, 1, 1, 1, 0), spare.data_ptr())]))
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
