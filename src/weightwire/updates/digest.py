"""The digest: a number over a tensor's elements and their places.

    digest = sum over k of w(k) * h(k)   mod 2^64, for two functions h, so 128 bits

`w(k)` is word `k` of the full checkpoint tensor: its row-major, little-endian bytes read as unsigned 32-bit words, the
last one padded with zeros. `h` is a 32-bit integer mix made odd; everything wraps at 32 bits but the sum:

    mix(x):   x ^= x >> 16;  x *= 0x7FEB352D;  x ^= x >> 15;  x *= 0x846CA68B;  x ^= x >> 16
    m(k)    = mix(k mod 2^32 ^ mix(k div 2^32 ^ 0x9E3779B9))
    low:  h = m(k) | 1
    high: h = (a ^ a >> 14) | 1   with a = m(k) * 0x31848BAB

So element `j` of `s` bytes adds `bits(e) * 2^(8 * (b mod 4)) * h(b div 4)` where `b = j * s`, or two words if `s` is 8.
A sum does not care in which order, on which rank or in which layout the elements were added: shards add up to the
whole. A word times a factor stays below 2^64, so no change inside a word goes unnoticed. Words and not elements: times
2^63 all odd factors are equal, so the signs of two float64 could be flipped unseen, and narrow elements would each pay
for a factor of their own. It guards against faults, not attackers.

The mix is the 32-bit finaliser `lowbias32`, and with its further round `triple32`, both found by C. Wellons,
"Prospecting for Hash Functions" (2018).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, overload

import numba
import numpy as np
import numpy.typing as npt
import torch

from weightwire.updates.boxes import Box, strides_of
from weightwire.updates.tiles import brought

__all__ = [
    "NO_DIGEST",
    "Digest",
    "Joined",
    "Pending",
    "PendingScans",
    "Scan",
    "Scans",
    "all_finite",
    "as_scans",
    "bytes_at",
    "differ",
    "scan",
    "scan_and_copy",
    "scan_any",
    "scan_box",
    "scan_parts",
    "scan_pieces_any",
    "scan_places",
    "scan_rows",
    "scan_runs",
    "scan_runs_any",
    "scan_table",
    "scan_tensors_any",
    "settle",
    "sum_line",
    "word_facts",
]

_MASK = (1 << 64) - 1
_FILLED = 256 << 10  # bytes at a time: they stay in the second-level cache until they have been read back
_BLOCK = 1024  # words at a time: their factors stay in the first-level cache
# Exponent masks: an element is NaN or infinite when all its exponent bits are set. float8_e4m3fn has no infinity
# and a single NaN pattern, so its mask covers the whole magnitude.
_EXPONENT = {
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F800000,
    torch.float64: 0x7FF0000000000000,
    torch.float8_e5m2: 0x7C,
    torch.float8_e4m3fn: 0x7F,
}


class Digest(NamedTuple):
    """Two 64-bit sums. Add the digests of disjoint parts to get the digest of the whole."""

    low: int
    high: int

    def __add__(self, other: object) -> Digest:
        if not isinstance(other, Digest):
            return NotImplemented
        return Digest((self.low + other.low) & _MASK, (self.high + other.high) & _MASK)

    def __sub__(self, other: object) -> Digest:
        if not isinstance(other, Digest):
            return NotImplemented
        return Digest((self.low - other.low) & _MASK, (self.high - other.high) & _MASK)

    def hex(self) -> str:
        return f"{self.low:016x}{self.high:016x}"

    @classmethod
    def parse(cls, text: str) -> Digest:
        if len(text) != 32:
            raise ValueError(f"a digest is 32 hexadecimal digits, got {len(text)} characters")
        return cls(int(text[:16], 16), int(text[16:], 16))


NO_DIGEST = Digest(0, 0)


class Scan(NamedTuple):
    """One pass over elements: their digest, and how many of them are NaN or infinite."""

    digest: Digest
    nonfinite: int

    def __add__(self, other: object) -> Scan:
        if not isinstance(other, Scan):
            return NotImplemented
        return Scan(self.digest + other.digest, self.nonfinite + other.nonfinite)


_NOTHING = Scan(NO_DIGEST, 0)


class Scans(Sequence[Scan]):
    """Scans of many tensors as one array, `rows` (low, high, nonfinite) of uint64: of hundreds of tensors, to handle
    each by itself takes longer than to read them.

    >>> scans = Scans.of([Scan(Digest(1, 2), 0), Scan(Digest(3, 4), 5)])
    >>> scans[1], scans.hexes()[0], scans == [*scans]
    (Scan(digest=Digest(low=3, high=4), nonfinite=5), '00000000000000010000000000000002', True)
    """

    __slots__ = ("rows",)

    def __init__(self, rows: npt.NDArray[np.uint64]) -> None:
        self.rows = rows

    @classmethod
    def of(cls, scans: Sequence[Scan]) -> Scans:
        """These, or as many that are one already."""
        if isinstance(scans, cls):
            return scans
        return cls(np.array([(*digest, nonfinite) for digest, nonfinite in scans], np.uint64).reshape(-1, 3))

    @property
    def digests(self) -> npt.NDArray[np.uint64]:
        """Rows (low, high)."""
        return self.rows[:, :2]

    @property
    def nonfinite(self) -> npt.NDArray[np.uint64]:
        """One number for each."""
        return self.rows[:, 2]

    def hexes(self) -> list[str]:
        """`Digest.hex` of each."""
        text = self.digests.astype(">u8").tobytes().hex()
        return [text[at : at + 32] for at in range(0, len(text), 32)]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, which: int) -> Scan: ...
    @overload
    def __getitem__(self, which: slice) -> Scans: ...
    def __getitem__(self, which: int | slice) -> Scan | Scans:
        if isinstance(which, slice):
            return Scans(self.rows[which])
        low, high, nonfinite = self.rows[which].tolist()
        return Scan(Digest(low, high), nonfinite)

    def __iter__(self) -> Iterator[Scan]:
        return (Scan(Digest(low, high), nonfinite) for low, high, nonfinite in self.rows.tolist())

    def __repr__(self) -> str:
        return repr([*self])

    def __eq__(self, other: object) -> bool:
        return [*self] == [*other] if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]


class Pending:
    """A scan on a GPU whose numbers have not been read yet. It adds up with others, and with scans that are known."""

    __slots__ = ("known", "rows")

    def __init__(self, rows: Sequence[tuple[torch.Tensor, int]], known: Scan | None = None) -> None:
        self.rows = rows
        """Where its numbers will be: rows (low, high, nonfinite) of tables of int64."""
        self.known = known or _NOTHING

    def __add__(self, other: Scan | Pending) -> Pending:
        if isinstance(other, Pending):
            return Pending([*self.rows, *other.rows], self.known + other.known)
        return Pending(self.rows, self.known + other)

    __radd__ = __add__


class PendingScans(Sequence[Pending]):
    """What one launch scans: a row of `sums` for each, int64, on the device."""

    __slots__ = ("sums",)

    def __init__(self, sums: torch.Tensor) -> None:
        self.sums = sums

    def __len__(self) -> int:
        return len(self.sums)

    @overload
    def __getitem__(self, which: int) -> Pending: ...
    @overload
    def __getitem__(self, which: slice) -> PendingScans: ...
    def __getitem__(self, which: int | slice) -> Pending | PendingScans:
        if isinstance(which, slice):
            return PendingScans(self.sums[which])
        return Pending([(self.sums, range(len(self))[which])])


def settle(scans: Sequence[Scan | Pending]) -> Scans:
    """The numbers of many scans; those still on a GPU are waited for. Call it on the stream that they were made on.

    >>> settle([Scan(Digest(1, 2), 0), Pending([(torch.tensor([[1, -1, 0]]), 0)]) + Scan(Digest(1, 2), 3)])
    [Scan(digest=Digest(low=1, high=2), nonfinite=0), Scan(digest=Digest(low=2, high=1), nonfinite=3)]
    """
    if isinstance(scans, PendingScans):
        return Scans(brought(scans.sums).view(np.uint64))
    if isinstance(scans, Scans):
        return scans
    tables = {id(table): table for scan in scans if isinstance(scan, Pending) for table, _ in scan.rows}
    known: dict[int, list[Scan]] = {}
    # From each device all at once: to ask for a table takes longer than to read it.
    for device in {table.device for table in tables.values()}:
        there = {number: table for number, table in tables.items() if table.device == device}
        rows = iter(brought(torch.cat([*there.values()])).view(np.uint64).tolist())
        for number, table in there.items():
            of_table = itertools.islice(rows, len(table))
            known[number] = [Scan(Digest(low, high), nonfinite) for low, high, nonfinite in of_table]

    def total(scan: Scan | Pending) -> Scan:
        if isinstance(scan, Scan):
            return scan
        found = [known[id(table)][row] for table, row in scan.rows]
        return found[0] if len(found) == 1 and scan.known is _NOTHING else sum(found, scan.known)

    return Scans.of([total(scan) for scan in scans])


def scan(elements: torch.Tensor, start: int = 0) -> Scan:
    """Scan a contiguous run of a tensor's elements on the CPU, the first of which has row-major index `start`.

    >>> whole = torch.arange(6.0)
    >>> scan(whole[:2]) + scan(whole[2:], start=2) == scan(whole)
    True
    >>> scan(torch.tensor([float("nan"), 1.0])).nonfinite
    1
    """
    flat = _run_of(elements)
    return _scan_addresses([(flat.data_ptr(), flat.numel(), start, flat.dtype, 0)])[0]


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite, where nobody wants a digest too. What is least and what is greatest shows
    both; on a CPU `torch.isfinite` takes twenty times as long.

    >>> all_finite(torch.tensor([1.0, -2.0])), all_finite(torch.tensor([1.0, float("nan")]))
    (True, False)
    """
    return tensor.numel() == 0 or all(math.isfinite(end) for end in torch.aminmax(tensor))


