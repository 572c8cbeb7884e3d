"""A second decoder of deltas, written from docs/delta-format.md alone and slow: what the fast one is held against."""

from __future__ import annotations

import struct

ITEMSIZE = {1: 2, 2: 2, 3: 4}


def bits_of(words):
    """The bits of 32-bit words, each from its lowest up."""
    return [word >> place & 1 for word in words for place in range(32)]


class Bits:
    def __init__(self, words):
        self._bits = bits_of(words)
        self._at = 0

    def take(self, count):
        value = sum(bit << place for place, bit in enumerate(self._bits[self._at : self._at + count]))
        self._at += count
        return value

    def zeros(self):
        count = 0
        while not self.take(1):
            count += 1
        return count

    def rest(self):
        return self._bits[self._at :]


def gap_bits(count, length):
    return max(((2 * length - count) * 493 // (1024 * count)).bit_length() - 1, 0)


def rank(bits, width):
    return bits ^ ((1 << width) - 1 if bits >> (width - 1) else 1 << (width - 1))


def unrank(number, width):
    return number ^ (1 << (width - 1) if number >> (width - 1) else (1 << width) - 1)


def header_of(data):
    form = "<4sBBBBB7xQQQQ16s16s"
    keys = ("magic", "format", "dtype", "block_bits", "unit_bits", "entry", "nbytes", "start", "numel", "count")
    return dict(zip((*keys, "before", "after"), struct.unpack_from(form, data), strict=True))


def table_of(data):
    header = header_of(data)
    if not header["count"]:
        return []
    blocks = -(-header["numel"] >> header["block_bits"])
    form = {4: "<HH", 8: "<II"}[header["entry"]]
    return [struct.unpack_from(form, data, 80 + block * header["entry"]) for block in range(blocks)]


def decode_block(data, block):
    """The changes of one block, as (index from the delta's start, step), without looking at any other block's bits."""
    header, table = header_of(data), table_of(data)
    count, size = table[block]
    begin = 80 + len(table) * header["entry"] + 4 * sum(words for _, words in table[:block])
    bits = Bits(struct.unpack_from(f"<{size}I", data, begin))
    first = block << header["block_bits"]
    length = min(1 << header["block_bits"], header["numel"] - first)
    changes, place = [], first - 1
    for _ in range(count):
        low = gap_bits(count, length)
        place += (bits.zeros() << low) + bits.take(low) + 1
        falls = bits.take(1)
        more = bits.zeros()
        above = (1 << more) + bits.take(more)
        units = ((above - 1) << header["unit_bits"]) + bits.take(header["unit_bits"]) + 1
        changes.append((place, -units if falls else units))
    assert not any(bits.rest())
    return changes


def decode(data, base):
    """What integers, the bits of the elements, become."""
    header = header_of(data)
    width = 8 * ITEMSIZE[header["dtype"]]
    new = list(base)
    for block in reversed(range(len(table_of(data)))):  # in any order
        for place, step in decode_block(data, block):
            new[place] = unrank((rank(base[place], width) + step) % (1 << width), width)
    return new
