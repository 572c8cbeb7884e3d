import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.cases import cases
from weightwire.updates.boxes import Box
from weightwire.updates.digest import NO_DIGEST, Digest, Scan, all_finite, scan, scan_and_copy, scan_box, scan_places
from weightwire.updates.manifest import DTYPES

NAMES = sorted(DTYPES)
NARROW = [name for name in NAMES if DTYPES[name] <= 4 and name != "bool"]
FLOATS = ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64"]
NOTHING = Scan(NO_DIGEST, 0)
U32 = (1 << 32) - 1
U64 = (1 << 64) - 1


def mix(x):
    x ^= x >> 16
    x = x * 0x7FEB352D & U32
    x ^= x >> 15
    x = x * 0x846CA68B & U32
    return x ^ x >> 16


def factors(k):
    m = mix((k & U32) ^ mix((k >> 32) ^ 0x9E3779B9))
    a = m * 0x31848BAB & U32
    return m | 1, (a ^ a >> 14) | 1


def documented(raw, first_byte=0):
    low = high = 0
    for place, byte in enumerate(raw, first_byte):
        value = byte << 8 * (place % 4)
        h_low, h_high = factors(place // 4)
        low += value * h_low
        high += value * h_high
    return Digest(low & U64, high & U64)


def tensor_of(raw, name):
    raw = bytes(byte & 1 for byte in raw) if name == "bool" else raw
    raw = raw[: len(raw) // DTYPES[name] * DTYPES[name]]
    return torch.tensor(list(raw), dtype=torch.uint8).view(getattr(torch, name))


def bytes_of(tensor):
    return bytes(tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8).flatten().tolist())


def random_tensor(name, *shape, seed=0):
    count = DTYPES[name]
    for size in shape:
        count *= size
    return tensor_of(random.Random(seed).randbytes(count), name).reshape(shape)


raws = st.binary(max_size=80)
starts = st.integers(0, 1 << 20) | st.integers((1 << 48) - 100, 1 << 48)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=cases(30))
@given(raws, starts)
def test_a_digest_is_the_documented_sum(name, raw, start):
    tensor = tensor_of(raw, name)
    assert scan(tensor, start).digest == documented(bytes_of(tensor), start * tensor.element_size())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("boundary", [1 << 18, 1 << 32, 1 << 33, 1 << 34, 1 << 35], ids=hex)
def test_it_is_the_documented_sum_where_an_index_outgrows_32_bits(name, boundary):
    # Of bytes, of words and of elements: 2^35 bytes are 2^32 eight-byte elements.
    tensor = random_tensor(name, 37)
    start = boundary // tensor.element_size() - 18
    assert scan(tensor, start).digest == documented(bytes_of(tensor), start * tensor.element_size())


@pytest.mark.parametrize("name", ["int8", "bfloat16", "float32", "int64"])
@pytest.mark.parametrize("start", [0, 3, (1 << 32) - 5000])
def test_it_is_the_documented_sum_over_many_blocks(name, start):
    tensor = random_tensor(name, 9001)
    assert scan(tensor, start).digest == documented(bytes_of(tensor), start * tensor.element_size())


@pytest.mark.parametrize("name", NAMES)
def test_where_elements_lie_in_memory_does_not_matter(name):
    memory = random_tensor(name, 5000)
    for begin, start in itertools.product(range(5), range(5)):
        part = memory[begin : begin + 4990]
        assert scan(part, start) == scan(part.clone(), start)


@given(st.sampled_from(NAMES), raws, starts, st.data())
def test_runs_add_up_to_the_whole_wherever_it_is_cut(name, raw, start, data):
    tensor = tensor_of(raw, name)
    marks = sorted(data.draw(st.lists(st.integers(0, tensor.numel()))))
    runs = itertools.pairwise([0, *marks, tensor.numel()])
    assert sum((scan(tensor[a:b], start + a) for a, b in runs), NOTHING) == scan(tensor, start)


def grid(shape, cuts):
    """Every box between the cuts of each dimension."""
    edges = [sorted({0, size, *(c for c in cut if c < size)}) for size, cut in zip(shape, cuts, strict=True)]
    for spans in itertools.product(*map(itertools.pairwise, edges)):
        yield Box(tuple(a for a, _ in spans), tuple(b - a for a, b in spans))


def part_of(tensor, box):
    return tensor[tuple(slice(a, a + n) for a, n in zip(*box, strict=True))]


@st.composite
def strided_tensors(draw):
    """Row-major, transposed or with gaps."""
    name = draw(st.sampled_from(NAMES))
    shape = draw(st.lists(st.integers(1, 7), min_size=2, max_size=4))
    tensor = random_tensor(name, *(size + draw(st.integers(0, 2)) for size in shape), seed=draw(st.integers(0, 99)))
    tensor = part_of(tensor, Box((0,) * len(shape), tuple(shape)))
    return tensor.permute(draw(st.permutations(range(len(shape)))))


