"""The bit coding of deltas on a GPU, in Triton: the same bits as `rice` writes, and the same ones refused.

Many tensors share each launch, as lines of a table of int64; all pointers in it are to memory of the launch's device.
A key is a place in all of the tensors one after the other, so that the changes of many tensors are one ascending list.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "BINS",
    "CHUNK",
    "LANES",
    "SEGMENT",
    "detect",
    "factors",
    "key_of",
    "moved",
    "order",
    "read",
    "read_ends",
    "read_table",
    "sample",
    "weigh",
    "write",
]

SEGMENT = 2048
"""Words of 32 bits that one program compares."""
CHUNK = 128
"""Changes that a program takes at a time."""
LANES = 32
"""Blocks that one program decodes, each by a lane of its own."""
BINS = 64
"""Room for a tally of steps by size; 33 are in use."""


# -- the digest's factors, and the order of bit patterns ---------------------------------------------------------------


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def key_of(word):  # type: ignore[no-untyped-def]
    """What the high half of a word's index, int64, brings to its factors."""
    return _mix((word >> 32).to(tl.uint32) ^ tl.full((), 0x9E3779B9, tl.uint32))


@triton.jit
def factors(place, key):  # type: ignore[no-untyped-def]
    """The two factors of words with the low half of their index in `place`."""
    mixed = _mix(place ^ key)
    again = mixed * tl.full((), 0x31848BAB, tl.uint32)
    return (mixed | 1).to(tl.uint64), ((again ^ (again >> 14)) | 1).to(tl.uint64)


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
def _sums(word, low, high):  # type: ignore[no-untyped-def]
    word = word.to(tl.uint64)
    return tl.sum(word * low).to(tl.int64, bitcast=True), tl.sum(word * high).to(tl.int64, bitcast=True)


