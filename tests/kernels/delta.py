"""The delta's kernels against the codec on the CPU: the same bytes made, the same ones taken and the same refused."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.device import DEVICE

from weightwire.errors import UsageError, VerificationError
from weightwire.updates import delta as delta_module
from weightwire.updates import delta_cuda, rice_cuda
from weightwire.updates.delta import DELTA_DTYPES, HEAD_BYTES, SEAL_BYTES, compose, decode, encode, parse
from weightwire.updates.delta_cuda import compare_all, decode_all, encode_compared, pair_up
from weightwire.updates.digest import scan, scan_tensors_any, settle
from weightwire.updates.tiles import ends_of

DTYPES = list(DELTA_DTYPES)
SIZES = rice_cuda.SEGMENT, rice_cuda.WORDS  # before they are patched
SPECIAL = [0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan")]


@pytest.fixture(scope="module", autouse=True)
def few_changes_a_block(few_rows):
    """Blocks are decoded one change after the other, each of which takes the interpreter some 25 ms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta_module, "_CHANGES", 8)
        patch.setattr(rice_cuda, "CHUNK", 1024)
        if DEVICE.type == "cpu":
            patch.setattr(rice_cuda, "SEGMENT", 2048)
            patch.setattr(rice_cuda, "WORDS", 1024)
        yield


def encode_all(names, bases, news, starts=None):
    """Of each its delta, and how many NaN and Inf are in what it became."""
    made = encode_compared(compare_all(pair_up(names, bases, news, starts=starts)))
    made.wait()
    return [*zip(made.deltas, made.nonfinite, strict=True)]


def bits_of(tensor):
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def random_bits(count, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    kind = torch.int16 if dtype.itemsize == 2 else torch.int32
    half = 1 << (8 * dtype.itemsize - 1)
    bits = torch.randint(-half, half, (count,), generator=generator).to(kind)
    return bits.view(dtype)


def changed(base, share, way, seed):
    """`base` with about that share of its elements changed: by a unit, in sign, to specials, or to anything."""
    generator = torch.Generator().manual_seed(seed)
    new = base.clone()
    hit = torch.rand(base.shape, generator=generator) < share
    bits = bits_of(new)
    if way == "unit":
        bits[hit] += 1
    elif way == "sign":
        bits[hit] ^= -(1 << (8 * base.element_size() - 1))
    elif way == "special":
        values = torch.tensor(SPECIAL, dtype=base.dtype)
        new[hit] = values[torch.randint(0, len(SPECIAL), (int(hit.sum()),), generator=generator)]
    else:
        new[hit] = random_bits(int(hit.sum()), base.dtype, seed + 1)
    return new


starts = st.sampled_from([0, 1, 2, (1 << 33) - 1000, (1 << 33) - 1001, (1 << 48) - 30_000])
ways = st.sampled_from(["unit", "sign", "special", "any"])
sizes = st.sampled_from([0, 1, 2, 255, 257, 8191, 8193]) | st.integers(0, 5000)
tensors = st.tuples(st.sampled_from(DTYPES), sizes, st.sampled_from([0.0, 0.0005, 0.01, 0.3, 1.0]), ways, starts)


@settings(max_examples=12, deadline=None)
@given(st.lists(tensors, min_size=1, max_size=4), st.integers(0, 99))
def test_the_bytes_are_those_of_the_cpu(drawn, seed):
    names = [f"w{n}" for n in range(len(drawn))]
    bases = [random_bits(count, dtype, seed + n) for n, (dtype, count, *_) in enumerate(drawn)]
    news = [changed(base, share, way, seed) for base, (_, _, share, way, _) in zip(bases, drawn, strict=True)]
    starts = [start for *_, start in drawn]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta_module, "_CHANGES", 64)  # a block is a program, and takes the interpreter some 10 ms
        made = encode_all(names, [b.to(DEVICE) for b in bases], [n.to(DEVICE) for n in news], starts=starts)
        expected_all = [encode(*each, start=start) for *each, start in zip(names, bases, news, starts, strict=True)]
    for new, expected, (delta, nonfinite) in zip(news, expected_all, made, strict=True):
        assert torch.equal(delta.data, expected.data)
        assert (delta.count, delta.before, delta.after) == (expected.count, expected.before, expected.after)
        assert nonfinite == scan(new).nonfinite


