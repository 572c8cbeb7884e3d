"""The bit coding of deltas on a GPU, in Triton: the same bits as `rice` writes, and the same ones refused.

Many tensors share each launch, as lines of a table of int64; all pointers in it are to memory of the launch's device.
A key is a place in all of the tensors one after the other, so that the changes of many tensors are one ascending list.
"""

from __future__ import annotations

import triton
import triton.language as tl

from weightwire.updates.factors_cuda import factors, key_of, of_threads

__all__ = [
    "BINS",
    "CHUNK",
    "LANES",
    "SEGMENT",
    "TILE",
    "WORDS",
    "collect",
    "detect",
    "moved",
    "read",
    "read_ends",
    "read_table",
    "sample",
    "weigh",
    "write",
]

SEGMENT = 8192
"""Words of 32 bits that one program compares."""
WORDS = 512
"""Words that it takes at a time."""
CHUNK = 128
"""Changes that a program takes at a time."""
LANES = 32
"""Blocks that one program decodes, each by a lane of its own."""
TILE = 8
"""Changes of each block that it writes at a time."""
BINS = 64
"""Room for a tally of steps by size; 33 are in use."""


# -- the order of bit patterns -----------------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def _rank(bits, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    if WIDTH == 16:
        return tl.where((bits >> 15) != 0, bits ^ 0xFFFF, bits ^ 0x8000)
    return tl.where((bits >> 31) != 0, ~bits, bits ^ tl.full((), 0x80000000, tl.uint32))


