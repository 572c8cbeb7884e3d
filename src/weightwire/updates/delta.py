"""A delta: exactly what changed in one tensor, or in a run of its elements, as a few bytes.

Between two optimiser steps about one bf16 element in a hundred changes, most by one unit in the last place. A delta
holds the places as Rice-coded gaps and the changes as steps in the order of all bit patterns, so that a sign, a NaN's
payload and both zeros are exact; blocks of a fixed number of elements can be decoded each by itself. It carries the
digest of the elements it starts from and of those it leads to, and one of its own bytes. `docs/delta-format.md` is the
specification.

Decoding only computes: nothing is written before all of it has been read and its result has the right digest.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from weightwire.errors import ShapeMismatch, UsageError, VerificationError, VersionError
from weightwire.updates import rice
from weightwire.updates.boxes import Part
from weightwire.updates.digest import NO_DIGEST, Digest, Scan, scan, scan_box, scan_parts, scan_places

__all__ = [
    "DELTA_DTYPES",
    "HEAD",
    "Delta",
    "Heads",
    "Patch",
    "compose",
    "decode",
    "encode",
    "estimate",
    "heads_of",
    "join",
    "parse",
    "scans_of",
    "steps_of",
]

DELTA_DTYPES: Mapping[torch.dtype, int] = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
"""The dtypes that a delta may have, with their numbers in its header."""

_DTYPES = {number: dtype for dtype, number in DELTA_DTYPES.items()}
_WIDTHS = np.array([8 * _DTYPES[code].itemsize if code in _DTYPES else 0 for code in range(256)])
"""The bits of an element, by the number of its dtype; 0 of none."""
_BITS = {2: (np.uint16, torch.int16), 4: (np.uint32, torch.int32)}
_HEADER = struct.Struct("<4sBBBBB7sQQQQ4Q")
_TRAILER = struct.Struct("<2Q")
HEAD_BYTES, SEAL_BYTES = _HEADER.size, _TRAILER.size
HEAD = np.dtype([
    ("magic", "S4"), ("format", "u1"), ("dtype", "u1"), ("block_bits", "u1"), ("unit_bits", "u1"), ("entry", "u1"),
    ("zeros", "u1", 7), ("nbytes", "<u8"), ("start", "<u8"), ("numel", "<u8"), ("count", "<u8"), ("before", "<u8", 2),
    ("after", "<u8", 2),
])  # fmt: skip
"""The header again, for many at once."""
Heads = np.ndarray[Any, np.dtype[np.void]]
"""Rows of `HEAD`."""
_MAGIC, _FORMAT = b"WWDL", 1
_MAX_ELEMENTS = 1 << 48
_CHANGES = 256  # at least so many in a block on average: the table and what a last word leaves empty stay near 1 %
_MIN_BLOCK, _MAX_BLOCK = 8, 24  # as powers of two
_RESEND = "Send the update again."

Array = npt.NDArray[np.int64]


class Delta(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """An encoded delta whose bytes are unharmed: its header's facts, and `data`, all its bytes (uint8, 1-D).

    It covers `numel` elements of a tensor from row-major index `start` on, of which `count` change. `before` and
    `after` are their digests.
    """

    dtype: torch.dtype
    start: int
    numel: int
    count: int
    before: Digest
    after: Digest
    block_bits: int
    unit_bits: int
    entry: int
    data: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    @property
    def density(self) -> float:
        """The share of elements that change."""
        return self.count / self.numel if self.numel else 0.0

    @property
    def blocks(self) -> int:
        return int(blocks_of(self.numel, self.count, self.block_bits))

    def head(self) -> bytes:
        """The header that says so."""
        return _HEADER.pack(
            _MAGIC, _FORMAT, DELTA_DTYPES[self.dtype], self.block_bits, self.unit_bits, self.entry, bytes(7),
            self.nbytes, self.start, self.numel, self.count, *self.before, *self.after,
        )  # fmt: skip

    def seal(self, digest: Digest) -> None:
        """Write the last bytes of `data`, which is on the CPU: the digest of all before them."""
        self.data[-SEAL_BYTES:] = torch.frombuffer(bytearray(_TRAILER.pack(*digest)), dtype=torch.uint8)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Patch:
    """What a delta does to one tensor: at `indices` (int64, ascending, from the delta's start on) stands `old` and
    comes `new` (both of the tensor's dtype). `nonfinite` counts NaN and Inf among `new`.
    """

    indices: torch.Tensor
    old: torch.Tensor
    new: torch.Tensor
    nonfinite: int

    def apply(self, elements: torch.Tensor) -> None:
        """Write the new values into contiguous `elements`, in place."""
        _flat(elements)[self.indices] = self.new.view(_BITS[self.new.element_size()][1])

    def undo(self, elements: torch.Tensor) -> None:
        """Put the old values back, bit for bit, whatever part of `apply` had been done."""
        _flat(elements)[self.indices] = self.old.view(_BITS[self.old.element_size()][1])


def encode(
    name: str,
    base: torch.Tensor,
    new: torch.Tensor,
    *,
    start: int = 0,
    part: Part | None = None,
    before: Digest | None = None,
) -> Delta:
    """The delta from `base` to `new`: contiguous on the CPU, of one shape and one of the dtypes of `DELTA_DTYPES`.

    `start`: the row-major index of their first element, where they are a run of the tensor `name`; `part` instead says
    which part of it they are, run or not. `before`: the digest of `base` where it is known; else it is computed. Raises
    `UsageError`.

    >>> base = torch.tensor([1.0, 2.0, -3.0, float("inf")], dtype=torch.bfloat16)
    >>> new = torch.tensor([1.0, 2.015625, -0.0, float("inf")], dtype=torch.bfloat16)
    >>> delta = encode("w", base, new)
    >>> delta.count, delta.before == scan(base).digest, delta.after == scan(new).digest
    (2, True, True)
    """
    if base.dtype != new.dtype or base.shape != new.shape or base.dtype not in DELTA_DTYPES:
        raise UsageError(
            f"{name!r}: no delta from {base.dtype} of {tuple(base.shape)} to {new.dtype} of {tuple(new.shape)}",
            next_step=f"Both must be alike, of {', '.join(str(dtype) for dtype in DELTA_DTYPES)}.",
        )
    places, olds, news = rice.find(_aligned(_bits_of(base)), _aligned(_bits_of(new)))
    steps = np.empty(places.size, np.int64)
    rice.subtract(olds, news, 8 * base.element_size(), steps)
    start = part.start if part else start
    first = _digest(base, start, part) if before is None else before
    last = first + _change(base.dtype, places, olds, news, start, part)[0]
    return _assemble(base.dtype, start, base.numel(), places, steps, first, last)


def scans_of(deltas: Sequence[Delta]) -> list[Scan]:
    """What `digest.scan` gives of each delta's bytes, which are on the CPU. All but the last are known by the digest
    that they end with, so none of the others is read.

    >>> delta = encode("w", torch.zeros(500), torch.ones(500))
    >>> scans_of([delta]) == [scan(delta.data)]
    True
    """
    ends = scan_parts([(delta.data, delta.nbytes - SEAL_BYTES, SEAL_BYTES) for delta in deltas])
    seals = [Digest(*_TRAILER.unpack(delta.data[-SEAL_BYTES:].numpy().tobytes())) for delta in deltas]
    return [Scan(seal + end.digest, 0) for seal, end in zip(seals, ends, strict=True)]


def parse(name: str, data: torch.Tensor | bytes) -> Delta:
    """The delta of `name` in `data` (bytes, or uint8 in one dimension on the CPU), once its bytes have proved unharmed.

    Raises `VerificationError` for what is no delta, is cut, too long or changed in any byte.
    """
    raw = (
        data if isinstance(data, torch.Tensor) else torch.frombuffer(bytearray(data) or bytearray(1), dtype=torch.uint8)
    )
    raw = raw[: len(data)]
    if raw.dtype != torch.uint8 or raw.dim() != 1 or raw.device.type != "cpu":
        raise UsageError(
            f"{name!r}: a delta is uint8 in one dimension on the CPU, not {raw.dtype} of {tuple(raw.shape)}"
        )
    raw = raw.contiguous()
    intact = raw[-SEAL_BYTES:].numpy().tobytes() == _TRAILER.pack(*scan(raw[:-SEAL_BYTES]).digest)
    code, block_bits, unit_bits, entry, start, numel, count, *digests = _facts(
        name, raw.numel(), raw[:HEAD_BYTES].numpy().tobytes(), intact
    )
    return Delta(
        dtype=_DTYPES[code], start=start, numel=numel, count=count, before=Digest(*digests[:2]),
        after=Digest(*digests[2:]), block_bits=block_bits, unit_bits=unit_bits, entry=entry, data=raw,
    )  # fmt: skip


def _facts(name: str, size: int, head: bytes, intact: bool) -> list[int]:
    """What a header says, in its order and without what is the same in all, once it holds for a delta of so many
    bytes; `intact`: whether its last ones are the digest of all but them. Raises like `parse`."""
    least = HEAD_BYTES + SEAL_BYTES
    if size < least:
        raise harmed(name, f"it has {size} bytes, fewer than the {least} of the shortest")
    magic, number, code, block_bits, unit_bits, entry, zeros, nbytes, start, numel, count, *digests = _HEADER.unpack(
        head
    )
    if magic != _MAGIC:
        raise harmed(name, f"it begins with {magic!r}, not with {_MAGIC!r}")
    if number != _FORMAT:
        raise harmed(name, f"its format is {number}, this side reads {_FORMAT}")
    if nbytes != size:
        raise harmed(name, f"it has {size} bytes, its header says {nbytes}")
    if not intact:
        raise harmed(name, "its bytes are not those that were written")
    if code not in _DTYPES or not _MIN_BLOCK <= block_bits <= _MAX_BLOCK or entry not in (4, 8) or any(zeros):
        raise harmed(name, f"its header has dtype {code}, block bits {block_bits}, entry {entry}, zeros {zeros.hex()}")
    if unit_bits >= 8 * _DTYPES[code].itemsize or not count <= numel <= _MAX_ELEMENTS or start > _MAX_ELEMENTS - numel:
        raise harmed(name, f"its header has {count} changes of {numel} elements from {start} on, unit bits {unit_bits}")
    if nbytes % 4:
        raise harmed(name, f"its {nbytes} bytes are no whole number of words")
    if blocks_of(numel, count, block_bits) * entry > nbytes - least:
        raise harmed(name, f"a table of its blocks does not fit into its {nbytes} bytes")
    return [code, block_bits, unit_bits, entry, start, numel, count, *digests]


def heads_of(names: Sequence[str], heads: npt.NDArray[np.uint8], sizes: Array, intact: npt.NDArray[np.bool_]) -> Heads:
    """The headers of many deltas by their first bytes (a row each), once `parse` would take them all: of `sizes` bytes,
    and `intact` if their last ones are the digest of all but them. Raises like `parse`, of the first that is harmed.

    >>> delta = encode("w", torch.zeros(500), torch.ones(500))
    >>> heads = heads_of(["w"], delta.data[:HEAD_BYTES].numpy()[None], np.array([delta.nbytes]), np.array([True]))
    >>> heads["count"].tolist(), heads["after"].tolist() == [list(delta.after)]
    ([500], True)
    """
    rows: Heads = np.ascontiguousarray(heads).view(HEAD)[:, 0]
    numel, count, start, entry = rows["numel"], rows["count"], rows["start"], rows["entry"]
    with np.errstate(over="ignore"):
        fine = (
            intact & (rows["magic"] == _MAGIC) & (rows["format"] == _FORMAT) & (sizes >= HEAD_BYTES + SEAL_BYTES)
            & (rows["nbytes"] == sizes) & (sizes % 4 == 0) & (rows["unit_bits"] < _WIDTHS[rows["dtype"]])
            & (rows["block_bits"] >= _MIN_BLOCK) & (rows["block_bits"] <= _MAX_BLOCK) & ((entry == 4) | (entry == 8))
            & ~rows["zeros"].any(axis=1) & (numel <= _MAX_ELEMENTS) & (count <= numel)
            & (start <= _MAX_ELEMENTS - numel)
        )  # fmt: skip
    blocks = blocks_of(np.where(fine, numel, 0).astype(np.int64), count, rows["block_bits"].astype(np.int64))
    fine &= blocks * entry <= sizes - HEAD_BYTES - SEAL_BYTES
    for n in np.flatnonzero(~fine).tolist():
        _facts(names[n], int(sizes[n]), rows[n].tobytes(), bool(intact[n]))  # which says what is wrong
    return rows


def heads_with(dtypes: Sequence[torch.dtype], **facts: Any) -> Heads:
    """A header for each of many deltas, with these facts of each.

    >>> heads_with([torch.float16], numel=np.array([3]))[["dtype", "numel"]].tolist()
    [(2, 3)]
    """
    rows: Heads = np.zeros(len(dtypes), HEAD)
    rows["magic"], rows["format"], rows["dtype"] = _MAGIC, _FORMAT, [DELTA_DTYPES[dtype] for dtype in dtypes]
    for name, fact in facts.items():
        rows[name] = fact
    return rows


def widths_of(heads: Heads) -> Array:
    """The bits of an element of each."""
    widths: Array = _WIDTHS[heads["dtype"]]
    return widths


def blocks_of(numel: Any, count: Any, block_bits: Any) -> Any:
    """How many blocks a delta has, or each of many.

    >>> blocks_of(np.array([300, 300]), np.array([1, 0]), np.array([8, 8])).tolist()
    [2, 0]
    """
    return (count > 0) * -(-numel >> block_bits)


def decode(
    name: str, delta: Delta, base: torch.Tensor, *, part: Part | None = None, before: Digest | None = None
) -> Patch:
    """What `delta` does to `base`, contiguous on the CPU and left as it is; the result's digest has been checked.

    `part`: as for `encode`, where it is no run. `before`: the digest of `base` where it is known for sure; else it is
    computed.

    Raises `ShapeMismatch`; `VersionError` where `base` is not what the delta starts from; `VerificationError`.

    >>> base, new = torch.zeros(5), torch.tensor([0, 1, 0, -0.0, float("nan")])
    >>> patch = decode("w", encode("w", base, new), base)
    >>> patch.indices.tolist(), patch.new.tolist(), patch.nonfinite
    ([1, 3, 4], [1.0, -0.0, nan], 1)
    >>> patch.apply(base)
    >>> base.tolist()
    [0.0, 1.0, 0.0, -0.0, nan]
    """
    if (base.dtype, base.numel()) != (delta.dtype, delta.numel):
        raise ShapeMismatch(
            f"{name!r}: the delta is of {delta.numel} elements of {delta.dtype}, not {base.numel()} of {base.dtype}",
            next_step="Send a delta of this very tensor.",
        )
    here = _digest(base, delta.start, part) if before is None else before
    if here != delta.before:
        raise VersionError(
            f"{name!r}: the delta starts from elements of digest {delta.before.hex()}, here is {here.hex()}",
            next_step="Send the tensor dense, or the delta from what is here.",
        )
    places, steps = _changes_of(name, delta)
    old = _bits_of(base)[places]
    new = np.empty_like(old)
    rice.add(old, steps, 8 * delta.dtype.itemsize, new)
    change, nonfinite = _change(delta.dtype, places, old, new, delta.start, part)
    if here + change != delta.after:
        raise VerificationError(
            f"{name!r}: after the delta its digest is {(here + change).hex()}, it should be {delta.after.hex()}",
            next_step=_RESEND,
        )
    return Patch(
        indices=torch.from_numpy(places), old=_elements(old, delta.dtype), new=_elements(new, delta.dtype),
        nonfinite=nonfinite,
    )  # fmt: skip


def compose(name: str, first: Delta, then: Delta) -> Delta:
    """One delta that does what `first` and `then` do one after the other; neither base is needed.

    Raises `VersionError` where `then` does not start from what `first` leads to, `VerificationError`.

    >>> a, b, c = torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 5, 4]), torch.tensor([0.0, 2, 4])
    >>> decode("w", compose("w", encode("w", a, b), encode("w", b, c)), a).indices.tolist()
    [0, 2]
    """
    if (first.dtype, first.start, first.numel) != (then.dtype, then.start, then.numel):
        raise ShapeMismatch(f"{name!r}: two deltas of different elements do not compose")
    if first.after != then.before:
        raise VersionError(
            f"{name!r}: the first delta leads to digest {first.after.hex()}, the next starts from {then.before.hex()}",
            next_step="Compose deltas in the order of their versions, without a gap.",
        )
    width = 8 * first.dtype.itemsize
    places, steps = rice.merge(*_changes_of(name, first), *_changes_of(name, then), width)
    return _assemble(first.dtype, first.start, first.numel, places, steps, first.before, then.after)


def join(name: str, parts: Sequence[tuple[Part, Delta]]) -> Delta:
    """The delta of a whole tensor from those of the parts that make it up; none of their elements is needed.

    Raises `ShapeMismatch` where they are not deltas of such parts, `VerificationError`.

    >>> from weightwire.updates.boxes import Box
    >>> base, new = torch.zeros(2, 4), torch.tensor([[0.0, 1, 0, 0], [5, 0, 0, 7]])
    >>> halves = [Part((2, 4), Box((0, start), (2, 2))) for start in (0, 2)]
    >>> rows = [[t[:, start : start + 2].reshape(-1) for t in (base, new)] for start in (0, 2)]
    >>> parts = [(half, encode("w", *row, part=half)) for half, row in zip(halves, rows)]
    >>> decode("w", join("w", parts), base).indices.tolist()
    [1, 4, 7]
    """
    (part, first), *_ = parts
    numel = math.prod(part.shape)
    alike = all((each.shape, delta.dtype) == (part.shape, first.dtype) for each, delta in parts)
    if not alike or any(each.numel != delta.numel for each, delta in parts) or numel != sum(d.numel for _, d in parts):
        raise ShapeMismatch(f"{name!r}: the deltas of its parts are not of parts that make up {part.shape}")
    parts = sorted(parts, key=lambda each: each[0].start)
    changes = [_changes_of(name, delta) for _, delta in parts]
    places = np.concatenate([part.places(own) for (part, _), (own, _) in zip(parts, changes, strict=True)])
    steps = np.concatenate([steps for _, steps in changes])
    if not all(part.is_run for part, _ in parts):
        order = np.argsort(places)
        places, steps = places[order], steps[order]
    before = sum((delta.before for _, delta in parts), NO_DIGEST)
    after = sum((delta.after for _, delta in parts), NO_DIGEST)
    return _assemble(first.dtype, 0, numel, places, steps, before, after)


def steps_of(name: str, delta: Delta) -> dict[int, int]:
    """How many elements change by how many units in the last place. Reads all of the delta, as `decode` does, without
    its base. Raises `VerificationError`.

    >>> steps_of("w", encode("w", torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 2, 3]).nextafter(torch.tensor(9.0))))
    {1: 3}
    """
    sizes, counts = np.unique(np.abs(_changes_of(name, delta)[1]), return_counts=True)
    return dict(zip(sizes.tolist(), counts.tolist(), strict=True))


def estimate(base: torch.Tensor, new: torch.Tensor, *, sample: int = 1 << 16) -> tuple[float, float]:
    """The share of elements that differ, and about how many bytes their delta takes for every dense byte.

    Measured on `sample` elements spread over contiguous CPU tensors of one shape and dtype.
    """
    olds, news = _bits_of(base), _bits_of(new)
    run = 256
    every = max(base.numel() // max(sample, 1), 1) * run
    pieces = [slice(at, at + run) for at in range(0, base.numel(), every)]
    seen = sum(olds[piece].size for piece in pieces)
    changed = sum(int(np.count_nonzero(olds[piece] != news[piece])) for piece in pieces)
    density = changed / seen if seen else 0.0
    if not 0 < density < 1:
        return density, density
    # The entropy of places, and some three bits for a step.
    bits = -math.log2(density) - (1 - density) / density * math.log2(1 - density) + 3
    return density, density * bits / (8 * base.element_size())


def harmed(name: str, what: str) -> VerificationError:
    return VerificationError(f"{name!r}: not a whole delta: {what}", next_step=_RESEND)


def _flat(elements: torch.Tensor) -> torch.Tensor:
    flat = elements.detach().view(-1)
    flat = flat.as_strided((flat.numel(),), (1,))  # the stride of one element, or of none, may be anything
    return flat.view(_BITS[elements.element_size()][1])


def _bits_of(elements: torch.Tensor) -> npt.NDArray[np.unsignedinteger]:
    if not elements.is_contiguous() or elements.device.type != "cpu":
        raise UsageError(
            "a delta is of contiguous elements on the CPU", next_step="Call .contiguous() or .cpu() first."
        )
    return _flat(elements).numpy().view(_BITS[elements.element_size()][0])


def _aligned(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array if array.ctypes.data % 8 == 0 else array.copy()


def _elements(bits: npt.NDArray[np.unsignedinteger], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(bits.view(f"i{dtype.itemsize}")).view(dtype)


def _change(
    dtype: torch.dtype,
    places: Array,
    old: npt.NDArray[np.unsignedinteger],
    new: npt.NDArray[np.unsignedinteger],
    start: int,
    part: Part | None,
) -> tuple[Digest, int]:
    if part is not None and not part.is_run:
        places, start = part.places(places), 0
    indices = torch.from_numpy(places)
    came = scan_places(_elements(new, dtype), indices, start)
    return came.digest - scan_places(_elements(old, dtype), indices, start).digest, came.nonfinite


def _digest(elements: torch.Tensor, start: int, part: Part | None) -> Digest:
    if part is None or part.is_run:
        return scan(elements, start).digest
    return scan_box(elements.view(part.box.shape), part.box, part.shape).digest


def block_bits_of(count: Array, numel: Array) -> Array:
    """The block bits that an encoder takes for so many changes of so many elements.

    >>> block_bits_of(np.array([0, 1, 256, 1024, 3]), np.array([9, 1 << 20, 1 << 20, 1 << 20, 0])).tolist()
    [24, 24, 20, 18, 8]
    """
    length = np.where(count > 0, -(-_CHANGES * numel // np.maximum(count, 1)), np.minimum(numel, 1) << _MAX_BLOCK)
    return _MIN_BLOCK + np.searchsorted(1 << np.arange(_MIN_BLOCK, _MAX_BLOCK), length - 1, side="right")


def unit_bits_of(sizes: Array, width: int) -> int:
    """The unit bits that an encoder takes, by `rice.tally` of the steps: the fewest of those that cost least."""
    return int((unit_costs(width) @ sizes).argmin())


def unit_costs(width: int) -> Array:
    """What a step of each size that `rice.tally` counts takes by each choice of unit bits, in bits: `(width, 33)`."""
    low, lengths = np.arange(width)[:, None], np.arange(33)
    costs: Array = 2 * np.maximum(lengths - low, 0) + low
    return costs


def _assemble(
    dtype: torch.dtype, start: int, numel: int, places: Array, steps: Array, before: Digest, after: Digest
) -> Delta:
    block_bits = int(block_bits_of(np.array(places.size), np.array(numel)))
    unit_bits = unit_bits_of(rice.tally(steps), 8 * dtype.itemsize)
    blocks = -(-numel >> block_bits) if places.size else 0
    table = np.zeros((blocks, 2), np.int64)
    rice.weigh(places, steps, numel, block_bits, unit_bits, table)
    words = np.empty(int(table[:, 1].sum()), np.uint32)
    rice.write(places, steps, numel, block_bits, unit_bits, table, words)
    entry = 8 if blocks and table.max() > 0xFFFF else 4
    nbytes = HEAD_BYTES + blocks * entry + words.nbytes + SEAL_BYTES
    delta = Delta(
        dtype=dtype, start=start, numel=numel, count=int(places.size), before=before, after=after,
        block_bits=block_bits, unit_bits=unit_bits, entry=entry, data=torch.empty(nbytes, dtype=torch.uint8),
    )  # fmt: skip
    parts = [delta.head(), table.astype(f"<u{entry // 2}").tobytes(), words.astype("<u4").tobytes()]
    delta.data[:-SEAL_BYTES] = torch.frombuffer(bytearray().join(parts), dtype=torch.uint8)
    delta.seal(scan(delta.data[:-SEAL_BYTES]).digest)
    return delta


def _changes_of(name: str, delta: Delta) -> tuple[Array, Array]:
    """The places and steps of a delta. What it allocates, its own length and its counted elements bound."""
    raw = _aligned(delta.data.numpy())
    end = HEAD_BYTES + delta.blocks * delta.entry
    table = raw[HEAD_BYTES:end].view(f"<u{delta.entry // 2}").astype(np.int64).reshape(-1, 2)
    words = raw[end:].view("<u4")
    room = words.size - SEAL_BYTES // 4
    lengths = np.full(delta.blocks, 1 << delta.block_bits, np.int64)
    lengths[-1:] -= (delta.blocks << delta.block_bits) - delta.numel
    if table[:, 0].sum() != delta.count or (table[:, 0] > lengths).any():
        raise harmed(name, f"its blocks do not hold {delta.count} changes")
    # A change takes three bits at least: what is allocated for it has come in.
    if table[:, 1].sum() != room or delta.count * 3 > room * 32:
        raise harmed(name, f"its blocks do not fill its {room} words")
    places, steps = np.empty(delta.count, np.int64), np.empty(delta.count, np.int64)
    width = 8 * delta.dtype.itemsize
    block = rice.read(words, table, delta.numel, delta.block_bits, delta.unit_bits, width, places, steps)
    if block >= 0:
        raise harmed(name, f"its block {block} of {delta.blocks} cannot be decoded")
    return places, steps