@triton.jit(do_not_specialize=["capacity", "total"])  # type: ignore[untyped-decorator]
def detect(  # type: ignore[no-untyped-def]
    lines,
    segments,
    counts,
    ats,
    sums,
    found,
    counter,
    capacity,
    total,
    HALVES: tl.constexpr,
    SIZE: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Compare one segment of a tensor with its base, both read once: how many elements differ, the digests of both, and
    how many of the new are NaN or infinite. Each change's place goes to `found`, with what was and is there, of 32-bit
    elements the step; each segment's together, while there is room.

    A line: addresses of base and new; whole words; elements beyond these (one half word or none); where its bytes begin
    in the full tensor; what `digest.word_facts` says of its dtype. `segments`: each one's line and its number there.
    """
    segment = tl.program_id(0).to(tl.int64)
    line = lines + tl.load(segments + 2 * segment).to(tl.int64) * FIELDS
    first = tl.load(segments + 2 * segment + 1).to(tl.int64) * SIZE
    base = tl.load(line).to(tl.pointer_type(tl.uint32), bitcast=True) + first
    new = tl.load(line + 1).to(tl.pointer_type(tl.uint32), bitcast=True) + first
    base, new = tl.multiple_of(base, 16), tl.multiple_of(new, 16)
    words = tl.load(line + 2) - first
    column = tl.arange(0, SIZE)
    if words >= SIZE:  # without a mask it is read 16 bytes at a time
        old, now = tl.load(base + column), tl.load(new + column)
    else:
        old = tl.load(base + column, mask=column < words, other=0)
        now = tl.load(new + column, mask=column < words, other=0)
    if (tl.load(line + 3) != 0) & (words < SIZE):
        last = column == words
        half = tl.load(line).to(tl.pointer_type(tl.uint16), bitcast=True) + 2 * first
        old = old | tl.load(half + 2 * column, mask=last, other=0).to(tl.uint32)
        half = tl.load(line + 1).to(tl.pointer_type(tl.uint16), bitcast=True) + 2 * first
        now = now | tl.load(half + 2 * column, mask=last, other=0).to(tl.uint32)

    start = tl.load(line + 4)
    at = (start >> 2) + first
    place = (at + column).to(tl.uint32)
    if (start & (4 * SIZE - 1)) == 0:
        low, high = factors(place, key_of(at))
        before_low, before_high = _sums(old, low, high)
        after_low, after_high = _sums(now, low, high)
    else:
        # Only a part of a tensor begins anywhere: what is one word here may be halves of two there, and the high half
        # of their index may change on the way.
        shift = ((start & 2) * 8).to(tl.uint32)
        key, next_key, wraps = key_of(at), key_of(at + 0x100000000), at.to(tl.uint32)
        low, high = factors(place, tl.where(place < wraps, next_key, key))
        before_low, before_high = _sums(old << shift, low, high)
        after_low, after_high = _sums(now << shift, low, high)
        place += 1
        low, high = factors(place, tl.where(place < wraps, next_key, key))
        more_low, more_high = _sums((old >> 16) >> (16 - shift), low, high)
        before_low, before_high = before_low + more_low, before_high + more_high
        more_low, more_high = _sums((now >> 16) >> (16 - shift), low, high)
        after_low, after_high = after_low + more_low, after_high + more_high
    tl.store(sums + segment, before_low)
    tl.store(sums + total + segment, before_high)
    tl.store(sums + 2 * total + segment, after_low)
    tl.store(sums + 3 * total + segment, after_high)
    exponent, lowest = tl.load(line + 5).to(tl.uint32), tl.load(line + 6).to(tl.uint32)
    full = ((now & exponent) + lowest) & (exponent + lowest)
    bad = tl.zeros((), tl.int32)
    if tl.max(full) > 0:
        bad = tl.sum(((full >> 31) + (full >> 15 & 1)).to(tl.int32))
    tl.store(sums + 4 * total + segment, bad.to(tl.int64))

    differ = old ^ now
    if HALVES == 2:
        one, other = (differ & 0xFFFF) != 0, (differ >> 16) != 0
        each = one.to(tl.int32) + other.to(tl.int32)
    else:
        one = differ != 0
        each = one.to(tl.int32)
    count = tl.sum(each)
    tl.store(counts + segment, count.to(tl.int64))
    if count > 0:
        begin = tl.atomic_add(counter, count.to(tl.int64), sem="relaxed")
        tl.store(ats + segment, begin)
        if begin + count <= capacity:
            to = tl.cumsum(each, 0) - each
            found += begin
            if HALVES == 2:
                tl.store(found + to, _packed(2 * column, (old & 0xFFFF) | (now << 16)), mask=one)
                to += one.to(tl.int32)
                tl.store(found + to, _packed(2 * column + 1, (old >> 16) | (now & 0xFFFF0000)), mask=other)
            else:
                tl.store(found + to, _packed(column, _step(old, now, 32).to(tl.uint32, bitcast=True)), mask=one)


@triton.jit
def _packed(place, value):  # type: ignore[no-untyped-def]
    return (place.to(tl.int64) << 32) | value.to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]
def order(  # type: ignore[no-untyped-def]
    segments, counts, ats, begins, found, keys, steps, tallies, HALVES: tl.constexpr, ELEMENTS: tl.constexpr,
    CHUNK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Bring what `detect` found into the order of the segments, of `ELEMENTS` keys each, and tally each line's steps by
    the bits of their units less one."""
    segment = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + segment)
    if count > 0:
        source, target = tl.load(ats + segment), tl.load(begins + segment)
        tally = tl.zeros((BINS,), tl.int32)
        for i in range(0, count, CHUNK):
            column = i + tl.arange(0, CHUNK)
            inside = column < count
            packed = tl.load(found + source + column, mask=inside, other=1)
            if HALVES == 2:
                step = _step((packed & 0xFFFF).to(tl.uint32), (packed >> 16 & 0xFFFF).to(tl.uint32), 16)
            else:
                step = packed.to(tl.int32)
            tl.store(keys + target + column, segment * ELEMENTS + (packed >> 32), mask=inside)
            tl.store(steps + target + column, step, mask=inside)
            size = tl.where(inside, _bit_length(_units(step)), BINS - 1)
            tally += tl.histogram(size, BINS)
        bins = tl.arange(0, BINS)
        line = tl.load(segments + 2 * segment).to(tl.int64)
        tl.atomic_add(tallies + line * BINS + bins, tally.to(tl.int64), mask=(tally > 0) & (bins < 33), sem="relaxed")


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


@triton.jit(do_not_specialize=["blocks"])  # type: ignore[untyped-decorator]
def read(  # type: ignore[no-untyped-def]
    lines, ofs, numbers, counts, begins, words, word_ats, keys, steps, wrong, blocks, FIELDS: tl.constexpr,
    LANES: tl.constexpr,
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
    fine = inside
    change = tl.min(count) * 0
    most = tl.max(count)
    while change < most:
        going = fine & (change < count)
        end = tl.where(going, stop, 0)
        zeros = _zeros(data, at, end, ((last - first) >> low) + 1)
        here = at + zeros + 1
        to = place + (zeros << low) + _field(data, here, end, low) + 1
        here += low
        good = (here < stop) & (to < last)
        falls = _field(data, here, end, 1)
        here += 1
        more = _zeros(data, here, end, 64)
        here += more + 1
        good = good & (more < width)
        more = tl.minimum(more, 31)
        above = _field(data, here, end, more) + (tl.full((), 1, tl.int64) << more) - 1
        here += more
        units = (above << unit_bits) + _field(data, here, end, unit_bits)
        here += unit_bits
        good = good & (here <= stop) & ((units >> (width - 1)) == 0)
        taken = going & good
        tl.store(keys + begin + change, origin + to, mask=taken)
        tl.store(steps + begin + change, tl.where(falls != 0, -units - 1, units + 1).to(tl.int32), mask=taken)
        fine = fine & (good | (change >= count))
        at = tl.where(taken, here, at)
        place = tl.where(taken, to, place)
        change += 1
    # What is left of the last word is zeros.
    fine = fine & (stop - at < 32) & (_window(data, at, stop) == 0)
    tl.store(wrong + block, (~fine).to(tl.int8), mask=inside)