def scan_and_copy(elements: torch.Tensor, start: int, to: torch.Tensor) -> Scan:
    """`scan`, and in the same pass a copy of the elements to as many of the same dtype; both 1-D, contiguous, on the
    CPU.

    >>> copied = torch.zeros(3)
    >>> scan_and_copy(torch.arange(3.0), 5, copied) == scan(torch.arange(3.0), 5), copied
    (True, tensor([0., 1., 2.]))
    """
    if elements.dtype != to.dtype or elements.numel() != to.numel():
        raise ValueError(f"{elements.numel()} {elements.dtype} cannot be copied to {to.numel()} {to.dtype}")
    return _scan_addresses([(elements.data_ptr(), elements.numel(), start, elements.dtype, to.data_ptr())])[0]


def scan_parts(parts: Sequence[tuple[torch.Tensor, int, int]]) -> list[Scan]:
    """`scan` of a part of each of many contiguous tensors on the CPU, by one call: the row-major index of its first
    element, and their number.

    >>> scan_parts([(torch.arange(6.0), 2, 3)]) == [scan(torch.arange(2.0, 5.0), start=2)]
    True
    """
    if any(not 0 <= start <= start + count <= tensor.numel() for tensor, start, count in parts):
        raise ValueError("a part goes beyond its tensor")
    return _scan_addresses(
        [(t.data_ptr() + start * t.element_size(), count, start, t.dtype, 0) for t, start, count in parts]
    )


