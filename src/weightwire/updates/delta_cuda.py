"""Deltas of tensors on a GPU: the same bytes as `delta.encode` makes, and the same ones taken and refused.

All tensors of a device go through each launch together, with a handful of waits for numbers in between. Encoding reads
the tensors and their bases once. The memory it takes is a bit for each element, and for the changes that are taken
together some 16 bytes each: `CHANGES` of them, or those of one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from weightwire.errors import UsageError
from weightwire.updates import digest_cuda, rice_cuda
from weightwire.updates.buckets import ALIGNMENT
from weightwire.updates.delta import (
    DELTA_DTYPES,
    HEAD,
    HEAD_BYTES,
    SEAL_BYTES,
    Delta,
    Heads,
    block_bits_of,
    blocks_of,
    harmed,
    heads_of,
    heads_with,
    unit_costs,
    widths_of,
)
from weightwire.updates.digest import Digest, Scan, Scans, scan_rows, word_facts
from weightwire.updates.tiles import Parts, brought, ends_of, parts_of, sent

__all__ = [
    "CHANGES",
    "Changes",
    "Compared",
    "Deltas",
    "Made",
    "Pairs",
    "batches",
    "compare_all",
    "decode_all",
    "density",
    "encode_compared",
    "pair_up",
    "parse_all",
    "together",
]

Array = npt.NDArray[np.int64]

CHANGES = 1 << 27
"""Changes that are taken together."""

_ALIGNMENT = 16  # what a thread of a detecting program reads at once
_WARPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What deltas change, on their device: `keys` (int64, ascending) and `steps` (int32). The changes of delta `t` are
    those from `ends[t]` to `ends[t + 1]`, and of its elements the first has the key `origins[t]`."""

    keys: torch.Tensor
    steps: torch.Tensor
    ends: Sequence[int]
    origins: Sequence[int]


class Deltas(NamedTuple):
    """Many deltas on one device: their headers, and all their bytes in `memory` (uint8, 1-D), from `begins` on."""

    heads: Heads
    memory: torch.Tensor
    begins: Array


