"""Deltas of tensors on a GPU: the same bytes as `delta.encode` makes, and the same ones taken and refused.

All tensors of a device go through each launch together, with a handful of waits for numbers in between. Encoding reads
the tensors and their bases once. The memory it takes is that of the changes, some 20 bytes for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from weightwire.errors import UsageError
from weightwire.updates import digest_cuda, rice_cuda
from weightwire.updates.delta import (
    DELTA_DTYPES,
    HEAD_BYTES,
    SEAL_BYTES,
    Delta,
    block_bits_of,
    harmed,
    opened,
    unit_bits_of,
)
from weightwire.updates.digest import NO_DIGEST, Digest, Scan, settle, word_facts

__all__ = ["Changes", "decode_all", "encode_all", "parse_all"]

_ALIGNMENT = 16  # what a detecting program reads at once
_ROOM = 16  # of so many elements one changes, it is assumed at first; where more do, they are found again


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What deltas change, on their device: `keys` (int64, ascending) and `steps` (int32). The changes of delta `t` are
    those from `ends[t]` to `ends[t + 1]`, and of its elements the first has the key `origins[t]`."""

    keys: torch.Tensor
    steps: torch.Tensor
    ends: Sequence[int]
    origins: Sequence[int]


def encode_all(
    names: Sequence[str],
    bases: Sequence[torch.Tensor],
    news: Sequence[torch.Tensor],
    *,
    starts: Sequence[int] | None = None,
) -> list[tuple[Delta, int]]:
    """The delta from each base to what it became, like `delta.encode`, and how many NaN and Inf are in the latter. All
    are contiguous and on one device; the deltas' bytes are on the CPU. Both digests are computed. Raises `UsageError`.
    """
    for name, base, new in zip(names, bases, news, strict=True):
        alike = (base.dtype, base.shape, base.device) == (new.dtype, new.shape, new.device)
        if not alike or base.dtype not in DELTA_DTYPES or not base.is_contiguous() or not new.is_contiguous():
            raise UsageError(
                f"{name!r}: no delta from {base.dtype} of {tuple(base.shape)} on {base.device} to {new.dtype} of"
                f" {tuple(new.shape)} on {new.device}",
                next_step=f"Both must be alike and contiguous, of {', '.join(map(str, DELTA_DTYPES))}.",
            )
    starts = starts or [0] * len(bases)
    made: list[tuple[Delta, int]] = [None] * len(bases)  # type: ignore[list-item]
    for width in (2, 4):
        mine = [n for n, base in enumerate(bases) if base.element_size() == width]
        if mine:
            found = _detect([bases[n] for n in mine], [news[n] for n in mine], [starts[n] for n in mine])
            for n, each in zip(mine, _encode(found), strict=True):
                made[n] = each
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """Tensors of one width, compared: of each its digests before and after and its NaN and Inf, `counts` of changes,
    and the tally of their steps; of all changes `keys` and `steps`."""

    news: Sequence[torch.Tensor]
    starts: Sequence[int]
    before: Sequence[Digest]
    after: Sequence[Scan]
    counts: Sequence[int]
    tallies: np.ndarray
    keys: torch.Tensor
    steps: torch.Tensor
    origins: Sequence[int]