def scan_any(elements: torch.Tensor, start: int = 0) -> Scan | Pending:
    """`scan`, wherever the elements are: where that is a GPU, queued on its current stream.

    >>> scan_any(torch.ones(2)) == scan(torch.ones(2))
    True
    """
    if elements.device.type != "cuda":
        return scan(elements, start)
    flat = elements.detach().reshape(-1).contiguous()
    return scan_runs_any(flat.view(torch.uint8), [(0, flat.numel(), start, flat.dtype)])[0]


def scan_runs_any(
    data: torch.Tensor, runs: Sequence[tuple[int, int, int, torch.dtype]]
) -> Sequence[Scan] | Sequence[Pending]:
    """`scan_runs`, wherever the data is: where that is a GPU, queued on its current stream.

    >>> scan_runs_any(torch.ones(2).view(torch.uint8), [(0, 2, 0, torch.float32)]) == [scan(torch.ones(2))]
    True
    """
    if data.device.type != "cuda":
        return scan_runs(data, runs)
    from weightwire.updates import digest_cuda  # needs Triton, which only torch for GPUs brings

    base = data.data_ptr()
    return digest_cuda.scan_again([(base + at, start, count, dtype) for at, count, start, dtype in runs], data.device)


def scan_pieces_any(
    pieces: Sequence[tuple[torch.Tensor, int]], device: torch.device | None = None
) -> Sequence[Scan] | Sequence[Pending]:
    """`scan_any` of each of many contiguous runs of elements, wherever they are on one device, with the index of their
    first one; by one call, or one launch on the current stream of `device`, which is theirs or another that can reach
    them.

    >>> scan_pieces_any([(torch.ones(2), 3)]) == [scan(torch.ones(2), 3)]
    True
    """
    runs = [(run.data_ptr(), start, run.numel(), run.dtype) for run, start in pieces]
    if not pieces or pieces[0][0].device.type != "cuda":
        return _scan_addresses([(address, count, start, dtype, 0) for address, start, count, dtype in runs])
    from weightwire.updates import digest_cuda

    return digest_cuda.scan_again(runs, device or pieces[0][0].device)