@given(strided_tensors(), st.data())
def test_boxes_add_up_to_the_whole_whatever_their_strides(tensor, data):
    cuts = data.draw(st.tuples(*(st.lists(st.integers(1, 6)) for _ in tensor.shape)))
    boxes = list(grid(tensor.shape, cuts))
    whole = sum((scan_box(part_of(tensor, box), box, tensor.shape) for box in boxes), NOTHING)
    assert whole == scan(tensor.contiguous())
    assert whole.digest == documented(bytes_of(tensor))


@pytest.mark.parametrize("name", ["int8", "bfloat16", "float64"])
def test_wide_column_slices_add_up_to_the_whole(name):
    tensor = random_tensor(name, 3, 5, 4999)
    boxes = grid(tensor.shape, [(1,), (), (1, 2501)])
    assert sum((scan_box(part_of(tensor, box), box, tensor.shape) for box in boxes), NOTHING) == scan(tensor)


def test_an_expanded_tensor_counts_every_element_it_shows():
    row = random_tensor("float32", 5)
    whole = row.expand(3, 5)
    assert scan_box(whole, Box((0, 0), (3, 5)), (3, 5)) == scan(whole.contiguous())
    assert scan_box(whole[:, 1:4], Box((0, 1), (3, 3)), (3, 5)) == scan_box(
        whole.contiguous()[:, 1:4], Box((0, 1), (3, 3)), (3, 5)
    )


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
def test_no_elements_have_no_digest(shape):
    assert scan(torch.zeros(shape)) == NOTHING
    assert scan_box(torch.zeros(shape), Box((0,) * len(shape), shape), shape) == NOTHING


@pytest.mark.parametrize("part", [(0, 2, 2), (2, 0, 2), (2, 2, 0), (0, 4, 4)])
def test_an_empty_box_has_no_digest(part):
    assert scan_box(torch.zeros(part), Box((1, 0, 1), part), (4, 4, 4)) == NOTHING


def test_a_scalar_is_one_element():
    scalar = torch.tensor(2.5)
    assert scan(scalar) == scan_box(scalar, Box((), ()), ()) == scan(scalar.reshape(1))


def test_a_parameter_is_scanned_like_its_data():
    parameter = torch.nn.Parameter(random_tensor("float32", 3, 5))
    assert scan(parameter) == scan(parameter.data)


