"""The bit coding of deltas on a CPU: which elements changed and by how much, into bits and back.

Plain arrays, no headers: `docs/delta-format.md` specifies the bits and `delta.py` the bytes around them. A change is a
place (int64, ascending) and a step (int64, not 0): how far the new value is from the old one in the order of all bit
patterns, in units in the last place, modulo 2 to the number of bits. Bits fill 32-bit words from the lowest up.

Rice codes: R. F. Rice, "Some practical universal noiseless coding techniques" (1979). Their parameter for a known
density: A. Kiely, "Selecting the Golomb parameter in Rice coding" (2004). Steps take the exponential variant of
J. Teuhola, "A compression method for clustered bit-vectors" (1978), which has no need of an escape.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

__all__ = ["add", "find", "gap_bits", "merge", "read", "subtract", "tally", "weigh", "write"]

_CHUNK = 512  # words at a time: they stay in the first-level cache


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _widen(array: Any, count: Any, room: Any) -> Any:
    if count + room <= array.size:
        return array
    wider = np.empty(2 * array.size + room, array.dtype)
    wider[:count] = array[:count]
    return wider


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def find(base: Any, new: Any) -> Any:
    """Where two arrays of bits differ, uint16 or uint32, whose memory begins at a multiple of 8 bytes: the places, and
    what stands there in each.
    """
    # First words, then elements of words that differ, both without a branch on what cannot be foreseen: what is no
    # difference is written over by the next.
    lanes = 8 // base.itemsize
    whole = base.size // lanes
    one = base[: whole * lanes].view(np.uint64)
    other = new[: whole * lanes].view(np.uint64)
    places = np.empty(base.size // 64 + lanes, np.int64)
    olds = np.empty(places.size, base.dtype)
    news = np.empty(places.size, base.dtype)
    hits = np.empty(_CHUNK, np.int64)
    count = 0
    for begin in range(0, whole + 1, _CHUNK):
        found = 0
        for word in range(begin, min(begin + _CHUNK, whole)):
            hits[found] = word
            found += one[word] != other[word]
        room = (found + 1) * lanes
        places, olds, news = _widen(places, count, room), _widen(olds, count, room), _widen(news, count, room)
        first = count
        for hit in range(found):
            for i in range(hits[hit] * lanes, (hits[hit] + 1) * lanes):
                places[count] = i
                count += base[i] != new[i]
        if begin + _CHUNK > whole:  # the last: elements that fill no word
            for i in range(whole * lanes, base.size):
                places[count] = i
                count += base[i] != new[i]
        for i in range(first, count):
            olds[i], news[i] = base[places[i]], new[places[i]]
    return places[:count], olds[:count], news[:count]


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _rank(bits: Any, width: Any) -> Any:
    # Where a bit pattern stands in the order of floats: -NaN, -Inf, ... -0, 0, ... Inf, NaN.
    value = np.int64(bits)
    sign = np.int64(1) << (width - 1)
    return (2 * sign - 1) ^ value if value & sign else value ^ sign


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _wrap(difference: Any, width: Any) -> Any:
    half = np.int64(1) << (width - 1)
    return ((difference + half) & (2 * half - 1)) - half


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def subtract(old: Any, new: Any, width: Any, steps: Any) -> None:
    """How far it is from old bits to new ones, of `width` bits, into `steps`."""
    for i in range(steps.size):
        steps[i] = _wrap(_rank(new[i], width) - _rank(old[i], width), width)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def add(old: Any, steps: Any, width: Any, new: Any) -> None:
    """The bits that are `steps` away from old ones, into `new`."""
    every = (np.int64(1) << width) - 1
    for i in range(steps.size):
        rank = (_rank(old[i], width) + steps[i]) & every
        # The order is turned back into bits as bits are into the order, with the halves swapped.
        new[i] = rank ^ ((every + 1) >> 1) if rank & ((every + 1) >> 1) else rank ^ every


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _bit_length(value: Any) -> Any:
    length = np.int64(0)
    while value > 0:
        value >>= 1
        length += 1
    return length


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def gap_bits(count: Any, length: Any) -> Any:
    """The Rice parameter of the gaps between `count` (not 0) places among `length`."""
    # Kiely's optimum for geometric gaps: floor(log2(2 ln(golden ratio) * (mean gap + 1/2))), in integers.
    return max(_bit_length((2 * length - count) * 493 // (1024 * count)) - 1, 0)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def tally(steps: Any) -> Any:
    """How many steps are of each size, as bits of their distance less one: int64, 33."""
    sizes = np.zeros(33, np.int64)
    for i in range(steps.size):
        sizes[_bit_length(abs(steps[i]) - 1)] += 1
    return sizes


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def weigh(places: Any, steps: Any, numel: Any, block_bits: Any, unit_bits: Any, table: Any) -> None:
    """Count every block's changes and the words that they take, into `table`: int64, (blocks, 2), zeros."""
    i = 0
    while i < places.size:
        block = places[i] >> block_bits
        first = block << block_bits
        stop = min(first + (np.int64(1) << block_bits), numel)
        end = i + 1
        while end < places.size and places[end] < stop:
            end += 1
        low = gap_bits(end - i, stop - first)
        bits = np.int64(0)
        previous = first - 1
        for j in range(i, end):
            bits += ((places[j] - previous - 1) >> low) + 1 + low
            previous = places[j]
            units = abs(steps[j]) - 1
            bits += 2 * _bit_length((units >> unit_bits) + 1) + unit_bits
        table[block, 0] = end - i
        table[block, 1] = (bits + 31) >> 5
        i = end


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _flush(words: Any, at: Any, held: Any, bits: Any) -> Any:
    while bits >= 32:
        words[at] = held & 0xFFFFFFFF
        at += 1
        held >>= 32
        bits -= 32
    return at, held, bits


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def write(places: Any, steps: Any, numel: Any, block_bits: Any, unit_bits: Any, table: Any, words: Any) -> None:
    """Write every block's changes into `words`, uint32, as `weigh` has found room for them in `table`."""
    i = 0
    start = np.int64(0)
    for block in range(table.shape[0]):
        first = np.int64(block) << block_bits
        count = table[block, 0]
        if count == 0:
            continue
        low = gap_bits(count, min(np.int64(1) << block_bits, numel - first))
        previous = first - 1
        at = start
        held = np.int64(0)
        bits = np.int64(0)
        for j in range(i, i + count):
            gap = places[j] - previous - 1
            previous = places[j]
            at, held, bits = _flush(words, at, held, bits + (gap >> low))
            held |= ((gap & ((np.int64(1) << low) - 1)) << 1 | 1) << bits
            at, held, bits = _flush(words, at, held, bits + 1 + low)
            units = abs(steps[j]) - 1
            above = (units >> unit_bits) + 1
            more = _bit_length(above) - 1
            held |= np.int64(steps[j] < 0) << bits
            at, held, bits = _flush(words, at, held, bits + 1 + more)
            held |= ((above - (np.int64(1) << more)) << 1 | 1) << bits
            at, held, bits = _flush(words, at, held, bits + 1 + more)
            held |= (units & ((np.int64(1) << unit_bits) - 1)) << bits
            at, held, bits = _flush(words, at, held, bits + unit_bits)
        if bits:
            words[at] = held
        i += count
        start += table[block, 1]


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _peek(words: Any, at: Any) -> Any:
    # At least 32 bits from bit `at` on; a place beyond the end is moved before it, the caller notices by `at`.
    word = min(at >> 5, words.size - 2)
    shift = at & 31
    low = np.int64(words[word]) >> shift
    return low | np.int64(words[word + 1]) << (32 - shift) & 0xFFFFFFFF


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _zeros(words: Any, at: Any, stop: Any) -> Any:
    # Zeros before the next one, or what leads to `stop` or beyond.
    count = np.int64(0)
    while at + count < stop:
        window = _peek(words, at + count)
        if window:
            while not window & 1:
                window >>= 1
                count += 1
            return count
        count += 32
    return count


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _field(words: Any, at: Any, length: Any) -> Any:
    return _peek(words, at) & ((np.int64(1) << length) - 1)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def read(
    words: Any, table: Any, numel: Any, block_bits: Any, unit_bits: Any, width: Any, places: Any, steps: Any
) -> Any:
    """Read the changes of every block into `places` and `steps`; the first block that does not hold, or -1.

    The caller has seen to it that counts in `table` (int64, (blocks, 2)) are within their blocks and add up to the size
    of the outputs, that lengths are within `words` (uint32) and that two words more follow.
    """
    i = 0
    start = np.int64(0)
    for block in range(table.shape[0]):
        first = np.int64(block) << block_bits
        count = table[block, 0]
        at = start << 5
        start += table[block, 1]
        if not _read_block(
            words, at, start << 5, first, min(first + (np.int64(1) << block_bits), numel), unit_bits, width,
            places[i : i + count], steps[i : i + count],
        ):  # fmt: skip
            return block
        i += count
    return -1


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _read_block(
    words: Any, at: Any, stop: Any, first: Any, last: Any, unit_bits: Any, width: Any, places: Any, steps: Any
) -> Any:
    low = gap_bits(places.size, last - first) if places.size else 0
    place = first - 1
    for i in range(places.size):
        zeros = _zeros(words, at, stop)
        at += zeros + 1
        place += (zeros << low) + _field(words, at, low) + 1
        at += low
        if at >= stop or place >= last:
            return False
        falls = _field(words, at, 1)
        at += 1
        more = _zeros(words, at, stop)
        at += more + 1
        if more >= width:
            return False
        above = _field(words, at, more) + (np.int64(1) << more) - 1
        at += more
        units = (above << unit_bits) + _field(words, at, unit_bits)
        at += unit_bits
        if at > stop or units >> (width - 1):
            return False
        places[i] = place
        steps[i] = -units - 1 if falls else units + 1
    # What is left of the last word is zeros.
    return stop - at < 32 and (at == stop or _field(words, at, stop - at) == 0)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def merge(places: Any, steps: Any, later: Any, further: Any, width: Any) -> Any:
    """Changes, and later ones after them, as one: places and steps, without what went back to where it was."""
    at = np.empty(places.size + later.size, np.int64)
    by = np.empty(at.size, np.int64)
    count = i = j = 0
    while i < places.size or j < later.size:
        if j == later.size or (i < places.size and places[i] < later[j]):
            at[count], by[count] = places[i], steps[i]
            i += 1
        elif i == places.size or later[j] < places[i]:
            at[count], by[count] = later[j], further[j]
            j += 1
        else:
            at[count], by[count] = places[i], _wrap(steps[i] + further[j], width)
            i += 1
            j += 1
        count += by[count] != 0
    return at[:count].copy(), by[:count].copy()