class Joined:
    """Tensors of one dtype on one device, scanned as if they lay end to end, as often as one likes: which is less work
    the second time, as long as they stay where they are. What is not contiguous is copied, and scanned as it was. With
    `hold=False` somebody else has to hold the others for as long as that goes on.

    >>> joined = Joined([torch.ones(2, 2), torch.zeros(3)])
    >>> joined.scan() == scan(torch.tensor([1.0, 1, 1, 1, 0, 0, 0]))
    True
    """

    def __init__(self, tensors: Sequence[torch.Tensor], *, hold: bool = True) -> None:
        held = [tensor if tensor.is_contiguous() else tensor.detach().contiguous() for tensor in tensors]
        copies = [copy for copy, tensor in zip(held, tensors, strict=True) if copy is not tensor]
        self.of_copies = bool(copies)
        """Whether it has copied any."""
        self._held = held if hold else copies
        starts = itertools.accumulate((run.numel() for run in held), initial=0)
        runs = [(run, start) for run, start in zip(held, starts, strict=False) if run.numel()]
        self._dtypes = [run.dtype for run, _ in runs]
        self._on_gpu = any(run.device.type == "cuda" for run, _ in runs)
        if self._on_gpu:
            from weightwire.updates import digest_cuda

            lines = [digest_cuda.line_of(run.data_ptr(), start, run.numel(), run.dtype) for run, start in runs]
            self._table: Any = digest_cuda.table(lines, runs[0][0].device)
        else:
            self._table = _table([(run.data_ptr(), run.numel(), start, run.dtype, 0) for run, start in runs])

    @functools.cached_property
    def can_be_filled(self) -> bool:
        """Whether `fill` can be asked for: they lie on a CPU, each contiguous, and no two have memory in common."""
        if self._on_gpu or self.of_copies:
            return False
        runs = self._table[np.argsort(self._table[:, 0]), :2]
        return bool((runs[:-1].sum(axis=1) <= runs[1:, 0]).all())

    def fill(self, others: Sequence[torch.Tensor]) -> tuple[bool, Scan]:
        """Copy into each its counterpart, contiguous and of the same dtype and size, and read them back: whether they
        hold the same bits now, and what they hold. By one call, and while it is in the processor's cache.

        >>> joined = Joined([two := torch.zeros(2), three := torch.zeros(3)])
        >>> joined.fill([torch.ones(2), torch.ones(3)]) == (True, joined.scan())
        True
        >>> two, three
        (tensor([1., 1.]), tensor([1., 1., 1.]))
        """
        others = [each for each in others if each.numel()]
        if not self.can_be_filled or not all(each.is_contiguous() for each in others):
            raise ValueError("only contiguous tensors on a CPU, each apart, are filled by one call, and from such")
        if [(each.nbytes, each.dtype) for each in others] != [*zip(self._table[:, 1], self._dtypes, strict=True)]:
            raise ValueError(f"{len(others)} tensors, and not those that are {len(self._table)} here")
        table = self._table.copy()
        table[:, 3] = [each.data_ptr() for each in others]
        same, low, high, nonfinite = _fill_runs(table)
        return bool(same), Scan(Digest(int(low), int(high)), int(nonfinite))

    def scan(self) -> Scan | Pending:
        """What they hold now; where that is a GPU, queued on its current stream."""
        if not self._on_gpu:
            return sum(scan_table(self._table), _NOTHING)
        from weightwire.updates import digest_cuda

        return Pending([(digest_cuda.sum_lines(self._table).sum(0, keepdim=True), 0)])