def _detect(bases: Sequence[torch.Tensor], news: Sequence[torch.Tensor], starts: Sequence[int]) -> _Found:
    device, halves = bases[0].device, 4 // bases[0].element_size()
    held = [[tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone() for tensor in pair]
            for pair in zip(bases, news, strict=True)]  # fmt: skip
    lines = np.array(
        [
            (b.data_ptr(), n.data_ptr(), n.numel() // halves, n.numel() % halves, start * n.element_size(),
             *word_facts(n.dtype)[:2])
            for (b, n), start in zip(held, starts, strict=True)
        ],
        np.int64,
    )  # fmt: skip
    each = [-(-new.numel() // (halves * rice_cuda.SEGMENT)) for new in news]
    ends = [0, *accumulate(each)]
    total, elements = ends[-1], halves * rice_cuda.SEGMENT
    of, number = _spread(each, device)
    segments = torch.stack([of, number], dim=1).to(torch.int32)
    table = torch.from_numpy(lines).to(device)
    counts, ats = (torch.empty(total, dtype=torch.int64, device=device) for _ in range(2))
    sums = torch.empty(5, total, dtype=torch.int64, device=device)
    capacity = sum(new.numel() for new in news) // _ROOM + 1
    with torch.cuda.device(device if device.type == "cuda" else -1):
        while True:
            found = torch.empty(capacity, dtype=torch.int64, device=device)
            counter = torch.zeros((), dtype=torch.int64, device=device)
            if total:
                rice_cuda.detect[(total,)](
                    table, segments, counts, ats, sums, found, counter, capacity, total, HALVES=halves,
                    SIZE=rice_cuda.SEGMENT, FIELDS=lines.shape[1], num_warps=4,
                )  # fmt: skip
            facts = _totals(torch.cat([counts[None], sums]), ends)
            changes = sum(facts[0])
            if changes <= capacity:
                break
            capacity = changes
        keys = torch.empty(changes, dtype=torch.int64, device=device)
        steps = torch.empty(changes, dtype=torch.int32, device=device)
        tallies = torch.zeros(len(news), rice_cuda.BINS, dtype=torch.int64, device=device)
        if changes:
            rice_cuda.order[(total,)](
                segments, counts, ats, counts.cumsum(0) - counts, found, keys, steps, tallies, HALVES=halves,
                ELEMENTS=elements, CHUNK=rice_cuda.CHUNK, BINS=rice_cuda.BINS, num_warps=1,
            )  # fmt: skip
    # A sum of int64 may have a sign; a digest has none.
    before, after = (
        [Digest(low, high) + NO_DIGEST for low, high in zip(*facts[at : at + 2], strict=True)] for at in (1, 3)
    )
    return _Found(
        news=news, starts=starts, before=before,
        after=[Scan(*both) for both in zip(after, facts[5], strict=True)],
        counts=facts[0], tallies=tallies.cpu().numpy()[:, :33], keys=keys, steps=steps,
        origins=[end * elements for end in ends[:-1]],
    )  # fmt: skip


def _encode(found: _Found) -> list[tuple[Delta, int]]:
    device, itemsize = found.keys.device, found.news[0].element_size()
    numels = [new.numel() for new in found.news]
    block_bits = [block_bits_of(count, numel) for count, numel in zip(found.counts, numels, strict=True)]
    unit_bits = [unit_bits_of(tally, 8 * itemsize) for tally in found.tallies]
    each = [-(-n >> bits) if count else 0 for n, bits, count in zip(numels, block_bits, found.counts, strict=True)]
    ends = [0, *accumulate(each)]
    of, number = _spread(each, device)
    facts = torch.tensor([numels, block_bits, unit_bits, found.origins], dtype=torch.int64, device=device)
    first = number << facts[1][of]
    length = torch.minimum(torch.ones_like(first) << facts[1][of], facts[0][of] - first)
    first = first + facts[3][of]
    begins = torch.cat([torch.searchsorted(found.keys, first), torch.tensor([found.keys.numel()], device=device)])
    blocks = torch.stack([first, length, facts[2][of], torch.zeros_like(first)], dim=1)
    words = torch.zeros(ends[-1], dtype=torch.int64, device=device)
    how = {"FIELDS": blocks.shape[1], "CHUNK": rice_cuda.CHUNK, "num_warps": 1}
    with torch.cuda.device(device if device.type == "cuda" else -1):
        if ends[-1]:
            rice_cuda.weigh[(ends[-1],)](blocks, begins, found.keys, found.steps, words, **how)
        # Where a number of a table is too large for 16 bits, its tensor's table is wider.
        table = torch.stack([begins.diff(), words])
        large = (table.amax(0) > 0xFFFF).to(torch.int64)
        sizes, larges = _totals(torch.stack([words, large]), ends)
        entries = [8 if any_large else 4 for any_large in larges]
        nbytes = [
            HEAD_BYTES + n * entry + 4 * size + SEAL_BYTES for n, entry, size in zip(each, entries, sizes, strict=True)
        ]
        places = [0, *accumulate(-(-n // _ALIGNMENT) * _ALIGNMENT for n in nbytes)]
        target = torch.zeros(places[-1] // 4, dtype=torch.int32, device=device)
        tables = torch.tensor([(place + HEAD_BYTES) // 4 for place in places[:-1]], device=device)
        wide = torch.tensor(entries, device=device)[of] == 8
        _write_table(target, tables[of] + number * torch.where(wide, 2, 1), wide, table)
        texts = [(p + HEAD_BYTES + n * e) // 4 for p, n, e in zip(places, each, entries, strict=False)]
        before = words.cumsum(0) - words
        starts = torch.cat([before, before.new_zeros(1)])[torch.tensor(ends[:-1], device=device)]
        blocks[:, 3] = before + (torch.tensor(texts, device=device) - starts)[of]
        if ends[-1]:
            rice_cuda.write[(ends[-1],)](blocks, begins, found.keys, found.steps, target, **how)
    shells = [
        Delta(
            dtype=new.dtype, start=found.starts[n], numel=new.numel(), count=found.counts[n], before=found.before[n],
            after=found.after[n].digest, block_bits=block_bits[n], unit_bits=unit_bits[n], entry=entries[n],
            data=torch.empty(nbytes[n], dtype=torch.uint8, device="meta"),
        )
        for n, new in enumerate(found.news)
    ]  # fmt: skip
    return [*zip(_finished(shells, target, places), (scanned.nonfinite for scanned in found.after), strict=True)]


def _write_table(target: torch.Tensor, at: torch.Tensor, wide: torch.Tensor, table: torch.Tensor) -> None:
    counts, words = table
    target[at] = torch.where(wide, counts, counts | words << 16).to(torch.int32)
    target[at[wide] + 1] = words[wide].to(torch.int32)


def _finished(shells: Sequence[Delta], target: torch.Tensor, places: Sequence[int]) -> Iterator[Delta]:
    """Deltas of which `target` has all but heads and seals, from bytes `places` on, on the CPU."""
    device = target.device
    heads = torch.frombuffer(bytearray().join(shell.head() for shell in shells), dtype=torch.int32)
    rows = torch.tensor(places[:-1], device=device)[:, None] // 4
    target[rows + torch.arange(HEAD_BYTES // 4, device=device)] = heads.view(len(shells), -1).to(device)
    digests = _digests([(target.data_ptr() + p, s.nbytes) for p, s in zip(places, shells, strict=False)], device)
    data = torch.empty(target.numel(), dtype=torch.int32, pin_memory=device.type == "cuda")
    data.copy_(target)
    raw = data.view(torch.uint8)
    for shell, place, digest in zip(shells, places, digests, strict=False):
        delta = Delta(
            dtype=shell.dtype, start=shell.start, numel=shell.numel, count=shell.count, before=shell.before,
            after=shell.after, block_bits=shell.block_bits, unit_bits=shell.unit_bits, entry=shell.entry,
            data=raw[place : place + shell.nbytes],
        )  # fmt: skip
        delta.seal(digest)
        yield delta


def parse_all(names: Sequence[str], data: Sequence[torch.Tensor]) -> list[Delta]:
    """What `delta.parse` gives for each of many, whose bytes (uint8, 1-D) are on one device and stay there."""
    if not data:
        return []
    ends = torch.cat([part for raw in data for part in (raw[:HEAD_BYTES], raw[-SEAL_BYTES:])]).cpu().numpy().tobytes()
    digests = _digests([(raw.data_ptr(), raw.numel()) for raw in data], data[0].device)
    deltas, at = [], 0
    for name, raw, digest in zip(names, data, digests, strict=True):
        head, seal = min(raw.numel(), HEAD_BYTES), min(raw.numel(), SEAL_BYTES)
        deltas.append(opened(name, raw, ends[at : at + head], ends[at + head : at + head + seal], digest))
        at += head + seal
    return deltas


def decode_all(names: Sequence[str], deltas: Sequence[Delta]) -> Changes:
    """The changes of deltas whose bytes are on one device. Raises `VerificationError` like `delta.decode`, for what
    can be found out without their bases. What it allocates, the bytes and the counted elements bound."""
    device = deltas[0].data.device
    data = [d.data if d.data.data_ptr() % 4 == 0 else d.data.clone() for d in deltas]
    each = [delta.blocks for delta in deltas]
    ends = [0, *accumulate(each)]
    origins = [0, *accumulate(delta.numel for delta in deltas)]
    texts = [HEAD_BYTES + delta.blocks * delta.entry for delta in deltas]
    lines = np.array(
        [
            (raw.data_ptr() + HEAD_BYTES, d.entry, raw.data_ptr() + text, d.block_bits, d.unit_bits,
             8 * d.dtype.itemsize, d.numel, origin)
            for d, raw, text, origin in zip(deltas, data, texts, origins, strict=False)
        ],
        np.int64,
    )  # fmt: skip
    table = torch.from_numpy(lines).to(device)
    of, number = _spread(each, device)
    counts, words = torch.zeros(2, ends[-1], dtype=torch.int64, device=device)
    programs = -(-ends[-1] // rice_cuda.CHUNK)
    with torch.cuda.device(device if device.type == "cuda" else -1):
        if programs:
            rice_cuda.read_table[(programs,)](
                table, of, number, counts, words, ends[-1], FIELDS=lines.shape[1], CHUNK=rice_cuda.CHUNK
            )
        _check_tables(names, deltas, lines, (of, number, counts, words), ends)
        changes = [0, *accumulate(delta.count for delta in deltas)]
        keys = torch.empty(changes[-1], dtype=torch.int64, device=device)
        steps = torch.empty(changes[-1], dtype=torch.int32, device=device)
        wrong = torch.zeros(ends[-1], dtype=torch.int8, device=device)
        before = words.cumsum(0) - words
        starts = torch.cat([before, before.new_zeros(1)])[torch.tensor(ends[:-1], device=device)]
        programs = -(-ends[-1] // rice_cuda.LANES)
        if programs:
            rice_cuda.read[(programs,)](
                table, of, number, counts, counts.cumsum(0) - counts, words, before - starts[of], keys, steps, wrong,
                ends[-1], FIELDS=lines.shape[1], LANES=rice_cuda.LANES, num_warps=1,
            )  # fmt: skip
    bad = wrong.nonzero()[:1].tolist()
    if bad:
        block = bad[0][0]
        n = int(of[block])
        raise harmed(names[n], f"its block {block - ends[n]} of {each[n]} cannot be decoded")
    return Changes(keys=keys, steps=steps, ends=changes, origins=origins[:-1])


def _check_tables(
    names: Sequence[str],
    deltas: Sequence[Delta],
    lines: np.ndarray,
    blocks: Sequence[torch.Tensor],
    ends: Sequence[int],
) -> None:
    of, number, counts, words = blocks
    facts = torch.from_numpy(lines[:, [3, 6]].T.copy()).to(of.device)
    first = number << facts[0][of]
    length = torch.minimum(torch.ones_like(first) << facts[0][of], facts[1][of] - first)
    sums = _totals(torch.stack([counts, words, (counts > length).to(torch.int64)]), ends)
    for name, delta, count, size, long in zip(names, deltas, *sums, strict=True):
        room = (delta.nbytes - HEAD_BYTES - delta.blocks * delta.entry - SEAL_BYTES) // 4
        if count != delta.count or long:
            raise harmed(name, f"its blocks do not hold {delta.count} changes")
        # A change takes three bits at least: what is allocated for it has come in.
        if size != room or delta.count * 3 > room * 32:
            raise harmed(name, f"its blocks do not fill its {room} words")


def _spread(each: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For `each[i]` parts of each whole: which whole it is of, and which number it has there."""
    total = sum(each)
    counts = torch.tensor(each, dtype=torch.int64, device=device)
    of = torch.repeat_interleave(torch.arange(len(each), device=device), counts, output_size=total)
    return of, torch.arange(total, device=device) - (counts.cumsum(0) - counts)[of]


def _totals(rows: torch.Tensor, ends: Sequence[int]) -> list[list[int]]:
    """Of each row, int64, the sums between neighbouring `ends`; they wrap."""
    sums = torch.nn.functional.pad(rows.cumsum(1), (1, 0))[:, torch.tensor(ends, device=rows.device)]
    totals: list[list[int]] = sums.diff(dim=1).tolist()
    return totals


def _digests(runs: Sequence[tuple[int, int]], device: torch.device) -> list[Digest]:
    """Of each delta at an address its digest, without its seal."""
    lines = [digest_cuda.line_of(at, 0, max(nbytes - SEAL_BYTES, 0), torch.uint8) for at, nbytes in runs]
    return [scan.digest for scan in settle(digest_cuda.scan_lines(digest_cuda.table(lines, device)))]