@triton.jit  # type: ignore[untyped-decorator]
def _step(old, new, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    step = (_rank(new, WIDTH) - _rank(old, WIDTH)).to(tl.int32, bitcast=True)
    if WIDTH == 16:
        return (step << 16) >> 16
    return step


@triton.jit  # type: ignore[untyped-decorator]
def moved(old, step, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bits, uint32, that are `step`, int32, away from old ones in the order of all bit patterns of that width."""
    rank = _rank(old, WIDTH) + step.to(tl.uint32, bitcast=True)
    if WIDTH == 16:
        rank = rank & 0xFFFF
        return tl.where((rank >> 15) != 0, rank ^ 0x8000, rank ^ 0xFFFF)
    return tl.where((rank >> 31) != 0, rank ^ tl.full((), 0x80000000, tl.uint32), ~rank)


@triton.jit
def _bit_length(value):  # type: ignore[no-untyped-def]
    """Of numbers below 2^32, not negative."""
    length = value * 0
    for power in tl.static_range(4, -1, -1):
        more = (value >> (1 << power)) != 0
        length += tl.where(more, 1 << power, 0)
        value = tl.where(more, value >> (1 << power), value)
    return length + value


@triton.jit
def _gap_bits(count, length):  # type: ignore[no-untyped-def]
    count = tl.maximum(count, 1)
    return tl.maximum(_bit_length((2 * length - count) * 493 // (1024 * count)) - 1, 0)


@triton.jit
def _units(step):  # type: ignore[no-untyped-def]
    """How many units a step has, less one."""
    return tl.where(step < 0, ~step, step - 1)


# -- encoding ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["most"])  # type: ignore[untyped-decorator]
def sample(lines, counts, most, WIDTH: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many differ of `most` elements all over a tensor, or of all if it has fewer. A line: addresses of base and
    new, elements."""
    number = tl.program_id(0).to(tl.int64)
    line = lines + number * 3
    elements = tl.load(line + 2)
    looked = tl.minimum(elements, most)
    if WIDTH == 16:
        base = tl.load(line).to(tl.pointer_type(tl.uint16), bitcast=True)
        new = tl.load(line + 1).to(tl.pointer_type(tl.uint16), bitcast=True)
    else:
        base = tl.load(line).to(tl.pointer_type(tl.uint32), bitcast=True)
        new = tl.load(line + 1).to(tl.pointer_type(tl.uint32), bitcast=True)
    differ = tl.zeros((CHUNK,), tl.int32)
    for i in range(0, looked, CHUNK):
        column = i + tl.arange(0, CHUNK)
        inside = column < looked
        place = column.to(tl.int64) * (elements // tl.maximum(looked, 1))
        old, now = tl.load(base + place, mask=inside, other=0), tl.load(new + place, mask=inside, other=0)
        differ += (old != now).to(tl.int32)
    tl.store(counts + number, tl.sum(differ).to(tl.int64))


@triton.jit
def _full(word, exponent, lowest):  # type: ignore[no-untyped-def]
    """Whether exponents are all ones: of a word's second element, or its only one, in bit 16, of its first in bit 0."""
    return (((word & exponent) + lowest) & (exponent + lowest)) >> 15


@triton.jit  # type: ignore[untyped-decorator]
def _tail(line, field, first, words, HALVES: tl.constexpr, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words from `first` on of what address number `field` of a line leads to, of which there are `words`, and maybe a
    half one; zeros beyond."""
    column = tl.arange(0, WORDS)
    data = tl.load(line + field)
    word = tl.load(data.to(tl.pointer_type(tl.uint32), bitcast=True) + first + column, mask=column < words, other=0)
    if HALVES == 2:
        half = data.to(tl.pointer_type(tl.uint16), bitcast=True) + 2 * first
        inside = tl.where(column == words, tl.load(line + 3), 0) != 0
        word = word | tl.load(half + 2 * column, mask=inside, other=0).to(tl.uint32)
    return word


@triton.jit  # type: ignore[untyped-decorator]
def _mark(old, now, bits, HALVES: tl.constexpr, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write a bit for each element that says whether it differs, and return how many of each word's do."""
    differ = old ^ now
    if HALVES == 2:
        low, high = ((differ & 0xFFFF) != 0).to(tl.int32), ((differ >> 16) != 0).to(tl.int32)
        flag, each = low | (high << 1), low + high
    else:
        flag = (differ != 0).to(tl.int32)
        each = flag
    GROUP: tl.constexpr = 8 // HALVES
    flag = flag << (tl.arange(0, WORDS) % GROUP * HALVES)
    byte = tl.sum(tl.reshape(flag, (WORDS // GROUP, GROUP)), 1)
    tl.store(bits + tl.arange(0, WORDS // GROUP), byte.to(tl.uint8))
    return each


@triton.jit  # type: ignore[untyped-decorator]
def detect(  # type: ignore[no-untyped-def]
    lines,
    segments,
    counts,
    sums,
    bits,
    HALVES: tl.constexpr,
    SEGMENT: tl.constexpr,
    WORDS: tl.constexpr,
    THREADS: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Compare one segment of a tensor with its base, both read once, `WORDS` words at a time. How many elements differ
    goes to `counts`, and a bit for each element to `bits`. To the line's six `sums` it adds the digests of both, how
    many of the new are NaN or infinite, and the count.

    A line: addresses of base and new, multiples of 16; whole words; elements beyond these (one half word or none);
    where its bytes begin in the full tensor; what `digest.word_facts` says of its dtype. `segments`: each one's line
    and its number there.
    """
    segment = tl.program_id(0).to(tl.int64)
    number = tl.load(segments + 2 * segment).to(tl.int64)
    line = lines + number * FIELDS
    first = tl.load(segments + 2 * segment + 1).to(tl.int64) * SEGMENT
    words = tl.load(line + 2) - first
    start = tl.load(line + 4)
    exponent, lowest = tl.load(line + 5).to(tl.uint32), tl.load(line + 6).to(tl.uint32)
    at = (start >> 2) + first
    key = key_of(at)
    bits += segment * (SEGMENT * HALVES // 8)
    sums += number * 6
    column = tl.arange(0, WORDS)
    REPEATS: tl.constexpr = WORDS // THREADS // 4
    before_low = tl.zeros((THREADS,), tl.uint64)
    before_high = tl.zeros((THREADS,), tl.uint64)
    after_low = tl.zeros((THREADS,), tl.uint64)
    after_high = tl.zeros((THREADS,), tl.uint64)
    count = tl.zeros((THREADS,), tl.int32)
    full = tl.zeros((THREADS,), tl.uint32)  # of first and of second elements, in 16 bits each
    if (words >= SEGMENT) & ((start & (4 * SEGMENT - 1)) == 0):
        # Without a mask it is read 16 bytes at a time, and all of it has one key.
        base = tl.load(line).to(tl.pointer_type(tl.uint32), bitcast=True) + first
        new = tl.load(line + 1).to(tl.pointer_type(tl.uint32), bitcast=True) + first
        base, new = tl.multiple_of(base, 16), tl.multiple_of(new, 16)
        for i in range(SEGMENT // WORDS):
            old, now = tl.load(base + i * WORDS + column), tl.load(new + i * WORDS + column)
            low, high = factors((at + i * WORDS + column).to(tl.uint32), key)
            before_low += of_threads(old.to(tl.uint64) * low, REPEATS, THREADS)
            before_high += of_threads(old.to(tl.uint64) * high, REPEATS, THREADS)
            after_low += of_threads(now.to(tl.uint64) * low, REPEATS, THREADS)
            after_high += of_threads(now.to(tl.uint64) * high, REPEATS, THREADS)
            full += of_threads(_full(now, exponent, lowest), REPEATS, THREADS)
            each = _mark(old, now, bits + i * (WORDS * HALVES // 8), HALVES, WORDS)
            count += of_threads(each, REPEATS, THREADS)
    else:
        # A part of a tensor begins anywhere: what is one word here may be halves of two there, and the high half of
        # their index may change on the way.
        shift = ((start & 2) * 8).to(tl.uint32)
        next_key, wraps = key_of(at + 0x100000000), at.to(tl.uint32)
        for i in range(SEGMENT // WORDS):
            old = _tail(line, 0, first + i * WORDS, words - i * WORDS, HALVES, WORDS)
            now = _tail(line, 1, first + i * WORDS, words - i * WORDS, HALVES, WORDS)
            place = (at + i * WORDS + column).to(tl.uint32)
            low, high = factors(place, tl.where(place < wraps, next_key, key))
            before_low += of_threads((old << shift).to(tl.uint64) * low, REPEATS, THREADS)
            before_high += of_threads((old << shift).to(tl.uint64) * high, REPEATS, THREADS)
            after_low += of_threads((now << shift).to(tl.uint64) * low, REPEATS, THREADS)
            after_high += of_threads((now << shift).to(tl.uint64) * high, REPEATS, THREADS)
            if shift != 0:
                place = (at + i * WORDS + column + 1).to(tl.uint32)
                low, high = factors(place, tl.where(place < wraps, next_key, key))
                before_low += of_threads((old >> 16).to(tl.uint64) * low, REPEATS, THREADS)
                before_high += of_threads((old >> 16).to(tl.uint64) * high, REPEATS, THREADS)
                after_low += of_threads((now >> 16).to(tl.uint64) * low, REPEATS, THREADS)
                after_high += of_threads((now >> 16).to(tl.uint64) * high, REPEATS, THREADS)
            full += of_threads(_full(now, exponent, lowest), REPEATS, THREADS)
            each = _mark(old, now, bits + i * (WORDS * HALVES // 8), HALVES, WORDS)
            count += of_threads(each, REPEATS, THREADS)
    tl.atomic_add(sums, tl.sum(before_low).to(tl.int64, bitcast=True), sem="relaxed")
    tl.atomic_add(sums + 1, tl.sum(before_high).to(tl.int64, bitcast=True), sem="relaxed")
    tl.atomic_add(sums + 2, tl.sum(after_low).to(tl.int64, bitcast=True), sem="relaxed")
    tl.atomic_add(sums + 3, tl.sum(after_high).to(tl.int64, bitcast=True), sem="relaxed")
    bad = tl.sum(((full & 0xFFFF) + (full >> 16)).to(tl.int64))
    if bad > 0:
        tl.atomic_add(sums + 4, bad, sem="relaxed")
    changes = tl.sum(count).to(tl.int64)
    tl.store(counts + segment, changes)
    if changes > 0:
        tl.atomic_add(sums + 5, changes, sem="relaxed")


@triton.jit
def _ones(mask):  # type: ignore[no-untyped-def]
    """How many bits of words, uint32, are set."""
    pairs = mask - ((mask >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    bytes = (fours + (fours >> 4)) & 0x0F0F0F0F
    return ((bytes * tl.full((), 0x01010101, tl.uint32)) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["skipped"])  # type: ignore[untyped-decorator]
def collect(  # type: ignore[no-untyped-def]
    lines, segments, counts, begins, bits, keys, steps, tallies, skipped, HALVES: tl.constexpr, SEGMENT: tl.constexpr,
    FIELDS: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Write keys and steps of the changes that `detect` has marked, in order, and tally each line's steps by the bits
    of their units less one. The first `skipped` segments are left out; where each one's changes begin, `begins` says.
    """
    segment = tl.program_id(0).to(tl.int64) + skipped
    count = tl.load(counts + segment)
    if count > 0:
        begin = tl.load(begins + segment)
        number = tl.load(segments + 2 * segment).to(tl.int64)
        MASKS: tl.constexpr = SEGMENT * HALVES // 32
        lane = tl.arange(0, MASKS)
        mask = tl.load(bits.to(tl.pointer_type(tl.uint32), bitcast=True) + segment * MASKS + lane)
        ones = _ones(mask)
        to = begin + tl.cumsum(ones, 0) - ones
        origin = (segment - skipped) * (SEGMENT * HALVES)
        while tl.max((mask != 0).to(tl.int32), axis=0) > 0:
            lowest = mask & (0 - mask)
            place = lane * 32 + _bit_length(lowest).to(tl.int32) - 1
            tl.store(keys + to, origin + place, mask=mask != 0)
            to += 1
            mask = mask ^ lowest
        tl.debug_barrier()  # what is read from here on, other threads of this program have written
        line = lines + number * FIELDS
        if HALVES == 2:
            base = tl.load(line).to(tl.pointer_type(tl.uint16), bitcast=True)
            new = tl.load(line + 1).to(tl.pointer_type(tl.uint16), bitcast=True)
        else:
            base = tl.load(line).to(tl.pointer_type(tl.uint32), bitcast=True)
            new = tl.load(line + 1).to(tl.pointer_type(tl.uint32), bitcast=True)
        back = tl.load(segments + 2 * segment + 1).to(tl.int64) * (SEGMENT * HALVES) - origin
        tally = tl.zeros((BINS,), tl.int32)
        for i in range(0, count, CHUNK):
            column = i + tl.arange(0, CHUNK)
            inside = column < count
            place = back + tl.load(keys + begin + column, mask=inside, other=0)
            old = tl.load(base + place, mask=inside, other=0).to(tl.uint32)
            now = tl.load(new + place, mask=inside, other=0).to(tl.uint32)
            step = _step(old, now, 32 // HALVES)
            tl.store(steps + begin + column, step, mask=inside)
            size = tl.where(inside, _bit_length(_units(step)), BINS - 1)
            tally += tl.histogram(size, BINS)
        bins = tl.arange(0, BINS)
        tl.atomic_add(tallies + number * BINS + bins, tally.to(tl.int64), mask=(tally > 0) & (bins < 33), sem="relaxed")


@triton.jit
def _change(keys, steps, begin, at, inside, first):  # type: ignore[no-untyped-def]
    """Gap and step of changes `at` of a block that begins with change `begin` and key `first`."""
    key = tl.load(keys + at, mask=inside, other=0)
    previous = tl.load(keys + at - 1, mask=inside & (at > begin), other=0)
    gap = key - tl.where(at > begin, previous, first - 1) - 1
    return tl.where(inside, gap, 0), tl.load(steps + at, mask=inside, other=1)


@triton.jit
def _bits(gap, step, low, unit_bits):  # type: ignore[no-untyped-def]
    above = (_units(step).to(tl.int64) >> unit_bits) + 1
    return (gap >> low) + 1 + low + 2 * _bit_length(above) + unit_bits


@triton.jit  # type: ignore[untyped-decorator]
def weigh(blocks, begins, keys, steps, words, FIELDS: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many words each block takes. A block: its first key, its length, its unit bits; and for `write` the words
    where it begins and where its entry in the table does, and how many words that has."""
    block = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(begins + block), tl.load(begins + block + 1)
    line = blocks + block * FIELDS
    first, unit_bits = tl.load(line), tl.load(line + 2)
    low = _gap_bits(end - begin, tl.load(line + 1))
    bits = tl.zeros((CHUNK,), tl.int64)
    for i in range(begin, end, CHUNK):
        at = i + tl.arange(0, CHUNK)
        gap, step = _change(keys, steps, begin, at, at < end, first)
        bits += tl.where(at < end, _bits(gap, step, low, unit_bits), 0)
    tl.store(words + block, (tl.sum(bits) + 31) >> 5)


@triton.jit  # type: ignore[untyped-decorator]
def _put(target, at, value, inside, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Or the bits of `value`, uint64, to those from bit `at` on; neighbours write to the same word at the same time."""
    shift = (at & 31).to(tl.uint64)
    rest = value >> (32 - shift)
    word = (value << shift).to(tl.uint32).to(tl.int32, bitcast=True)
    tl.atomic_or(target + (at >> 5), word, mask=inside & (word != 0), sem="relaxed")
    word = rest.to(tl.uint32).to(tl.int32, bitcast=True)
    tl.atomic_or(target + (at >> 5) + 1, word, mask=inside & (word != 0), sem="relaxed")
    if WORDS == 3:
        word = (rest >> 32).to(tl.uint32).to(tl.int32, bitcast=True)
        tl.atomic_or(target + (at >> 5) + 2, word, mask=inside & (word != 0), sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator]
def write(blocks, begins, keys, steps, target, FIELDS: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write each block's bits, and its entry in the table, into `target`, int32 and zeros."""
    block = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(begins + block), tl.load(begins + block + 1)
    line = blocks + block * FIELDS
    first, unit_bits = tl.load(line), tl.load(line + 2)
    low = _gap_bits(end - begin, tl.load(line + 1))
    bit = tl.load(line + 3) << 5
    for i in range(begin, end, CHUNK):
        change = i + tl.arange(0, CHUNK)
        inside = change < end
        gap, step = _change(keys, steps, begin, change, inside, first)
        length = tl.where(inside, _bits(gap, step, low, unit_bits), 0)
        at = bit + tl.cumsum(length, 0) - length + (gap >> low)
        falls = (step < 0).to(tl.int64)
        _put(target, at, (((gap & ((1 << low) - 1)) << 1) | 1 | (falls << (low + 1))).to(tl.uint64), inside, 2)
        units = _units(step).to(tl.int64)
        above = (units >> unit_bits) + 1
        more = _bit_length(above) - 1
        rest = (units & ((tl.full((), 1, tl.int64) << unit_bits) - 1)) << (more + 1)
        above = ((above - (tl.full((), 1, tl.int64) << more)) << 1) | 1
        _put(target, at + low + 2 + more, (above | rest).to(tl.uint64), inside, 3)
        bit += tl.sum(length)
    count, words = end - begin, ((bit + 31) >> 5) - tl.load(line + 3)
    entry = target + tl.load(line + 4)
    if tl.load(line + 5) == 2:
        tl.store(entry, count.to(tl.int32))
        tl.store(entry + 1, words.to(tl.int32))
    else:
        tl.store(entry, (count | (words << 16)).to(tl.int32))


# -- decoding ----------------------------------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def read_ends(runs, ends, HEAD: tl.constexpr, SEAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first `HEAD` and the last `SEAL` bytes of each run, one behind the other. A run: its address and its bytes,
    of which there may be fewer."""
    run = runs + tl.program_id(0).to(tl.int64) * 2
    data, nbytes = tl.load(run).to(tl.pointer_type(tl.uint8), bitcast=True), tl.load(run + 1)
    place = tl.arange(0, 128)
    at = tl.where(place < HEAD, place, nbytes - SEAL - HEAD + place)
    byte = tl.load(data + at, mask=(at >= 0) & (at < nbytes) & (place < HEAD + SEAL), other=0)
    tl.store(ends + tl.program_id(0).to(tl.int64) * (HEAD + SEAL) + place, byte, mask=place < HEAD + SEAL)


@triton.jit(do_not_specialize=["blocks"])  # type: ignore[untyped-decorator]
def read_table(lines, ofs, numbers, counts, words, blocks, FIELDS: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the tables say of every block: its changes and its words. `ofs` and `numbers`: its line, and its number
    there. A line is as `read` takes it."""
    block = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    inside = block < blocks
    line = lines + tl.load(ofs + block, mask=inside, other=0) * FIELDS
    number = tl.load(numbers + block, mask=inside, other=0)
    table = tl.load(line, mask=inside, other=0).to(tl.pointer_type(tl.uint32), bitcast=True)
    wide = tl.load(line + 1, mask=inside, other=4) == 8
    one = tl.load(table + tl.where(wide, 2 * number, number), mask=inside, other=0).to(tl.int64)
    two = tl.load(table + 2 * number + 1, mask=inside & wide, other=0).to(tl.int64)
    tl.store(counts + block, tl.where(wide, one, one & 0xFFFF), mask=inside)
    tl.store(words + block, tl.where(wide, two, one >> 16), mask=inside)


@triton.jit
def _window(data, at, stop):  # type: ignore[no-untyped-def]
    """The 32 bits from bit `at` on, as int64; beyond `stop`, a whole number of words, they are zeros and not read."""
    word = at >> 5
    source = data.to(tl.pointer_type(tl.uint32), bitcast=True) + word
    low = tl.load(source, mask=word < (stop >> 5), other=0).to(tl.uint64)
    high = tl.load(source + 1, mask=word + 1 < (stop >> 5), other=0).to(tl.uint64)
    return ((((high << 32) | low) >> (at & 31).to(tl.uint64)) & 0xFFFFFFFF).to(tl.int64)


@triton.jit
def _zeros(data, at, stop, limit):  # type: ignore[no-untyped-def]
    """Zeros before the next one; or what leads to `stop` or beyond, or is `limit` at least."""
    count = at * 0
    going = at < stop
    while tl.max(going.to(tl.int32), axis=0) > 0:
        window = _window(data, at + count, stop)
        count += tl.where(going, tl.where(window == 0, 32, _bit_length(window & -window) - 1), 0)
        going = going & (window == 0) & (at + count < stop) & (count < limit)
    return count


@triton.jit
def _field(data, at, stop, length):  # type: ignore[no-untyped-def]
    return _window(data, at, stop) & ((tl.full((), 1, tl.int64) << length) - 1)


@triton.jit
def _lowest_place(bits):  # type: ignore[no-untyped-def]
    """Of uint64: which bit is the lowest that is set, by way of the exponent of a float; below 0 if none is."""
    return ((bits & (0 - bits)).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _low_bits(bits, length):  # type: ignore[no-untyped-def]
    """The lowest of uint64, and what is above them."""
    length = length.to(tl.uint64)
    return (bits & ((tl.full((), 1, tl.uint64) << length) - 1)).to(tl.int64), bits >> length


@triton.jit
def _change_at(data, at, stop, low, unit_bits):  # type: ignore[no-untyped-def]
    """A change that is in the 64 bits from bit `at` on, as all but the longest are, read by one look at memory: the
    zeros of its gap and the bits below, whether it falls, the zeros of its units and the units; how many bits it takes,
    more than 64 if it is not all there. What is beyond `stop` is zeros."""
    word, shift = at >> 5, (at & 31).to(tl.uint64)
    source, words = data.to(tl.pointer_type(tl.uint32), bitcast=True) + word, (stop >> 5) - word
    first = tl.load(source, mask=words > 0, other=0).to(tl.uint64)
    second = tl.load(source + 1, mask=words > 1, other=0).to(tl.uint64)
    third = tl.load(source + 2, mask=words > 2, other=0).to(tl.uint64)
    bits = (((second << 32) | first) >> shift) | ((third << (63 - shift)) << 1)
    zeros = _lowest_place(bits)
    rest = bits >> (tl.maximum(zeros, 0) & 63).to(tl.uint64) >> 1
    gap, rest = _low_bits(rest, low)
    falls, rest = _low_bits(rest, low * 0 + 1)
    more = _lowest_place(rest)
    known = (zeros >= 0) & (more >= 0) & (more < 32)
    more = tl.where(known, more, 0)
    above, rest = _low_bits(rest >> (more + 1).to(tl.uint64), more)
    below, rest = _low_bits(rest, unit_bits)
    units = ((above + (tl.full((), 1, tl.int64) << more) - 1) << unit_bits) + below
    length = tl.where(known, zeros + 2 * more + 3 + low + unit_bits, 65)
    return zeros.to(tl.int64), gap, falls, more.to(tl.int64), units, length.to(tl.int64)


@triton.jit
def _long_change_at(data, at, stop, low, unit_bits, limit):  # type: ignore[no-untyped-def]
    """`_change_at` of any. Of zeros there may be said to be fewer, if there are too many."""
    zeros = _zeros(data, at, stop, limit)
    here = at + zeros + 1
    gap = _field(data, here, stop, low)
    falls = _field(data, here + low, stop, 1)
    here += low + 1
    more = _zeros(data, here, stop, 64)
    here += more + 1
    held = tl.minimum(more, 31)
    above = _field(data, here, stop, held) + (tl.full((), 1, tl.int64) << held) - 1
    here += held
    units = (above << unit_bits) + _field(data, here, stop, unit_bits)
    return zeros, gap, falls, more, units, here + unit_bits - at


@triton.jit(do_not_specialize=["blocks"])  # type: ignore[untyped-decorator]
def read(  # type: ignore[no-untyped-def]
    lines, ofs, numbers, counts, begins, words, word_ats, keys, steps, wrong, blocks, FIELDS: tl.constexpr,
    LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Decode each block by a lane of its own into `keys` and `steps`, from `begins` on; note in `wrong` those that do
    not hold. The caller has seen to it that every block's count is at most its length and its words are in memory.

    A line: the address of its table; 4 or 8 bytes an entry; the address of its words; block bits; unit bits; the bits
    of an element; elements; its first key.
    """
    block = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = block < blocks
    line = lines + tl.load(ofs + block, mask=inside, other=0) * FIELDS
    data = tl.load(line + 2)
    block_bits, unit_bits, width = tl.load(line + 3), tl.load(line + 4), tl.load(line + 5)
    first = tl.load(numbers + block, mask=inside, other=0) << block_bits
    last = tl.minimum(first + (tl.full((), 1, tl.int64) << block_bits), tl.load(line + 6))
    origin = tl.load(line + 7)
    count = tl.load(counts + block, mask=inside, other=0)
    begin = tl.load(begins + block, mask=inside, other=0)
    at = tl.load(word_ats + block, mask=inside, other=0) << 5
    stop = at + (tl.load(words + block, mask=inside, other=0) << 5)
    low = _gap_bits(count, last - first)
    place = first - 1
    limit = ((last - first) >> low) + 1
    fine = inside
    change = tl.min(count) * 0
    most = tl.max(count)
    column = tl.arange(0, TILE)[None, :]
    while change < most:
        # Written together: one at a time, each by a lane of its own far from the others', took nine times as long as
        # to decode them.
        places = tl.zeros((LANES, TILE), tl.int32)
        moves = tl.zeros((LANES, TILE), tl.int32)
        for i in range(TILE):
            going = fine & (change + i < count)
            end = tl.where(going, stop, 0)
            zeros, gap, falls, more, units, length = _change_at(data, at, end, low, unit_bits)
            long = going & (length > 64)
            if tl.max(long.to(tl.int32), axis=0) > 0:
                z, g, f, m, u, n = _long_change_at(data, at, tl.where(long, end, 0), low, unit_bits, limit)
                zeros, gap, falls = tl.where(long, z, zeros), tl.where(long, g, gap), tl.where(long, f, falls)
                more, units, length = tl.where(long, m, more), tl.where(long, u, units), tl.where(long, n, length)
            to = place + (zeros << low) + gap + 1
            here = at + length
            good = (to < last) & (more < width) & (here <= stop) & ((units >> (width - 1)) == 0)
            taken = going & good
            step = tl.where(falls != 0, -units - 1, units + 1).to(tl.int32)
            places = tl.where(column == i, (to - first).to(tl.int32)[:, None], places)
            moves = tl.where(column == i, step[:, None], moves)
            fine = fine & (good | (change + i >= count))
            at = tl.where(taken, here, at)
            place = tl.where(taken, to, place)
        target = begin[:, None] + change + column
        counted = change + column < count[:, None]
        tl.store(keys + target, (origin + first)[:, None] + places, mask=counted)
        tl.store(steps + target, moves, mask=counted)
        change += TILE
    # What is left of the last word is zeros.
    fine = fine & (stop - at < 32) & (_window(data, at, stop) == 0)
    tl.store(wrong + block, (~fine).to(tl.int8), mask=inside)