def scan_tensors_any(
    tensors: Sequence[torch.Tensor], device: torch.device | None = None
) -> Sequence[Scan] | Sequence[Pending]:
    """`scan_any` of each of many contiguous tensors; of those on a GPU by one launch on the current stream of `device`,
    which is theirs or another that can reach them.

    >>> scan_tensors_any([torch.ones(2), torch.ones(3)]) == [scan(torch.ones(2)), scan(torch.ones(3))]
    True
    """
    on_gpu = all(tensor.is_cuda for tensor in tensors)
    return scan_pieces_any([(tensor if on_gpu else _run_of(tensor), 0) for tensor in tensors], device)


def scan_boxes_any(parts: Sequence[tuple[torch.Tensor, Box, Sequence[int]]]) -> list[Scan | Pending]:
    """`scan_box` of each of many parts; of those on a GPU, one and the same, by one launch on its current stream.

    >>> scan_boxes_any([(torch.ones(2), Box((0,), (2,)), (2,))]) == [scan(torch.ones(2))]
    True
    """
    if any(elements.device.type != "cuda" for elements, _, _ in parts):
        return [scan_box(*part) for part in parts]
    if not parts:
        return []
    from weightwire.updates import digest_cuda

    lines = [
        digest_cuda.lines_of(elements.data_ptr(), box, elements.stride(), shape, elements.dtype)
        for elements, box, shape in parts
    ]
    scans = iter(digest_cuda.scan_lines(digest_cuda.table([*itertools.chain(*lines)], parts[0][0].device)))
    nothing: Scan | Pending = Scan(NO_DIGEST, 0)
    return [functools.reduce(lambda a, b: b + a, itertools.islice(scans, len(of_part)), nothing) for of_part in lines]


def _run_of(elements: torch.Tensor) -> torch.Tensor:
    flat = elements.detach().reshape(-1).contiguous()
    return flat.as_strided((flat.numel(),), (1,))  # the stride of one element, or of none, may be anything


def scan_runs(data: torch.Tensor, runs: Sequence[tuple[int, int, int, torch.dtype]]) -> list[Scan]:
    """What `scan` gives for each of several runs that lie in one piece of memory, by one call: they may be many.

    `data`: 1-D, uint8, on the CPU. `runs`: the byte where each begins, its number of elements, the index of the first
    one, its dtype.

    >>> data = torch.arange(6.0).view(torch.uint8)
    >>> scan_runs(data, [(8, 4, 2, torch.float32)]) == [scan(torch.arange(2.0, 6.0), start=2)]
    True
    """
    base, end = data.data_ptr(), data.numel()
    if any(not 0 <= at <= at + count * dtype.itemsize <= end for at, count, _, dtype in runs):
        raise ValueError(f"a run goes beyond its {end} bytes")
    return _scan_addresses([(base + at, count, start, dtype, 0) for at, count, start, dtype in runs])


