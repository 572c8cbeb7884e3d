"""Deltas: bit for bit what the dense update is, small, and nothing else whatever their bytes say."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import random
import re
import struct
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import delta_reference as reference
from support.cases import cases
from weightwire.errors import ShapeMismatch, UsageError, VerificationError, VersionError
from weightwire.updates import delta as delta_module
from weightwire.updates import rice
from weightwire.updates.boxes import Box, Part
from weightwire.updates.delta import DELTA_DTYPES, compose, decode, encode, estimate, join, parse
from weightwire.updates.digest import Digest, scan, scan_box, scan_places

DTYPES = list(DELTA_DTYPES)
WIDTH = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 32}
MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
# 10,000 cases of each of the two properties marked so are run by WEIGHTWIRE_DELTA_CASES=10000.
CASES = cases(int(os.environ.get("WEIGHTWIRE_DELTA_CASES", "400")))
HEADER, TRAILER = 80, 16


def tensor_of(bits, dtype):
    kind = np.uint16 if WIDTH[dtype] == 16 else np.uint32
    return torch.from_numpy(np.array(bits, kind).view(f"i{dtype.itemsize}").copy()).view(dtype)


def bits_of(tensor):
    flat = tensor.contiguous().view(-1)
    return flat.as_strided((flat.numel(),), (1,)).view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def same(one, other):
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(bits_of(one), bits_of(other))


def raw_of(delta):
    return delta.data.numpy().tobytes()


def decoded(name, data, base, **known):
    """What `base` becomes, with the original left as it was and put back exactly."""
    before = base.clone()
    patch = decode(name, parse(name, data), base, **known)
    assert same(base, before)
    result = base.clone()
    patch.apply(result)
    undone = result.clone()
    patch.undo(undone)
    assert same(undone, base)
    return result


def special_bits(dtype):
    """Zeros, denormals, infinities, quiet and signalling NaN with payloads, the largest finite, each of both signs."""
    width, mantissa = WIDTH[dtype], MANTISSA[dtype]
    infinity = (1 << (width - 1)) - (1 << mantissa)
    quiet = infinity | 1 << (mantissa - 1)
    positive = [0, 1, (1 << mantissa) - 1, 1 << mantissa, infinity - 1, infinity, infinity | 1, quiet, quiet | 5]
    positive.append((1 << (width - 1)) - 1)
    return [bits | sign for bits in positive for sign in (0, 1 << (width - 1))]


def any_bits(dtype):
    return st.sampled_from(special_bits(dtype)) | st.integers(0, (1 << WIDTH[dtype]) - 1)


@st.composite
def pairs(draw, largest=1100):
    """(base, new) of one dtype: few or all elements changed, by little, in sign, to specials or to anything."""
    dtype = draw(st.sampled_from(DTYPES))
    size = draw(st.sampled_from([0, 1, 2, 255, 256, 257, 511, 513]) | st.integers(0, largest))
    rng = random.Random(draw(st.integers(0, 1 << 32)))
    width = WIDTH[dtype]
    base = [rng.choice(special_bits(dtype)) if rng.random() < 0.2 else rng.getrandbits(width) for _ in range(size)]
    new = list(base)
    density = draw(st.sampled_from([0.0, 0.002, 0.01, 0.1, 0.5, 1.0]))
    way = draw(st.sampled_from(["units", "far", "sign", "special", "any", "mixed"]))
    for place in range(size):
        if rng.random() < density:
            new[place] = changed(base[place], dtype, rng, way)
    for place in draw(st.lists(st.integers(0, max(size - 1, 0)), max_size=3)) if size else ():
        new[place] = draw(any_bits(dtype))
    return tensor_of(base, dtype), tensor_of(new, dtype)


def changed(bits, dtype, rng, way):
    width = WIDTH[dtype]
    if way == "mixed":
        way = rng.choice(["units", "far", "sign", "special", "any"])
    if way == "sign":
        return bits ^ 1 << (width - 1)
    if way == "special":
        return rng.choice(special_bits(dtype))
    if way == "any":
        return rng.getrandbits(width)
    step = rng.choice([-1, 1]) * (1 if way == "units" else rng.randint(1, 1 << rng.randint(1, width - 1)))
    return reference.unrank((reference.rank(bits, width) + step) % (1 << width), width)


starts = st.sampled_from([0, 1, (1 << 31) - 7, (1 << 32) - 3, (1 << 33) + 5, (1 << 48) - 2000])


@settings(max_examples=CASES)
@given(pairs(), starts)
def test_what_comes_out_is_what_went_in_bit_for_bit(pair, start):
    base, new = pair
    delta = encode("w", base, new, start=start)
    assert same(decoded("w", raw_of(delta), base), new)
    assert (delta.before, delta.after) == (scan(base, start).digest, scan(new, start).digest)
    assert delta.count == int((bits_of(base) != bits_of(new)).sum())


@settings(max_examples=CASES // 4)
@given(pairs(largest=600))
def test_a_decoder_from_the_specification_reads_the_same(pair):
    base, new = pair
    width = WIDTH[base.dtype]
    expected = [bits % (1 << width) for bits in bits_of(new).tolist()]
    data = raw_of(encode("w", base, new))
    assert reference.decode(data, [bits % (1 << width) for bits in bits_of(base).tolist()]) == expected


@settings(max_examples=CASES)
@given(pairs(), st.data())
def test_composed_deltas_are_the_delta_from_first_to_last(pair, data):
    a, b = pair
    others = st.lists(st.integers(0, max(a.numel() - 1, 0)), max_size=20, unique=True)
    c = b.clone()
    for place in data.draw(others) if a.numel() else ():
        way = data.draw(st.sampled_from(["back", "any"]))
        bits_of(c)[place] = bits_of(a)[place] if way == "back" else bits_of(b)[place] ^ 1
    both = compose("w", encode("w", a, b), encode("w", b, c))
    assert raw_of(both) == raw_of(encode("w", a, c))
    assert same(decoded("w", raw_of(both), a), c)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 3, 255, 256, 257, 70_001])
@pytest.mark.parametrize("how", ["none", "first", "last", "all", "signs", "nan", "half"])
def test_sizes_and_kinds_of_change(dtype, size, how):
    generator = torch.Generator().manual_seed(size)
    base = torch.randn(size, generator=generator).mul(0.02).to(dtype)
    new = base.clone()
    if how in ("first", "last") and size:
        new[0 if how == "first" else -1] = 7
    elif how == "all":
        bits_of(new).bitwise_xor_(1)
    elif how == "signs":
        new.neg_()
    elif how == "nan":
        new.fill_(float("nan"))
    elif how == "half":
        new[: size // 2] *= 2
    delta = encode("w", base, new)
    assert same(decoded("w", raw_of(delta), base), new)
    assert delta.count == int((bits_of(base) != bits_of(new)).sum())


@pytest.mark.parametrize("dtype", DTYPES)
def test_from_every_special_value_to_every_other(dtype):
    special = special_bits(dtype)
    base = tensor_of([one for one in special for _ in special], dtype)
    new = tensor_of(special * len(special), dtype)
    assert same(decoded("w", raw_of(encode("w", base, new)), base), new)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_follow_the_order_of_floats(dtype):
    finite = tensor_of(range(1 << 16), dtype)
    finite = finite[finite.isfinite()]
    order = sorted(range(finite.numel()), key=lambda i: (float(finite[i]), not math.copysign(1, float(finite[i])) < 0))
    ordered = finite[torch.tensor(order)]
    delta = encode("w", ordered[:-1].contiguous(), ordered[1:].contiguous())
    places, steps = delta_module._changes_of("w", delta)
    assert places.size == ordered.numel() - 1
    assert (steps == 1).all()


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 4)])
def test_the_shape_is_not_its_business(shape):
    base = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    new = base + 1
    result = base.clone()
    decode("w", encode("w", base, new), base).apply(result)
    assert same(result, new)


def test_parameters_are_patched_in_place():
    base, new = torch.zeros(8), torch.arange(8.0)
    live = torch.nn.Parameter(base.clone())
    decode("w", encode("w", base, new), live).apply(live)
    assert same(live.data, new)


@pytest.mark.parametrize("shift", range(8))
def test_where_the_bytes_and_elements_lie_in_memory_does_not_matter(shift):
    memory = torch.arange(9000, dtype=torch.float32).to(torch.bfloat16)
    base = memory[shift : shift + 8000]
    new = base.clone()
    new[::7] *= 3
    data = encode("w", base, new).data
    assert torch.equal(encode("w", base.clone(), new).data, data)
    moved = torch.zeros(data.numel() + 8, dtype=torch.uint8)
    moved[shift : shift + data.numel()] = data
    assert same(decoded("w", moved[shift : shift + data.numel()], base), new)


def test_a_block_of_more_changes_than_sixteen_bits_count():
    base = torch.zeros(1 << 24, dtype=torch.bfloat16)
    new = base.clone()
    new[: 1 << 16] = 1
    delta = encode("w", base, new)
    assert (delta.entry, delta.count) == (8, 1 << 16)
    assert same(decoded("w", raw_of(delta), base), new)


@given(st.integers(1, 255), st.integers(0, 12))
def test_the_gap_parameter_is_the_specified_one(count, more):
    length = count << more
    assert rice.gap_bits(count, length) == reference.gap_bits(count, length)
    assert rice.gap_bits(count, length + 1) == reference.gap_bits(count, length + 1)


# Tensors of more than 2^31 elements, without their memory: changes at chosen places straight into and out of the bits.

huge = [(1 << 31) + 11, (1 << 32) + 1, (1 << 33) + 12345, 1 << 40]


@st.composite
def far_changes(draw):
    numel = draw(st.sampled_from(huge))
    edges = [0, 1, (1 << 24) - 1, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, numel - 2, numel - 1]
    places = st.sampled_from([edge for edge in edges if edge < numel]) | st.integers(0, numel - 1)
    chosen = sorted(draw(st.sets(places, min_size=1, max_size=40)))
    steps = [draw(st.sampled_from([-(1 << 15), -1, 1, 2, (1 << 15) - 1])) for _ in chosen]
    return numel, np.array(chosen, np.int64), np.array(steps, np.int64)


@settings(max_examples=50)
@given(far_changes())
def test_places_beyond_2_to_the_31_keep_their_index(changes):
    numel, places, steps = changes
    zero = Digest(0, 0)
    delta = parse("w", raw_of(delta_module._assemble(torch.bfloat16, 3, numel, places, steps, zero, zero)))
    found = delta_module._changes_of("w", delta)
    assert found[0].tolist() == places.tolist()
    assert found[1].tolist() == steps.tolist()
    assert delta.numel == numel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [(1 << 31) - 100, (1 << 32) - 101, (1 << 33) + 1, (1 << 34) - 99])
def test_digests_of_places_beyond_2_to_the_31_are_those_of_the_run(dtype, start):
    base = torch.randn(200, generator=torch.Generator().manual_seed(2)).to(dtype)
    places = torch.arange(200, dtype=torch.int64)
    assert scan_places(base, places + start) == scan_places(base, places, start) == scan(base, start)
    new = base.clone()
    new[::3] += 1
    delta = encode("w", base, new, start=start)
    assert delta.after == scan(new, start).digest
    assert same(decoded("w", raw_of(delta), base), new)


# Parts of a tensor, and the whole from them.


@st.composite
def cut_pairs(draw):
    """Two tensors of one shape, and a grid of parts that they are cut into."""
    base, new = draw(pairs(largest=300))
    shape = (base.numel(),)
    if base.numel() % 6 == 0:
        shape = draw(st.sampled_from([(6, base.numel() // 6), (base.numel() // 6, 3, 2), (2, base.numel() // 2)]))
    boxes = [Box((), ())]
    for size in shape:
        cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))})
        sides = list(itertools.pairwise(cuts)) or [(0, 0)]
        boxes = [Box((*box.start, a), (*box.shape, b - a)) for box in boxes for a, b in sides]
    return base.view(shape), new.view(shape), draw(st.permutations([Part(shape, box) for box in boxes]))


def row_of(tensor, part):
    inside = tuple(slice(a, a + n) for a, n in zip(part.box.start, part.box.shape, strict=True))
    return tensor.view(part.shape)[inside].reshape(-1).contiguous()


@settings(max_examples=CASES)
@given(cut_pairs())
def test_the_deltas_of_parts_join_to_that_of_the_whole_byte_for_byte(pair):
    base, new, parts = pair
    deltas = []
    for part in parts:
        rows = row_of(base, part), row_of(new, part)
        deltas.append(encode("w", *rows, part=part))
        digests = [scan_box(row.view(part.box.shape), part.box, part.shape).digest for row in rows]
        assert [deltas[-1].before, deltas[-1].after] == digests
        assert same(decoded("w", raw_of(deltas[-1]), rows[0], part=part), rows[1])
    joined = join("w", list(zip(parts, deltas, strict=True)))
    assert raw_of(joined) == raw_of(encode("w", base, new))


def test_parts_beyond_2_to_the_31_join():
    zero, half = Digest(0, 0), 1 << 32
    parts = [Part((2, 2, half), Box((0, start, 0), (2, 1, half))) for start in (1, 0)]
    places = [np.array([0, half - 1, half, 2 * half - 1]), np.array([7, half])]
    deltas = [
        delta_module._assemble(torch.bfloat16, part.start, part.numel, own, np.arange(1, own.size + 1), zero, zero)
        for part, own in zip(parts, places, strict=True)
    ]
    joined = parse("w", raw_of(join("w", list(zip(parts, deltas, strict=True)))))
    assert (joined.start, joined.numel) == (0, 4 * half)
    found, steps = delta_module._changes_of("w", joined)
    assert found.tolist() == [7, half, 2 * half - 1, 2 * half, 3 * half, 4 * half - 1]
    assert steps.tolist() == [1, 1, 2, 2, 3, 4]


def test_deltas_that_are_not_of_the_parts_of_one_tensor_do_not_join():
    base, new = small()
    halves = [Part((700,), Box((start,), (350,))) for start in (0, 350)]
    deltas = [encode("w", row_of(base, half), row_of(new, half), part=half) for half in halves]
    first, second = zip(halves, deltas, strict=True)
    other = Part((350, 2), Box((0, 0), (175, 2)))
    wide = encode("w", torch.zeros(350), torch.ones(350))
    for parts in ([first], [first, second, second], [first, (halves[1], wide)], [first, (other, deltas[1])]):
        with pytest.raises(ShapeMismatch, match="'w': the deltas of its parts are not of parts that make up"):
            join("w", parts)
    with pytest.raises(VersionError, match="the delta starts from elements of digest"):
        decode("w", deltas[1], row_of(base, halves[0]), part=halves[1])


# Harm: any byte changed, cut anywhere, too long, for another base, twice, out of order.


def small(dtype=torch.bfloat16, size=700, density=0.05):
    generator = torch.Generator().manual_seed(4)
    base = torch.randn(size, generator=generator).to(dtype)
    new = base.clone()
    chosen = torch.rand(size, generator=generator) < density
    new[chosen] *= 1.01
    new[5], new[6] = float("inf"), -0.0
    return base, new


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_byte_changed_is_noticed_and_the_tensor_named(dtype):
    base, new = small(dtype)
    data = raw_of(encode("layer.3", base, new))
    for place in range(len(data)):
        for flip in (0x01, 0x80, 0xFF, 1 + place % 254):
            harmed = bytearray(data)
            harmed[place] ^= flip
            with pytest.raises(VerificationError, match=r"'layer\.3': not a whole delta"):
                parse("layer.3", bytes(harmed))


def test_any_byte_changed_to_any_other_is_noticed():
    base = torch.zeros(9)
    data = raw_of(encode("w", base, torch.tensor([1.0, *[0.0] * 8])))
    for place in range(len(data)):
        for flip in range(1, 256):
            harmed = bytearray(data)
            harmed[place] ^= flip
            with pytest.raises(VerificationError, match="'w'"):
                parse("w", bytes(harmed))


def test_cut_anywhere_or_too_long_is_noticed():
    data = raw_of(encode("w", *small()))
    for length in range(len(data)):
        with pytest.raises(VerificationError, match=r"'w': not a whole delta: it has \d+ bytes"):
            parse("w", data[:length])
    for more in (b"\0", b"\0" * 4, b"\0" * 16, data):
        with pytest.raises(VerificationError, match="its header says"):
            parse("w", data + more)


def test_what_is_no_delta_is_refused():
    with pytest.raises(VerificationError, match="begins with"):
        parse("w", bytes(200))
    with pytest.raises(UsageError, match="uint8"):
        parse("w", torch.zeros(200))
    with pytest.raises(UsageError, match="uint8"):
        parse("w", torch.zeros((2, 200), dtype=torch.uint8))


def test_another_base_is_refused_and_both_digests_named():
    base, new = small()
    delta = encode("w", base, new)
    other = base.clone()
    bits_of(other)[3] ^= 1
    with pytest.raises(VersionError, match=rf"'w'.*{delta.before.hex()}.*{scan(other).digest.hex()}"):
        decode("w", delta, other)
    with pytest.raises(VersionError):
        decode("w", delta, base, before=scan(other).digest)


def test_another_dtype_or_size_is_refused():
    base, new = small()
    delta = encode("w", base, new)
    for other in (base.float(), base.half(), base[:-1].clone()):
        with pytest.raises(ShapeMismatch, match=r"'w': the delta is of 700 elements"):
            decode("w", delta, other)


def test_a_base_that_is_not_what_its_known_digest_says_gives_no_patch_of_other_values():
    # Only places that change are looked at then: a difference there shows in the result's digest.
    base, new = small()
    delta = encode("w", base, new)
    other = base.clone()
    bits_of(other)[5] ^= 1
    with pytest.raises(VerificationError, match=r"'w': after the delta its digest is"):
        decode("w", delta, other, before=delta.before)


def test_applied_twice_or_out_of_order_is_refused():
    v4, v5 = small()
    v6 = v5.clone()
    v6[::9] *= 2
    to5, to6 = encode("w", v4, v5), encode("w", v5, v6)
    live = v4.clone()
    with pytest.raises(VersionError):
        decode("w", to6, live)
    decode("w", to5, live).apply(live)
    with pytest.raises(VersionError):
        decode("w", to5, live)
    decode("w", to6, live).apply(live)
    assert same(live, v6)
    for again in (to5, to6):
        with pytest.raises(VersionError):
            decode("w", again, live)
    with pytest.raises(VersionError, match="'w': the first delta leads to"):
        compose("w", to6, to5)
    with pytest.raises(VersionError):
        compose("w", to5, to5)


def test_a_delta_of_another_place_of_the_tensor_is_refused():
    base, new = small()
    with pytest.raises(VersionError):
        decode("w", encode("w", base, new, start=700), base, before=scan(base).digest)
    with pytest.raises(ShapeMismatch):
        compose("w", encode("w", base, new), encode("w", new, base, start=700))


@pytest.mark.parametrize(
    ("base", "new"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)),
        (torch.zeros(3), torch.zeros(4)),
        (torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)),
        (torch.zeros(3, 4).t(), torch.zeros(3, 4).t()),
    ],
    ids=["dtypes", "shapes", "integers", "strides"],
)
def test_what_has_no_delta_is_refused(base, new):
    with pytest.raises(UsageError):
        encode("w", base, new)


# Crafted: bytes with a right checksum that lie about everything else. What is wrong is an error of this package, memory
# around the outputs stays as it was, and no index is out of its array.


def sealed(data):
    """`data` with the right length in its header and the right digest at its end."""
    body = bytearray(data[:-TRAILER])
    struct.pack_into("<Q", body, 16, len(data))
    digest = scan(torch.frombuffer(body, dtype=torch.uint8)).digest
    return bytes(body) + struct.pack("<2Q", *digest)


def field(data, at, form, value):
    changed = bytearray(data)
    struct.pack_into(form, changed, at, value)
    return sealed(changed)


def crowded():
    """Three blocks, of 512, 512 and 176 elements."""
    base, new = small(size=1200, density=0.6)
    delta = encode("w", base, new)
    assert (delta.block_bits, delta.blocks) == (9, 3)
    return base, new, raw_of(delta)


LIES = {
    "format": (4, "<B", [0, 2, 255]),
    "dtype": (5, "<B", [0, 2, 3, 4, 255]),
    "block bits": (6, "<B", [0, 7, 8, 10, 11, 24, 25, 63, 64, 255]),
    "unit bits": (7, "<B", [0, 1, 2, 5, 15, 16, 31, 32, 255]),
    "entry": (8, "<B", [0, 1, 8, 255]),
    "zeros": (9, "<B", [1]),
    "start": (24, "<Q", [1, 1 << 48, (1 << 64) - 1]),
    "numel": (32, "<Q", [0, 1, 1199, 1201, 1 << 31, 1 << 48, (1 << 64) - 1]),
    "count": (40, "<Q", [0, 1, 1200, 1201, 1 << 31, 1 << 48, (1 << 64) - 1]),
    "first count": (80, "<H", [0, 1, 512, 513, 65535]),
    "first length": (82, "<H", [0, 1, 255, 65535]),
    "last count": (88, "<H", [0, 176, 177, 65535]),
    "last length": (90, "<H", [0, 1, 65535]),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_under_a_right_checksum_is_an_error_that_names_the_tensor(lie):
    base, _, data = crowded()
    at, form, values = LIES[lie]
    (truth,) = struct.unpack_from(form, data, at)
    for value in {*values} - {truth}:
        with pytest.raises((VerificationError, VersionError, ShapeMismatch), match="'w'"):
            decode("w", parse("w", field(data, at, form, value)), base)


def test_counts_moved_between_blocks_are_an_error():
    base, _, data = crowded()
    counts = [count for count, _ in reference.table_of(data)]
    moved = field(field(data, 80, "<H", counts[0] - 1), 84, "<H", counts[1] + 1)
    with pytest.raises(VerificationError, match="block 0 of 3 cannot be decoded"):
        decode("w", parse("w", moved), base)


@pytest.mark.parametrize("value", [0x00, 0x55, 0xAA, 0xFF])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_that_mean_nothing_are_an_error(value, dtype):
    base, new = small(dtype)
    data = raw_of(encode("w", base, new))
    begin = HEADER + 4 * len(reference.table_of(data))
    hollow = sealed(data[:begin] + bytes([value]) * (len(data) - begin - TRAILER) + bytes(TRAILER))
    with pytest.raises(VerificationError, match="'w'"):
        decode("w", parse("w", hollow), base)


def test_a_small_delta_cannot_ask_for_much_memory():
    data = raw_of(encode("w", torch.zeros(256), torch.ones(256)))
    greedy = field(field(field(data, 32, "<Q", 1 << 48), 40, "<Q", 1 << 47), 6, "<B", 24)
    with pytest.raises(VerificationError, match="does not fit"):
        parse("w", greedy)


@st.composite
def crafted(draw):
    """The bytes of a delta with a right checksum and bytes anywhere else replaced, removed or put in."""
    base, new = draw(pairs(largest=600))
    data = bytearray(raw_of(encode("w", base, new)))
    for _ in range(draw(st.integers(1, 4))):
        area = draw(st.sampled_from([(4, HEADER), (HEADER, min(HEADER + 16, len(data))), (HEADER, len(data))]))
        place = draw(st.integers(area[0], max(area[1] - 1, area[0])))
        if place < len(data):
            data[place] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    if draw(st.booleans()):
        at = draw(st.integers(HEADER, len(data) - TRAILER))
        data[at:at] = draw(st.binary(max_size=8))
    elif draw(st.booleans()):
        at = draw(st.integers(HEADER, len(data) - TRAILER))
        del data[at : at + 4]
    return base, new, sealed(data)


@settings(max_examples=CASES)
@given(crafted())
def test_crafted_bytes_give_their_own_digest_or_an_error(case):
    base, _, data = case
    try:
        delta = parse("w", data)
        result = decoded("w", data, base)
    except (VerificationError, VersionError, ShapeMismatch):
        return
    assert scan(result, delta.start).digest == delta.after


class Strict(np.ndarray):
    """An array that refuses what compiled code would not look at: any index outside it, negative ones too."""

    def _check(self, key):
        for index, size in zip(key if isinstance(key, tuple) else (key,), self.shape, strict=False):
            if isinstance(index, slice):
                assert 0 <= (index.start or 0) <= (size if index.stop is None else index.stop) <= size
            else:
                assert 0 <= index < size, f"index {index} of {size}"

    def __getitem__(self, key):
        self._check(key)
        return super().__getitem__(key)

    def __setitem__(self, key, value):
        self._check(key)
        super().__setitem__(key, value)


@pytest.fixture(scope="module")
def interpreted():
    """The very code of `rice`, not compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numba, "njit", lambda **_: lambda function: function)
        spec = importlib.util.spec_from_file_location("interpreted_rice", Path(rice.__file__))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def strictly(function):
    def call(*arguments):
        return function(*(a.view(Strict) if isinstance(a, np.ndarray) else a for a in arguments))

    return call