def density(bases: Sequence[torch.Tensor], news: Sequence[torch.Tensor], *, sample: int) -> float:
    """About which share of the elements differs: of each pair `sample` are looked at. As for `pair_up`."""
    changed = total = 0.0
    for width in (2, 4):
        pairs = [(b, n) for b, n in zip(bases, news, strict=True) if b.element_size() == width]
        if not pairs:
            continue
        device = pairs[0][0].device
        lines = np.array([(base.data_ptr(), new.data_ptr(), base.numel()) for base, new in pairs])
        counts = torch.empty(len(lines), dtype=torch.int64, device=device)
        with torch.cuda.device(device if device.type == "cuda" else -1):
            rice_cuda.sample[(len(lines),)](sent(lines, device), counts, sample, WIDTH=8 * width, CHUNK=1024)
        numels = lines[:, 2]
        changed += float((brought(counts) * (numels / np.clip(numels, 1, sample))).sum())
        total += float(numels.sum())
    return changed / total if total else 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pairs:
    """Tensors on one device beside their bases, ready to be compared as often as one likes while all stay where they
    are; it holds none of them. `of_copies`: of some it had to make a copy, which is as they were then."""

    groups: Sequence[_Group]
    of_copies: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Compared:
    """Tensors that were compared with their bases: what was seen of those of each width."""

    seen: Sequence[_Seen]

    @property
    def density(self) -> float:
        """The share of elements that differ."""
        changed = sum(int(seen.counts.sum()) for seen in self.seen)
        return changed / max(sum(int(seen.group.numels.sum()) for seen in self.seen), 1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Made:
    """The delta of each tensor, of which all but the bytes is known, and how many NaN and Inf it leads to. The bytes
    are on their way to the host until `wait` returns."""

    deltas: Sequence[Delta]
    nonfinite: Sequence[int]
    arriving: Sequence[torch.cuda.Event]

    def wait(self) -> None:
        for event in self.arriving:
            event.synchronize()


def pair_up(
    names: Sequence[str],
    bases: Sequence[torch.Tensor],
    news: Sequence[torch.Tensor],
    *,
    starts: Sequence[int] | None = None,
) -> Pairs:
    """The first of the three steps of `delta.encode` of many at once, which reads none of their elements. All are
    contiguous and on one device. `starts`: the index of the first element of each. Raises `UsageError`."""
    for name, base, new in zip(names, bases, news, strict=True):
        alike = base.dtype == new.dtype and base.shape == new.shape and base.device == new.device
        if not alike or base.dtype not in DELTA_DTYPES or not base.is_contiguous() or not new.is_contiguous():
            raise UsageError(
                f"{name!r}: no delta from {base.dtype} of {tuple(base.shape)} on {base.device} to {new.dtype} of"
                f" {tuple(new.shape)} on {new.device}",
                next_step=f"Both must be alike and contiguous, of {', '.join(map(str, DELTA_DTYPES))}.",
            )
    starts = starts or [0] * len(bases)
    groups: list[_Group] = []
    for width in (2, 4):
        mine = [n for n, base in enumerate(bases) if base.element_size() == width]
        if mine:
            groups.append(_group(mine, [bases[n] for n in mine], [news[n] for n in mine], [starts[n] for n in mine]))
    return Pairs(groups=groups, of_copies=any(group.copies for group in groups))


def compare_all(pairs: Pairs) -> Compared:
    """The second step: which elements differ, and the digests before and after. The tensors must stay as they are until
    the third is over."""
    return Compared(seen=[_detect(group) for group in pairs.groups])


def encode_compared(compared: Compared) -> Made:
    """The third step: the deltas, with their bytes on the CPU. What it takes on the device is that of the changes that
    are taken together, once."""
    made: dict[int, tuple[Delta, int]] = {}
    arriving: list[torch.cuda.Event] = []
    for seen in compared.seen:
        for first, last in batches(seen.counts.tolist(), CHANGES):
            made |= zip(seen.group.which[first:last], _encode(_collect(seen, first, last), arriving), strict=True)
    deltas, nonfinite = zip(*(made[n] for n in range(len(made))), strict=True) if made else ((), ())
    return Made(deltas=deltas, nonfinite=nonfinite, arriving=arriving)


def batches(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Neighbours, so many that their sizes are `most` together, or one.

    >>> list(batches([4, 4, 16, 1, 2], 8))
    [(0, 2), (2, 3), (3, 5)]
    """
    first = held = 0
    for number, size in enumerate(sizes):
        if number > first and held + size > most:
            yield first, number
            first, held = number, 0
        held += size
    if first < len(sizes):
        yield first, len(sizes)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Group:
    """Tensors of one width: which of all they are, their dtypes, where each starts, how many elements it has; and on
    the device `lines` of them and their bases, in `segments`, of which those of each end at `ends`."""

    which: Sequence[int]
    width: int
    dtypes: Sequence[torch.dtype]
    starts: Array
    numels: Array
    copies: Sequence[torch.Tensor]
    lines: torch.Tensor
    ends: Array
    segments: torch.Tensor

    @property
    def elements(self) -> int:
        """So many are in a segment."""
        return 32 // self.width * rice_cuda.SEGMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """A group that was compared: of each tensor its digests before and after (`sums`, two numbers each), how many NaN
    and Inf it has (`nonfinite`), and `counts` of changes. On the device `bits`, which say what changed, and `each`, how
    many in each segment."""

    group: _Group
    sums: Array
    nonfinite: Array
    counts: Array
    each: torch.Tensor
    bits: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """The changes of neighbours among such tensors, `keys` and `steps`, and of each tensor the tally of its steps."""

    seen: _Seen
    mine: slice
    tallies: torch.Tensor
    keys: torch.Tensor
    steps: torch.Tensor
    origins: Array


def _group(
    which: Sequence[int], bases: Sequence[torch.Tensor], news: Sequence[torch.Tensor], starts: Sequence[int]
) -> _Group:
    device, itemsize = bases[0].device, bases[0].element_size()
    halves, held = 4 // itemsize, [*bases, *news]
    addresses = np.array([tensor.data_ptr() for tensor in held])
    copies = {n: held[n].clone() for n in np.flatnonzero(addresses % _ALIGNMENT).tolist()}
    for n, copied in copies.items():
        addresses[n] = copied.data_ptr()
    numels, dtypes = np.array([new.numel() for new in news]), [new.dtype for new in news]
    facts = {dtype: word_facts(dtype)[:2] for dtype in set(dtypes)}
    lines = np.stack([
        *addresses.reshape(2, -1), numels // halves, numels % halves, np.array(starts) * itemsize,
        *np.array([facts[dtype] for dtype in dtypes]).T,
    ], axis=1)  # fmt: skip
    parts = parts_of(-(-numels // (halves * rice_cuda.SEGMENT)), device)
    segments = torch.stack([parts.of, parts.number], dim=1).to(torch.int32)
    return _Group(
        which=which, width=8 * itemsize, dtypes=dtypes, starts=np.array(starts, np.int64), numels=numels,
        copies=[*copies.values()], lines=sent(lines, device), ends=parts.ends, segments=segments,
    )  # fmt: skip


def _detect(group: _Group) -> _Seen:
    device, total = group.lines.device, len(group.segments)
    each = torch.empty(total, dtype=torch.int64, device=device)
    bits = torch.empty(total * group.elements // 8, dtype=torch.uint8, device=device)
    sums = torch.zeros(len(group.numels), 6, dtype=torch.int64, device=device)
    with torch.cuda.device(device if device.type == "cuda" else -1):
        if total:
            rice_cuda.detect[(total,)](
                group.lines, group.segments, each, sums, bits, HALVES=32 // group.width, SEGMENT=rice_cuda.SEGMENT,
                WORDS=rice_cuda.WORDS, THREADS=32 * _WARPS, FIELDS=group.lines.shape[1], num_warps=_WARPS,
            )  # fmt: skip
    found = brought(sums)
    return _Seen(group=group, sums=found[:, :4], nonfinite=found[:, 4], counts=found[:, 5], each=each, bits=bits)


def _collect(seen: _Seen, first: int, last: int) -> _Found:
    group = seen.group
    device = group.lines.device
    skipped, end = group.ends[[first, last]].tolist()
    before, changes = int(seen.counts[:first].sum()), int(seen.counts[first:last].sum())
    keys = torch.empty(changes, dtype=torch.int64, device=device)
    steps = torch.empty(changes, dtype=torch.int32, device=device)
    tallies = torch.zeros(len(group.numels), rice_cuda.BINS, dtype=torch.int64, device=device)
    with torch.cuda.device(device if device.type == "cuda" else -1):
        if changes:
            rice_cuda.collect[(end - skipped,)](
                group.lines, group.segments, seen.each, seen.each.cumsum(0) - seen.each - before, seen.bits, keys,
                steps, tallies, skipped, HALVES=32 // group.width, SEGMENT=rice_cuda.SEGMENT,
                FIELDS=group.lines.shape[1], CHUNK=rice_cuda.CHUNK, BINS=rice_cuda.BINS, num_warps=_WARPS,
            )  # fmt: skip
    return _Found(
        seen=seen, mine=slice(first, last), tallies=tallies[first:last, :33], keys=keys, steps=steps,
        origins=(group.ends[first:last] - skipped) * group.elements,
    )  # fmt: skip


def _encode(found: _Found, arriving: list[torch.cuda.Event]) -> list[tuple[Delta, int]]:
    seen, mine, group = found.seen, found.mine, found.seen.group
    dtypes, numels, counts = group.dtypes[mine], group.numels[mine], seen.counts[mine]
    device, width = found.keys.device, group.width
    block_bits = block_bits_of(counts, numels)
    parts = parts_of(np.where(counts > 0, -(-numels >> block_bits), 0), device)
    each = parts.each
    numel, shift, origin = sent(np.stack([numels, block_bits, found.origins]), device)[:, parts.of]
    first = parts.number << shift
    length = torch.minimum(torch.ones_like(first) << shift, numel - first)
    first = first + origin
    begins = torch.cat([torch.searchsorted(found.keys, first), first.new_full((1,), len(found.keys))])
    unit_bits = (found.tallies[:, None] * sent(unit_costs(width), device)).sum(2).argmin(1)
    blocks = torch.zeros(len(first), 6, dtype=torch.int64, device=device)
    blocks[:, 0], blocks[:, 1], blocks[:, 2] = first, length, unit_bits[parts.of]
    words = torch.zeros_like(first)
    how = {"FIELDS": blocks.shape[1], "CHUNK": rice_cuda.CHUNK, "num_warps": 1}
    with torch.cuda.device(device if device.type == "cuda" else -1):
        if len(blocks):
            rice_cuda.weigh[(len(blocks),)](blocks, begins, found.keys, found.steps, words, **how)
        # Where a number of a table is too large for 16 bits, its tensor's table is wider.
        large = torch.maximum(begins.diff(), words) > 0xFFFF
        known = torch.cat([parts.totals([words, large.to(torch.int64)]), unit_bits[None]])
        sizes, larges, chosen = brought(known)
        entries = np.where(larges > 0, 8, 4)
        texts = HEAD_BYTES + each * entries
        nbytes = texts + 4 * sizes + SEAL_BYTES
        places = ends_of(nbytes, ALIGNMENT)
        target = torch.zeros(int(places[-1]) // 4, dtype=torch.int32, device=device)
        tables, texts = places[:-1] + HEAD_BYTES, places[:-1] + texts
        begin = np.stack([texts // 4 - (np.cumsum(sizes) - sizes), tables // 4, entries // 4])
        text, entry, step = sent(begin, device)[:, parts.of]
        blocks[:, 3], blocks[:, 4], blocks[:, 5] = words.cumsum(0) - words + text, entry + parts.number * step, step
        if len(blocks):
            rice_cuda.write[(len(blocks),)](blocks, begins, found.keys, found.steps, target, **how)
        sums = seen.sums[mine].astype(np.uint64)
        heads = heads_with(
            dtypes, block_bits=block_bits, unit_bits=chosen, entry=entries, nbytes=nbytes,
            start=group.starts[mine], numel=numels, count=counts, before=sums[:, :2], after=sums[:, 2:],
        )  # fmt: skip
        _finish(target, heads, places[:-1])
    data = torch.empty(target.numel(), dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
    data.copy_(target, non_blocking=True)
    if device.type == "cuda":
        arriving.append(torch.cuda.current_stream(device).record_event())
    # While the device is at it.
    # By one call: of hundreds each alone would take longer.
    gaps = places[1:] - places[:-1] - nbytes
    raws = torch.split(data.view(torch.uint8), np.stack([nbytes, gaps], axis=1).reshape(-1).tolist())[::2]
    facts = "start", "numel", "count", "before", "after", "block_bits", "unit_bits", "entry"
    deltas = [
        Delta(
            dtype=dtype, start=start, numel=numel, count=count, before=Digest(*before), after=Digest(*after),
            block_bits=bits, unit_bits=low, entry=wide, data=raw,
        )
        for dtype, raw, start, numel, count, before, after, bits, low, wide in zip(
            dtypes, raws, *(heads[fact].tolist() for fact in facts), strict=True
        )
    ]  # fmt: skip
    return [*zip(deltas, seen.nonfinite[mine].tolist(), strict=True)]


def _finish(target: torch.Tensor, heads: Heads, places: Array) -> None:
    """Heads, and seals, for deltas at bytes `places` of `target`."""
    device, nbytes = target.device, heads["nbytes"].astype(np.int64)
    rows = places[:, None] // 4 + np.arange(HEAD_BYTES // 4)
    target[sent(rows, device)] = sent(heads.view(np.int32).reshape(len(heads), -1), device)
    # Of all bytes but the seal's own.
    lines = digest_cuda.byte_lines(target.data_ptr() + places, nbytes - SEAL_BYTES)
    digests = digest_cuda.sum_lines(digest_cuda.table(lines, device))[:, :2].contiguous()
    rows = (places + nbytes - SEAL_BYTES)[:, None] // 4 + np.arange(SEAL_BYTES // 4)
    target[sent(rows, device)] = digests.view(torch.int32)


def parse_all(names: Sequence[str], memory: torch.Tensor, begins: Array, sizes: Array, scans: Sequence[Scan]) -> Deltas:
    """What `delta.parse` finds out about each of many, of so many bytes in `memory`, which is aligned like their
    beginnings to 4 of them at least; `scans`: what `digest.scan` gives of all their bytes."""
    device, addresses = memory.device, memory.data_ptr() + begins
    table = torch.empty(len(begins), HEAD_BYTES + SEAL_BYTES, dtype=torch.uint8, device=device)
    with torch.cuda.device(device if device.type == "cuda" else -1):
        if len(begins):
            runs = sent(np.stack([addresses, sizes], axis=1), device)
            rice_cuda.read_ends[(len(begins),)](runs, table, HEAD=HEAD_BYTES, SEAL=SEAL_BYTES)
    ends = brought(table)
    seals = torch.from_numpy(ends[:, HEAD_BYTES:].copy())
    of_seals = scan_rows(seals, np.maximum(sizes - SEAL_BYTES, 0))
    intact = (Scans.of(scans).digests - of_seals == seals.numpy().view(np.uint64)).all(axis=1)
    return Deltas(heads_of(names, ends[:, :HEAD_BYTES], sizes, intact), memory, begins)


def together(deltas: Sequence[Delta], device: torch.device) -> Deltas:
    """Deltas whose bytes are on the CPU, as many on a device; on its current stream, and they must stay until then."""
    heads = np.frombuffer(bytearray().join(delta.head() for delta in deltas), HEAD)
    data, first = [delta.data for delta in deltas], deltas[0].data
    addresses = np.array([each.data_ptr() for each in data])
    begins, memories = addresses - addresses[0], {each.untyped_storage().data_ptr() for each in data}
    # Those that were encoded together lie one behind the other, and are copied by one call.
    if len(memories) > 1 or begins.min() < 0 or (begins % ALIGNMENT).any():
        begins = ends_of(heads["nbytes"].astype(np.int64), ALIGNMENT)
        memory = torch.empty(int(begins[-1]), dtype=torch.uint8, device=device)
        for each, begin in zip(data, begins.tolist(), strict=False):
            memory[begin : begin + each.numel()].copy_(each, non_blocking=True)
        return Deltas(heads, memory, begins[:-1])
    size = int((begins + heads["nbytes"].astype(np.int64)).max())
    memory = first.as_strided((size,), (1,), first.storage_offset()).to(device, non_blocking=True)
    return Deltas(heads, memory, begins)


def decode_all(names: Sequence[str], deltas: Deltas) -> Changes:
    """The changes of deltas that are on one device. Raises `VerificationError` like `delta.decode`, for what can be
    found out without their bases. What it allocates, the bytes and the counted elements bound."""
    device, heads, address = deltas.memory.device, deltas.heads, deltas.memory.data_ptr() + deltas.begins
    facts = ["nbytes", "entry", "block_bits", "unit_bits", "numel", "count"]
    nbytes, entry, block_bits, unit_bits, numel, count = np.array([heads[fact] for fact in facts], np.int64)
    width, blocks = widths_of(heads), blocks_of(numel, count, block_bits)
    tables, origins = address + HEAD_BYTES, ends_of(numel)
    texts = tables + blocks * entry
    lines = np.stack([tables, entry, texts, block_bits, unit_bits, width, numel, origins[:-1]], axis=1)
    parts = parts_of(blocks, device)
    total, table = len(parts.of), sent(lines, device)
    counts, words = torch.zeros(2, total, dtype=torch.int64, device=device)
    with torch.cuda.device(device if device.type == "cuda" else -1):
        if total:
            rice_cuda.read_table[(-(-total // rice_cuda.CHUNK),)](
                table, parts.of, parts.number, counts, words, total, FIELDS=lines.shape[1], CHUNK=rice_cuda.CHUNK
            )
        _check_tables(names, count, (address + nbytes - SEAL_BYTES - texts) // 4, table, parts, counts, words)
        changes = ends_of(count).tolist()
        keys = torch.empty(changes[-1], dtype=torch.int64, device=device)
        steps = torch.empty(changes[-1], dtype=torch.int32, device=device)
        wrong = torch.zeros(total, dtype=torch.int8, device=device)
        before = words.cumsum(0) - words
        if total:
            starts = before[parts.bounds[:-1].clamp(max=total - 1)]
            rice_cuda.read[(-(-total // rice_cuda.LANES),)](
                table, parts.of, parts.number, counts, counts.cumsum(0) - counts, words, before - starts[parts.of],
                keys, steps, wrong, total, FIELDS=lines.shape[1], LANES=rice_cuda.LANES,
                TILE=rice_cuda.TILE, num_warps=1,
            )  # fmt: skip
    if brought(wrong.any()):
        block = int(wrong.argmax())
        n = int(parts.of[block])
        raise harmed(names[n], f"its block {block - parts.ends[n]} of {parts.each[n]} cannot be decoded")
    return Changes(keys=keys, steps=steps, ends=changes, origins=origins[:-1].tolist())


def _check_tables(
    names: Sequence[str],
    changes: Array,
    rooms: Array,
    lines: torch.Tensor,
    parts: Parts,
    counts: torch.Tensor,
    words: torch.Tensor,
) -> None:
    shift, numel = lines[:, [3, 6]].T[:, parts.of]
    first = parts.number << shift
    length = torch.minimum(torch.ones_like(first) << shift, numel - first)
    found, filled, long = brought(parts.totals([counts, words, (counts > length).to(torch.int64)]))
    if (wrong := np.flatnonzero((found != changes) | (long > 0))).size:
        raise harmed(names[wrong[0]], f"its blocks do not hold {changes[wrong[0]]} changes")
    # A change takes three bits at least: what is allocated for it has come in.
    if (wrong := np.flatnonzero((filled != rooms) | (changes * 3 > rooms * 32))).size:
        raise harmed(names[wrong[0]], f"its blocks do not fill its {rooms[wrong[0]]} words")