def scan_rows(rows: torch.Tensor, starts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """The digest (low, high) of each row of bytes, contiguous on the CPU, of which the first is byte `starts[i]`.

    >>> rows = torch.arange(8, dtype=torch.uint8).view(2, 4)
    >>> scan_rows(rows, np.array([0, 9])).tolist() == [list(scan(row, at).digest) for row, at in zip(rows, (0, 9))]
    True
    """
    count, width = rows.shape
    lines = np.zeros((count, 7), np.int64)
    lines[:, 0] = rows.data_ptr() + np.arange(count) * width
    lines[:, 1], lines[:, 2] = width, starts
    lines[:, 4:] = word_facts(torch.uint8)
    return _sum_runs(lines)[:, :2] if count else np.zeros((0, 2), np.uint64)


def _scan_addresses(lines: Sequence[tuple[int, int, int, torch.dtype, int]]) -> list[Scan]:
    """Each line: the address of a run, its number of elements, the index of the first one, its dtype, and the address
    to which it is copied, or 0. Whoever calls this holds the memory and has looked at the bounds."""
    return scan_table(_table(lines))


def _table(lines: Sequence[tuple[int, int, int, torch.dtype, int]]) -> npt.NDArray[np.int64]:
    return np.array([_line(*line) for line in lines], np.int64).reshape(-1, 7)


def scan_table(table: npt.NDArray[np.int64]) -> list[Scan]:
    """What lies where each line of int64 says: its address, length and first place in its tensor, in bytes, the address
    to which it is copied or 0, and the `word_facts` of its dtype. Whoever calls this holds the memory and has looked at
    the bounds."""
    return as_scans(_sum_runs(table)) if len(table) else []


def as_scans(sums: npt.NDArray[np.uint64]) -> list[Scan]:
    """Rows (low, high, nonfinite) as scans."""
    return [Scan(Digest(low, high), nonfinite) for low, high, nonfinite in sums.tolist()]


def _line(address: int, count: int, start: int, dtype: torch.dtype, to: int) -> tuple[int, ...]:
    size = dtype.itemsize
    return address, count * size, start * size, to, *word_facts(dtype)


def scan_places(elements: torch.Tensor, indices: torch.Tensor, start: int = 0) -> Scan:
    """Scan elements that lie scattered in a tensor: `indices` (int64, 1-D like `elements`) plus `start` says where.

    What elements were, subtracted from what they are, is what their change adds to the digest of the whole.

    >>> before, after = torch.zeros(6), torch.tensor([0.0, 1, 0, 0, 2, 0])
    >>> places = torch.tensor([1, 4])
    >>> change = scan_places(after[places], places).digest - scan_places(before[places], places).digest
    >>> scan(before).digest + change == scan(after).digest
    True
    """
    run = _run_of(elements)
    bits = run.view(torch.uint8).numpy().view(f"<u{run.element_size()}")
    exponent = np.uint64(_EXPONENT.get(elements.dtype, 0))
    low, high, nonfinite = _sum_places(bits, indices.contiguous().numpy(), start, run.element_size(), exponent)
    return Scan(Digest(int(low), int(high)), int(nonfinite))


def scan_box(elements: torch.Tensor, box: Box, shape: Sequence[int]) -> Scan:
    """Scan the part `box` of a tensor of the full `shape`; `elements` has the box's shape, any strides.

    >>> full = torch.arange(12.0).reshape(3, 4)
    >>> parts = [(Box((0, 0), (3, 1)), full[:, :1]), (Box((0, 1), (3, 3)), full[:, 1:])]
    >>> sum((scan_box(e, b, full.shape) for b, e in parts), Scan(NO_DIGEST, 0)) == scan(full)
    True
    """
    if 0 in box.shape:
        return Scan(NO_DIGEST, 0)
    strides = strides_of(shape)
    base = sum(s * t for s, t in zip(box.start, strides, strict=True))
    return _scan_nd(elements.detach(), base, strides, tuple(shape), box.shape)


def _scan_nd(
    elements: torch.Tensor, base: int, strides: tuple[int, ...], full: tuple[int, ...], part: tuple[int, ...]
) -> Scan:
    # Trailing dimensions that are whole form one run; the dimension before them steps from run to run.
    run = len(part)
    while run and part[run - 1] == full[run - 1]:
        run -= 1
    outer = max(run - 1, 0)
    if outer > 1:
        parts = [_scan_nd(e, base + i * strides[0], strides[1:], full[1:], part[1:]) for i, e in enumerate(elements)]
        return sum(parts, Scan(NO_DIGEST, 0))
    if outer == 1:
        return _scan_rows(elements.reshape(part[0], -1), base, strides[0])
    return _scan_rows(elements.reshape(1, -1), base, 0)


def _scan_rows(rows: torch.Tensor, start: int, step: int) -> Scan:
    if rows.numel() == 0:
        return Scan(NO_DIGEST, 0)
    count, width = rows.shape
    rows = rows if rows.stride(1) == 1 or width == 1 else rows.contiguous()
    size = rows.element_size()
    pitch = rows.stride(0)
    memory = rows.as_strided(((count - 1) * pitch + width,), (1,)).view(torch.uint8).numpy()
    low, high, nonfinite = _sum_rows(
        memory,
        memory[:0],
        rows.data_ptr(),
        count,
        width * size,
        pitch * size,
        start * size,
        step * size,
        *_exponents(rows.dtype),
    )
    return Scan(Digest(int(low), int(high)), int(nonfinite))


@functools.cache
def word_facts(dtype: torch.dtype) -> tuple[int, int, int]:
    """All exponent bits of a word, the lowest one of each of its elements, and the words an element takes.

    >>> [hex(fact) for fact in word_facts(torch.bfloat16)]
    ['0x7f807f80', '0x800080', '0x1']
    """
    bits = 8 * dtype.itemsize
    exponent = _EXPONENT.get(dtype, 0) >> max(bits - 32, 0)
    each = sum(1 << shift for shift in range(0, 32, bits))
    return exponent * each, (exponent & -exponent) * each, max(bits // 32, 1)


def _exponents(dtype: torch.dtype) -> tuple[np.uint32, np.uint32, int]:
    exponent, lowest, stride = word_facts(dtype)
    return np.uint32(exponent), np.uint32(lowest), stride


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _mix(x: Any) -> Any:
    return _mix_on(np.uint32(x ^ (x >> 16)))


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _mix_on(x: Any) -> Any:
    x = np.uint32(x * 0x7FEB352D)
    x = np.uint32((x ^ (x >> 15)) * 0x846CA68B)
    return np.uint32(x ^ (x >> 16))


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _full_exponents(word: Any, exponent: Any, lowest: Any) -> Any:
    # One more in an exponent's lowest bit carries into the place of the sign exactly when all its bits are set: that
    # tests every element of a word at once.
    return np.uint32(((word & exponent) + lowest) & (exponent + lowest))


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _fill_factors(lows: Any, highs: Any, words: Any, to: Any, at: Any, exponent: Any, lowest: Any) -> Any:
    # Apart from the sum so that this loop holds 32-bit values only and takes twice as many at once, for which the index
    # must be one too. Words are tested and copied where they are first met, so that stores go on beside the mixing.
    key = _mix(np.uint32((at >> 32) ^ 0x9E3779B9))
    index = np.uint32(at & 0xFFFFFFFF)
    # The first step of the mix: no block crosses a multiple of 2^16 words, so it is the same for all of one.
    key = np.uint32(key ^ (np.uint32(index ^ key) >> 16))
    suspect = np.uint32(0)
    for i in range(words.size):
        mixed = _mix_on(np.uint32(index ^ key))
        index = np.uint32(index + 1)
        lows[i] = mixed | 1
        again = np.uint32(mixed * 0x31848BAB)
        highs[i] = again ^ (again >> 14) | 1
        word = words[i]
        to[i] = word
        suspect = np.uint32(suspect | _full_exponents(word, exponent, lowest))
    return suspect


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _sum_words(words: Any, lows: Any, highs: Any) -> Any:
    low = np.uint64(0)
    high = np.uint64(0)
    for i in range(words.size):
        word = np.uint64(words[i])
        low += word * np.uint64(lows[i])
        high += word * np.uint64(highs[i])
    return low, high


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _count_nonfinite(words: Any, exponent: Any, lowest: Any, stride: Any) -> Any:
    # The exponent is in the last word of an element.
    count = np.int64(0)
    for i in range(stride - 1, words.size, stride):
        full = np.int64(_full_exponents(words[i], exponent, lowest))
        count += (full >> 31) + (full >> 23 & 1) + (full >> 15 & 1) + (full >> 7 & 1)
    return count


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _sum_rows(
    memory: Any,
    to: Any,
    address: Any,
    rows: Any,
    width: Any,
    pitch: Any,
    start: Any,
    step: Any,
    exponent: Any,
    lowest: Any,
    stride: Any,
) -> Any:
    # All in bytes: `rows` rows of `width`, `pitch` apart in memory and `step` apart in the full tensor. `to` has room
    # for all of it, or none.
    lows = np.empty(_BLOCK, np.uint32)
    highs = np.empty(_BLOCK, np.uint32)
    padded = np.empty(_BLOCK, np.uint32)
    nowhere = np.empty(_BLOCK, np.uint32)
    low = np.uint64(0)
    high = np.uint64(0)
    nonfinite = np.int64(0)
    for row in range(rows):
        place = row * pitch
        end = place + width
        at = start + row * step
        while place < end:
            room = 4 * min(_BLOCK, (1 << 16) - ((at >> 2) & 0xFFFF))
            lead = at & 3
            if lead == 0 and (address + place) & 3 == 0 and end - place >= 4:
                count = min(end - place & ~3, room)
                words = memory[place : place + count].view(np.uint32)
                copied = to[place : place + count].view(np.uint32) if to.size else nowhere
            else:
                # A row's ends within a word, or words that straddle those of the memory: zeros around add nothing.
                count = min(end - place, room - lead)
                words = padded[: (lead + count + 3) >> 2]
                words[:] = 0
                words.view(np.uint8)[lead : lead + count] = memory[place : place + count]
                if to.size:
                    to[place : place + count] = memory[place : place + count]
                copied = nowhere
            suspect = _fill_factors(lows, highs, words, copied, at >> 2, exponent, lowest)
            a, b = _sum_words(words, lows, highs)
            low += a
            high += b
            if suspect:
                nonfinite += _count_nonfinite(words, exponent, lowest, stride)
            place += count
            at += count
    return low, high, nonfinite


@numba.extending.intrinsic  # type: ignore[untyped-decorator]
def bytes_at(typing: Any, address: Any) -> Any:
    """In compiled code: the pointer to an address."""

    # What `carray` makes an array of. An address for each of hundreds of tensors costs less than an array of each.
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return numba.types.CPointer(numba.types.uint8)(address), generate


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _copy(to: Any, memory: Any) -> None:
    # Not as a slice, for which each place would be asked for the other's stride.
    for i in range(to.size):
        to[i] = memory[i]


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def sum_line(line: Any, memory: Any, to: Any, address: Any) -> Any:
    """In compiled code, also of other files, whose caches do not notice that it was changed: the sums (low, high,
    nonfinite) of what a line of `scan_table` says of `memory`, which begins at `address`. Copied to `to`, if that has
    any room."""
    return _sum_rows(
        memory, to, address, 1, memory.size, memory.size, line[2], 0, np.uint32(line[4]), np.uint32(line[5]), line[6]
    )


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _sum_runs(lines: Any) -> Any:
    sums = np.empty((lines.shape[0], 3), np.uint64)
    for i in range(lines.shape[0]):
        address, width, to = lines[i, 0], lines[i, 1], lines[i, 3]
        memory = numba.carray(bytes_at(address), width)
        copied = numba.carray(bytes_at(to), width if to else 0)
        if to and (address - to) & 3:
            # Words of one straddle words of the other.
            _copy(copied, memory)
            copied = copied[:0]
        low, high, nonfinite = sum_line(lines[i], memory, copied, address)
        sums[i, 0], sums[i, 1], sums[i, 2] = low, high, np.uint64(nonfinite)
    return sums


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def differ(ones: Any, others: Any) -> Any:
    """In compiled code, also of other files (see `sum_line`): whether two arrays of bytes of one length differ."""
    different = np.uint8(0)
    # To its end and not to the first that differs: so the compiler takes many at a time.
    for i in range(ones.size):
        different |= ones[i] ^ others[i]
    return different != 0


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _fill_runs(lines: Any) -> Any:
    alike, low, high, nonfinite = True, np.uint64(0), np.uint64(0), np.int64(0)
    first = 0
    while first < lines.shape[0]:
        end, room = first, _FILLED
        while end < lines.shape[0] and (end == first or lines[end, 1] <= room):
            width = lines[end, 1]
            _copy(numba.carray(bytes_at(lines[end, 0]), width), numba.carray(bytes_at(lines[end, 3]), width))
            room -= width
            end += 1
        for i in range(first, end):
            address, width = lines[i, 0], lines[i, 1]
            place, other = numba.carray(bytes_at(address), width), numba.carray(bytes_at(lines[i, 3]), width)
            alike = alike and not differ(place, other)
            a, b, c = sum_line(lines[i], place, place[:0], address)
            low, high, nonfinite = low + a, high + b, nonfinite + c
        first = end
    return alike, low, high, nonfinite


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _factors(word: Any) -> Any:
    mixed = _mix(np.uint32(np.uint32(word & 0xFFFFFFFF) ^ _mix(np.uint32((word >> 32) ^ 0x9E3779B9))))
    again = np.uint32(mixed * 0x31848BAB)
    return np.uint64(np.uint32(mixed | 1)), np.uint64(np.uint32(again ^ (again >> 14) | 1))


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _sum_places(bits: Any, indices: Any, start: Any, size: Any, exponent: Any) -> Any:
    low = np.uint64(0)
    high = np.uint64(0)
    nonfinite = np.int64(0)
    for i in range(bits.size):
        at = (start + indices[i]) * size
        value = np.uint64(bits[i])
        if exponent != 0 and value & exponent == exponent:
            nonfinite += 1
        # Only an element of eight bytes takes a second word, and it begins at a first.
        value <<= np.uint64(8 * (at & 3))
        a, b = _factors(at >> 2)
        low += (value & np.uint64(0xFFFFFFFF)) * a
        high += (value & np.uint64(0xFFFFFFFF)) * b
        if size == 8:
            a, b = _factors((at >> 2) + 1)
            low += (value >> np.uint64(32)) * a
            high += (value >> np.uint64(32)) * b
    return low, high, nonfinite