def test_so_they_are_with_blocks_as_large_as_they_are(monkeypatch):
    monkeypatch.setattr(delta_module, "_CHANGES", 256)
    monkeypatch.setattr(rice_cuda, "CHUNK", 128)
    base = random_bits(9000, torch.bfloat16, 1)
    new = changed(base, 0.3, "unit", 2)
    assert torch.equal(encode_all(["w"], [base.to(DEVICE)], [new.to(DEVICE)])[0][0].data, encode("w", base, new).data)


few = st.tuples(st.sampled_from(DTYPES), st.integers(0, 3000), st.sampled_from([0.0, 0.001, 0.03]), ways)


@settings(max_examples=8, deadline=None)
@given(st.lists(few, min_size=1, max_size=8), st.integers(0, 99))
def test_what_is_read_is_what_the_cpu_reads(drawn, seed):
    data = []
    for n, (dtype, count, share, way) in enumerate(drawn):
        base = random_bits(count, dtype, seed + n)
        data.append(encode(f"w{n}", base, changed(base, share, way, seed)).data)
    same_changes([f"w{n}" for n in range(len(drawn))], data)


def parse_all(names, data, offset=0):
    """Of bytes one behind the other, from this one of the memory on."""
    sizes = np.array([raw.numel() for raw in data])
    begins = offset + ends_of(-(-sizes // 16) * 16)
    memory = torch.zeros(int(begins[-1]) + 16, dtype=torch.uint8, device=DEVICE)
    placed = [memory[begin : begin + raw.numel()] for begin, raw in zip(begins.tolist(), data, strict=False)]
    for place, raw in zip(placed, data, strict=True):
        place.copy_(raw)
    return delta_cuda.parse_all(names, memory, begins[:-1], sizes, settle(scan_tensors_any(placed)))


def same_changes(names, data):
    """What comes out of many deltas here is what comes out of each on the CPU."""
    deltas = parse_all(names, [raw.to(DEVICE) for raw in data])
    changes = decode_all(names, deltas)
    assert bool((changes.keys.diff() > 0).all())
    for n, raw in enumerate(data):
        cpu = parse(names[n], raw)
        mine = slice(changes.ends[n], changes.ends[n + 1])
        places, steps = places_and_steps(names[n], cpu)
        assert torch.equal((changes.keys[mine] - changes.origins[n]).cpu(), places)
        assert torch.equal(changes.steps[mine].cpu(), steps)


def places_and_steps(name, delta):
    places, steps = delta_module._changes_of(name, delta)
    return torch.from_numpy(places), torch.from_numpy(steps).to(torch.int32)


def test_changes_are_taken_together_so_many_at_a_time(monkeypatch):
    monkeypatch.setattr(delta_cuda, "CHANGES", 150)
    bases = [random_bits(count, torch.bfloat16, count) for count in (9000, 0, 700, 900, 5000, 1)]
    news = [changed(base, share, "any", 2) for base, share in zip(bases, (0.02, 0, 0.1, 0.1, 0, 1), strict=True)]
    made = encode_all("abcdef", [b.to(DEVICE) for b in bases], [n.to(DEVICE) for n in news])
    for base, new, (delta, _) in zip(bases, news, made, strict=True):
        assert torch.equal(delta.data, encode("w", base, new).data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("start", [0, 1 << 15, 6, 7, (1 << 33) - 1001])
def test_segments_as_large_as_they_are(dtype, start, monkeypatch):
    monkeypatch.setattr(rice_cuda, "SEGMENT", SIZES[0])
    monkeypatch.setattr(rice_cuda, "WORDS", SIZES[1])
    base = random_bits(4 * SIZES[0] // dtype.itemsize + 777, dtype, 1)
    new = changed(base, 0.003, "special", 2)
    bits_of(new)[-1] ^= 1  # half a word
    delta, nonfinite = encode_all(["w"], [base.to(DEVICE)], [new.to(DEVICE)], starts=[start])[0]
    assert torch.equal(delta.data, encode("w", base, new, start=start).data)
    assert nonfinite == scan(new).nonfinite


def test_numbers_too_large_for_a_narrow_table(monkeypatch):
    monkeypatch.setattr(delta_module, "_CHANGES", 1 << 20)
    monkeypatch.setattr(rice_cuda, "CHUNK", 8192)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(rice_cuda, "SEGMENT", 1 << 16)
        monkeypatch.setattr(rice_cuda, "WORDS", 1 << 16)
    base = torch.zeros(700_000, dtype=torch.float32)
    new = base.clone()
    bits_of(new)[630_000:] = 1  # all in one block, after a gap of many bits
    new[3] = float("nan")
    delta, _ = encode_all(["w"], [base.to(DEVICE)], [new.to(DEVICE)])[0]
    assert delta.entry == 8
    assert torch.equal(delta.data, encode("w", base, new).data)


def test_a_wide_table_is_read():
    base = random_bits(1000, torch.bfloat16, 1)
    narrow = encode("w", base, changed(base, 0.03, "any", 2)).data
    end = HEAD_BYTES + 4 * parse("w", narrow).blocks
    table = narrow[HEAD_BYTES:end].view(torch.int16).to(torch.int32).view(torch.uint8)
    wide = torch.cat([narrow[:HEAD_BYTES], table, narrow[end:]])
    wide[8] = 8
    wide[16:24] = torch.tensor([len(wide)]).view(torch.uint8)
    same_changes(["w"], [sealed(wide)])


def test_memory_that_begins_anywhere():
    base, new = random_bits(1001, torch.bfloat16, 1), random_bits(1001, torch.bfloat16, 1)
    bits_of(new)[::50] += 1
    delta, _ = encode_all(["w"], [base.to(DEVICE)[1:]], [new.to(DEVICE)[1:]])[0]
    assert torch.equal(delta.data, encode("w", base[1:].clone(), new[1:].clone()).data)
    assert decode_all(["w"], parse_all(["w"], [delta.data], offset=4)).ends[-1] == delta.count


def test_unlike_tensors_are_refused_by_name():
    with pytest.raises(UsageError, match="'w': no delta"):
        encode_all(["w"], [torch.zeros(3, device=DEVICE)], [torch.zeros(4, device=DEVICE)])
    with pytest.raises(UsageError, match="'w': no delta"):
        encode_all(["w"], [torch.zeros(3, dtype=torch.int32)], [torch.zeros(3, dtype=torch.int32)])


def harm(data, rng):
    """Some of a delta's bytes changed, in its table or its words, under a seal that says they are right."""
    harmed = data.clone()
    for _ in range(rng.choice([1, 1, 2, 8])):
        harmed[rng.randrange(HEAD_BYTES, len(data) - SEAL_BYTES)] = rng.choice([0, 255, rng.randrange(256)])
    if rng.random() < 0.3:
        harmed[7] = rng.randrange(32)  # unit bits
    return sealed(harmed)


def sealed(data):
    digest = scan(data[:-SEAL_BYTES]).digest
    seal = digest.low.to_bytes(8, "little") + digest.high.to_bytes(8, "little")
    data[-SEAL_BYTES:] = torch.frombuffer(bytearray(seal), dtype=torch.uint8)
    return data


@pytest.mark.parametrize("seed", range(25))
def test_harmed_bytes_are_taken_or_refused_as_on_the_cpu(seed):
    rng = random.Random(seed)
    dtype = rng.choice(DTYPES)
    base = random_bits(rng.choice([300, 2000]), dtype, seed)
    good = encode("w", base, changed(base, rng.choice([0.02, 0.05]), rng.choice(["unit", "any"]), seed)).data
    bad = harm(good, rng)
    try:
        same_changes(["w"], [bad])
        refused = None
    except VerificationError as error:
        refused = str(error)
    try:
        places_and_steps("w", parse("w", bad))
        expected = None
    except VerificationError as error:
        expected = str(error)
    assert refused == expected


@pytest.mark.parametrize("seed", range(8))
def test_a_header_is_taken_or_refused_as_on_the_cpu(seed):
    """Whatever is in it, under a seal that says it is right."""
    rng = random.Random(seed)
    base = random_bits(600, torch.bfloat16, seed)
    good = encode("w", base, changed(base, 0.1, "unit", seed)).data
    for _ in range(60):
        bad = good.clone()
        for _ in range(rng.choice([1, 1, 2])):
            bad[rng.randrange(HEAD_BYTES)] = rng.choice([0, 1, 4, 8, 255, rng.randrange(256)])
        outcomes = []
        for taking in (lambda bad: parse("w", bad), lambda bad: parse_all(["v", "w"], [good, bad])):
            try:
                taking(sealed(bad))
                outcomes.append(None)
            except VerificationError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1], bytes(bad[:HEAD_BYTES].tolist()).hex()


def places_in(changes):
    """What each delta changes, by its own elements, and by how much."""
    ends = zip(changes.ends, changes.ends[1:], changes.origins, strict=False)
    return [((changes.keys[a:b] - origin).tolist(), changes.steps[a:b].tolist()) for a, b, origin in ends]


def parsed_places(delta):
    places, steps = places_and_steps("w", parse("w", delta.data))
    return places.tolist(), steps.tolist()


def test_deltas_from_anywhere_come_together():
    bases = [random_bits(n, torch.bfloat16, n) for n in (300, 0, 2000)]
    made = [encode(f"w{n}", base, changed(base, 0.1, "unit", n)) for n, base in enumerate(bases)]
    beside = delta_cuda.together(made, DEVICE)
    assert [*beside.heads["count"]] == [delta.count for delta in made]
    assert places_in(decode_all(["a", "b", "c"], beside)) == [parsed_places(delta) for delta in made]
    news = [changed(base, 0.1, "unit", 3).to(DEVICE) for base in bases]
    at_once = [delta for delta, _ in encode_all(["a", "b", "c"], [base.to(DEVICE) for base in bases], news)]
    for deltas in (at_once, at_once[1:], at_once[::-1], [*at_once, *made]):
        names = [str(n) for n in range(len(deltas))]
        held = delta_cuda.together(deltas, DEVICE)
        assert places_in(decode_all(names, held)) == [parsed_places(delta) for delta in deltas]
        for begin, delta in zip(held.begins.tolist(), deltas, strict=True):
            assert torch.equal(held.memory[begin : begin + delta.nbytes].cpu(), delta.data)


@pytest.mark.parametrize("place", [0, 4, 7, 20, 50, 70, 82, 90, -20, -1])
def test_a_changed_byte_and_a_cut_show(place):
    base = random_bits(600, torch.bfloat16, 1)
    data = encode("w", base, changed(base, 0.1, "unit", 1)).data
    changed_data = data.clone()
    changed_data[place] ^= 4
    for bad in (changed_data, data[:-4], data[:50], data[:0]):
        with pytest.raises(VerificationError) as here:
            parse_all(["v", "w"], [data.to(DEVICE), bad.to(DEVICE)])
        with pytest.raises(VerificationError) as there:
            parse("w", bad)
        assert str(here.value) == str(there.value)


def test_the_numbers_of_lanes_and_blocks_do_not_matter(monkeypatch):
    base = random_bits(1000, torch.float16, 3)
    data = encode("w", base, changed(base, 0.03, "any", 3)).data
    expected = places_and_steps("w", parse("w", data))[0]
    for lanes in (1, 128):
        monkeypatch.setattr(rice_cuda, "LANES", lanes)
        assert torch.equal(decode_all(["w"], parse_all(["w"], [data.to(DEVICE)])).keys.cpu(), expected)


def test_what_was_composed_is_read_too():
    a = random_bits(2000, torch.bfloat16, 5)
    b = changed(a, 0.02, "unit", 6)
    c = changed(b, 0.02, "sign", 7)
    both = compose("w", encode("w", a, b), encode("w", b, c))
    assert torch.equal(both.data, encode_all(["w"], [a.to(DEVICE)], [c.to(DEVICE)])[0][0].data)
    assert decode("w", both, a).indices.numel() == decode_all(["w"], parse_all(["w"], [both.data.to(DEVICE)])).ends[-1]