@settings(max_examples=max(CASES // 4, 1))
@given(case=crafted())
def test_decoding_never_leaves_its_arrays_whatever_the_bytes_say(interpreted, case):
    _, _, data = case
    outcomes = []
    for read in (rice.read, strictly(interpreted.read)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rice, "read", read)
            try:
                places, steps = delta_module._changes_of("w", parse("w", data))
                outcomes.append((places.tolist(), steps.tolist()))
            except VerificationError as error:
                outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


@settings(max_examples=max(CASES // 8, 1))
@given(bits=st.binary(min_size=8, max_size=64), count=st.integers(1, 300), unit_bits=st.integers(0, 31))
def test_random_bits_never_leave_their_arrays(interpreted, bits, count, unit_bits):
    words = np.frombuffer(bits[: len(bits) // 4 * 4] + bytes(8), np.uint32)
    table = np.array([[count, words.size - 2]], np.int64)
    outcomes = []
    for read in (rice.read, strictly(interpreted.read)):
        # The outputs lie within more memory, of which nothing else may change.
        places, steps = np.full(count + 64, -7, np.int64), np.full(count + 64, -7, np.int64)
        held = read(words, table, 300, 10, unit_bits, 32, places[32:-32], steps[32:-32])
        outcomes.append((held, places.tolist(), steps.tolist()))
        assert {*places[:32], *places[-32:], *steps[:32], *steps[-32:]} == {-7}
    assert outcomes[0] == outcomes[1]


@settings(max_examples=max(CASES // 8, 1))
@given(pair=pairs(largest=400))
def test_encoding_never_leaves_its_arrays(interpreted, pair):
    base, new = pair
    expected = raw_of(encode("w", base, new))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("find", "subtract", "weigh", "write", "tally"):
            patch.setattr(rice, name, strictly(getattr(interpreted, name)))
        assert raw_of(encode("w", base, new)) == expected


# Size.


def adam_like(density, size=1 << 20):
    """bf16 weights of std 0.02 before and after a step of the scale that changes about `density` of them."""
    generator = torch.Generator().manual_seed(6)
    weights = torch.randn(size, generator=generator) * 0.02
    rate = {0.001: 1.7e-8, 0.005: 1.07e-7, 0.01: 2.37e-7, 0.02: 5.39e-7, 0.05: 1.64e-6}[density]
    moved = weights - rate * torch.randn(size, generator=generator)
    return weights.bfloat16(), moved.bfloat16()


def entropy_bound(base, new):
    """Bytes that places and steps take at least where both are drawn independently, from their own frequencies."""
    _, steps = delta_module._changes_of("w", encode("w", base, new))
    share = steps.size / base.numel()
    _, counts = np.unique(steps, return_counts=True)
    frequencies = counts / counts.sum()
    places = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    return base.numel() * (places - share * (frequencies * np.log2(frequencies)).sum()) / 8


@pytest.mark.parametrize("density", [0.001, 0.005, 0.01, 0.02, 0.05])
def test_the_size_is_within_a_tenth_of_the_entropy_bound(density):
    base, new = adam_like(density, 1 << 22)
    delta = encode("w", base, new)
    assert 0.9 * density < delta.density < 1.1 * density
    assert delta.nbytes <= 1.10 * entropy_bound(base, new)


def test_nothing_changed_takes_a_header():
    base = torch.zeros(1 << 20, dtype=torch.bfloat16)
    delta = encode("w", base, base.clone())
    assert (delta.nbytes, delta.count, delta.density) == (HEADER + TRAILER, 0, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_random_takes_little_more_than_dense(dtype):
    rng = np.random.default_rng(0)
    olds, news = rng.integers(0, 1 << WIDTH[dtype], (2, 1 << 16))
    base, new = tensor_of(olds, dtype), tensor_of(news, dtype)
    assert encode("w", base, new).nbytes < 1.25 * base.nbytes


@pytest.mark.parametrize("density", [0.001, 0.01, 0.05])
def test_the_estimate_is_near_the_size(density):
    base, new = adam_like(density)
    share, size = estimate(base, new, sample=1 << 18)
    delta = encode("w", base, new)
    assert share == pytest.approx(delta.density, rel=0.2)
    assert size == pytest.approx(delta.nbytes / base.nbytes, rel=0.2)


@pytest.mark.parametrize(("new", "expected"), [(torch.zeros(100), (0, 0)), (torch.ones(100), (1, 1))])
def test_the_estimate_of_nothing_and_of_all(new, expected):
    assert estimate(torch.zeros(100), new) == expected
    assert estimate(torch.zeros(0), torch.zeros(0)) == (0, 0)


def test_the_example_of_the_specification():
    page = (Path(__file__).parents[2] / "docs" / "delta-format.md").read_text().partition("## An example")[2]
    olds, news = (re.search(rf"{word} `([0-9a-f ]+)`", page)[1] for word in ("bits", "become"))
    data = bytes.fromhex(page.split("```")[1])
    base, new = (tensor_of([int(bits, 16) for bits in text.split()], torch.bfloat16) for text in (olds, news))
    assert raw_of(encode("w", base, new)) == data
    assert same(decoded("w", data, base), new)
    changes = [(1, -1), (2, -1), (6, -29959)]
    assert reference.decode_block(data, 0) == changes
    rows = re.findall(r"^\| (\d) \| .* (-)?: `1` \| (\d+):", page, re.MULTILINE)
    assert [(int(place), -int(units)) for place, _, units in rows] == changes
    assert "3c000edf 000001a8" in page
    assert struct.unpack_from("<2I", data, 84) == (0x3C000EDF, 0x000001A8)