@given(
    st.sampled_from([name for name in NAMES if name != "bool"]), st.binary(min_size=8, max_size=80), starts, st.data()
)
def test_every_flipped_bit_changes_both_sums(name, raw, start, data):
    raw = raw[: len(raw) // 8 * 8]
    place = data.draw(st.integers(0, 8 * len(raw) - 1))
    flipped = bytes(byte ^ (1 << place % 8 if i == place // 8 else 0) for i, byte in enumerate(raw))
    before, after = scan(tensor_of(raw, name), start).digest, scan(tensor_of(flipped, name), start).digest
    assert before.low != after.low
    assert before.high != after.high


@given(raws, st.data())
def test_a_flipped_bool_changes_both_sums(raw, data):
    tensor = tensor_of(raw + b"\0", "bool")
    flipped = tensor.clone()
    flipped[data.draw(st.integers(0, tensor.numel() - 1))] ^= True
    assert scan(tensor).digest.low != scan(flipped).digest.low
    assert scan(tensor).digest.high != scan(flipped).digest.high


@given(st.sampled_from(NAMES), st.binary(min_size=16, max_size=80), starts, st.data())
def test_two_swapped_elements_change_the_digest(name, raw, start, data):
    tensor = tensor_of(raw, name)
    pairs = st.lists(st.integers(0, tensor.numel() - 1), min_size=2, max_size=2, unique=True)
    i, j = data.draw(pairs)
    swapped = tensor.clone()
    swapped[i], swapped[j] = tensor[j], tensor[i]
    same = bytes_of(swapped) == bytes_of(tensor)
    assert (scan(swapped, start).digest == scan(tensor, start).digest) == same


@given(st.sampled_from(NAMES), st.binary(min_size=8, max_size=80), starts)
def test_elements_one_place_off_have_another_digest(name, raw, start):
    tensor = tensor_of(raw, name)
    rolled = tensor.view(torch.uint8).reshape(tensor.numel(), -1).roll(1, 0)
    assert (scan(tensor, start).digest == scan(tensor, start + 1).digest) == (not any(bytes_of(tensor)))
    assert (scan(rolled.view(tensor.dtype), start).digest == scan(tensor, start).digest) == (
        bytes_of(rolled) == bytes_of(tensor)
    )


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
@settings(max_examples=cases(20))
@given(st.sets(st.integers(0, 15), min_size=1))
def test_flipped_signs_do_not_cancel(name, places):
    tensor = random_tensor(name, 16).nan_to_num()
    flipped = tensor.clone()
    for place in places:
        flipped[place] = -tensor[place]
    assert scan(flipped).digest != scan(tensor).digest


def test_zero_and_minus_zero_differ():
    assert scan(torch.tensor([0.0])).digest != scan(torch.tensor([-0.0])).digest


def special(name):
    size = DTYPES[name]
    exponents = {"float8_e4m3fn": 0x7F, "float8_e5m2": 0x7C, "float16": 0x7C00, "bfloat16": 0x7F80}
    exponents |= {"float32": 0x7F800000, "float64": 0x7FF0000000000000}
    full = exponents[name]
    lowest = full & -full
    near = [full, full - lowest, full | 1, full ^ 1, lowest - 1, (1 << 8 * size - 1) - 1, 0]
    return st.sampled_from([*near, *(bits | 1 << 8 * size - 1 for bits in near)])


def really_nonfinite(tensor):
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    return int((~wide.isfinite()).sum())


@pytest.mark.parametrize("name", FLOATS)
@settings(max_examples=cases(40))
@given(st.data())
def test_nan_and_inf_are_counted(name, data):
    size = DTYPES[name]
    any_bits = st.integers(0, (1 << 8 * size) - 1)
    elements = data.draw(st.lists(special(name) | any_bits, max_size=30))
    tensor = tensor_of(b"".join(bits.to_bytes(size, "little") for bits in elements), name)
    start = data.draw(starts)
    assert scan(tensor, start).nonfinite == really_nonfinite(tensor)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16"])
def test_every_pattern_of_a_narrow_float_is_counted_right(name):
    size = DTYPES[name]
    tensor = tensor_of(b"".join(bits.to_bytes(size, "little") for bits in range(1 << 8 * size)), name)
    assert scan(tensor).nonfinite == really_nonfinite(tensor)


@pytest.mark.parametrize("name", FLOATS)
def test_a_tensor_of_nan_counts_every_element(name):
    tensor = torch.full((70_001,), float("nan")).to(getattr(torch, name))
    assert scan(tensor[1:], start=1).nonfinite == 70_000


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(FLOATS)))
def test_integers_are_always_finite(name):
    assert scan(tensor_of(b"\xff" * 64, name)).nonfinite == 0
    assert scan(tensor_of(b"\x7f" * 64, name)).nonfinite == 0


digests = st.builds(Digest, st.integers(0, U64), st.integers(0, U64))


@given(digests, digests, digests)
def test_digests_add_in_any_order_modulo_2_to_the_64(a, b, c):
    assert a + b == b + a == Digest((a.low + b.low) % (1 << 64), (a.high + b.high) % (1 << 64))
    assert (a + b) + c == a + (b + c)
    assert a + NO_DIGEST == a


@given(digests)
def test_a_digest_survives_its_hexadecimal_form(digest):
    assert len(digest.hex()) == 32
    assert Digest.parse(digest.hex()) == digest


@pytest.mark.parametrize("text", ["", "0" * 31, "0" * 33, "g" * 32])
def test_what_is_no_digest_is_refused(text):
    with pytest.raises(ValueError):
        Digest.parse(text)


@pytest.mark.parametrize("whole", [NO_DIGEST, NOTHING])
def test_only_its_like_is_added(whole):
    with pytest.raises(TypeError):
        whole + 1


@given(raw=st.binary(max_size=9000), name=st.sampled_from(NAMES), skip=st.integers(0, 3), start=st.integers(0, 9))
@settings(max_examples=cases(100))
def test_scanned_and_copied_in_one_pass(raw, name, skip, start):
    elements = tensor_of(raw, name)[skip:]
    around = torch.full((elements.numel() + 2,), 1, dtype=elements.dtype)
    before = bytes_of(around[:1])
    assert scan_and_copy(elements, start, around[1:-1]) == scan(elements, start)
    assert bytes_of(around) == before + bytes_of(elements) + before


@pytest.mark.parametrize("to", [torch.zeros(3), torch.zeros(4, dtype=torch.float64)])
def test_a_copy_to_another_dtype_or_size_is_refused(to):
    with pytest.raises(ValueError, match="cannot be copied"):
        scan_and_copy(torch.ones(4), 0, to)
    assert not to.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), None])
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("place", [0, 77, 1023])
def test_all_finite_finds_one_that_is_not(name, value, place):
    elements = torch.linspace(-9, 9, 1024).to(getattr(torch, name)).reshape(32, 32)
    if value is not None:
        elements.view(-1)[place] = value
    assert all_finite(elements) == all_finite(elements.t()) == (value is None)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=cases(30))
@given(raws, starts, st.data())
def test_scattered_elements_add_up_to_the_whole(name, raw, start, data):
    tensor = tensor_of(raw, name)
    chosen = data.draw(st.sets(st.integers(0, tensor.numel() - 1))) if tensor.numel() else set()
    halves = [sorted(chosen), sorted(set(range(tensor.numel())) - chosen)]
    parts = [torch.tensor(half, dtype=torch.int64) for half in halves]
    assert sum((scan_places(tensor[part], part, start) for part in parts), NOTHING) == scan(tensor, start)


@given(digests, digests)
def test_what_was_added_can_be_taken_away(a, b):
    assert (a + b) - b == a
    with pytest.raises(TypeError):
        a - 1
