"""The digest's kernel against the digest on the CPU, element for element."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.device import DEVICE, few_rows

from weightwire.updates import digest_cuda
from weightwire.updates.boxes import Box
from weightwire.updates.digest import NO_DIGEST, Scan, scan, scan_box, settle
from weightwire.updates.manifest import DTYPES

NAMES = sorted(set(DTYPES) - {"bool"})


def random_bytes(nbytes, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator).to(DEVICE)


def scans(lines):
    return settle(digest_cuda.scan_lines(digest_cuda.table(lines, DEVICE)))


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    count=st.integers(1, 3000),
    start=st.one_of(st.integers(0, 9), st.integers((1 << 34) // 8 - 2000, (1 << 34) // 8 + 9)),
    lead=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_a_run_anywhere_in_memory_has_the_digest_of_the_cpu(name, count, start, lead, seed):
    dtype = getattr(torch, name)
    memory = random_bytes((count + lead) * dtype.itemsize, seed).view(dtype)
    run = memory[lead:]
    line = digest_cuda.line_of(run.data_ptr(), start, count, dtype)
    with few_rows():
        assert scans([line]) == [scan(run.cpu(), start)]


@settings(max_examples=20, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    cuts=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=3),
    name=st.sampled_from(["bfloat16", "float32", "uint8"]),
)
def test_a_box_of_a_tensor_has_the_digest_of_the_cpu(shape, cuts, name):
    dtype = getattr(torch, name)
    whole = random_bytes(torch.Size(shape).numel() * dtype.itemsize, 0).view(dtype).view(shape)
    start = tuple(int(cut[0] * (size - 1)) for cut, size in zip(cuts, shape, strict=False))
    extent = tuple(1 + int(cut[1] * (size - at - 1)) for cut, size, at in zip(cuts, shape, start, strict=False))
    box = Box(start, extent)
    part = whole[tuple(slice(at, at + size) for at, size in zip(start, extent, strict=True))]
    lines = digest_cuda.lines_of(part.data_ptr(), box, part.stride(), shape, dtype)
    with few_rows():
        assert sum(scans(lines), Scan(NO_DIGEST, 0)) == scan_box(part.cpu(), box, shape)


def test_lines_of_every_kind_share_a_launch():
    tensors = [
        random_bytes(n, n).view(dtype) for n, dtype in ((4096, torch.bfloat16), (6, torch.float16), (9, torch.uint8))
    ]
    tensors.append(torch.tensor([float("nan"), 1.0, float("inf")], device=DEVICE))
    lines = [digest_cuda.line_of(t.data_ptr(), 0, t.numel(), t.dtype) for t in tensors]
    found = scans(lines)
    assert found == [scan(tensor.cpu()) for tensor in tensors]
    assert found[-1].nonfinite == 2


@settings(max_examples=15, deadline=None)
@given(
    counts=st.lists(st.tuples(st.sampled_from([7, 40, 2050]), st.integers(1, 6)), min_size=1, max_size=3),
    name=st.sampled_from(["bfloat16", "float32", "float64", "uint8"]),
    start=st.sampled_from([0, 3]),
    bad=st.integers(0, 17),
)
def test_of_lines_that_are_alike_each_gets_its_own(counts, name, start, bad):
    dtype = getattr(torch, name)
    runs = [random_bytes(n * dtype.itemsize, i).view(dtype) for n, times in counts for i in range(times)]
    if dtype.is_floating_point:
        runs[bad % len(runs)][-1] = float("inf")
    runs = [runs[i] for i in torch.randperm(len(runs), generator=torch.Generator().manual_seed(bad))]
    lines = [digest_cuda.line_of(run.data_ptr(), start, run.numel(), dtype) for run in runs]
    with few_rows(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest_cuda, "_FEW", 0)
        assert scans(lines) == [scan(run.cpu(), start) for run in runs]


def test_rows_of_several_parameters_are_scanned_together():
    whole = random_bytes(3 * 50 * 16, 5).view(torch.bfloat16).view(3, 50, 8)
    box = Box((0, 0), (50, 8))
    parts = [whole[0], whole[1], whole[2].clone()] * 4
    lines = [line for p in parts for line in digest_cuda.lines_of(p.data_ptr(), box, p.stride(), (50, 24), p.dtype)]
    ready = digest_cuda.table(lines, DEVICE)
    assert [(part.together, len(part.table)) for part in ready.parts] == [(2, 6)]
    with few_rows():
        assert scans(lines) == [scan_box(part.cpu(), box, (50, 24)) for part in parts]


def test_a_flipped_bit_shows():
    data = random_bytes(34_002, 1).view(torch.bfloat16)  # of two tiles
    line = digest_cuda.line_of(data.data_ptr(), 0, data.numel(), data.dtype)
    before = scans([line])
    for place in (0, 1, 5000, 17_000):
        data.view(torch.uint8)[2 * place] ^= 1
        assert scans([line]) != before
        data.view(torch.uint8)[2 * place] ^= 1
    assert before == [scan(data.cpu())]


def test_a_box_of_more_rows_than_a_tile():
    whole = random_bytes(50 * 9 * 2, 3).view(torch.int16).view(50, 9)
    box = Box((3, 2), (40, 5))
    part = whole[3:43, 2:7]
    lines = digest_cuda.lines_of(part.data_ptr(), box, part.stride(), (50, 9), torch.int16)
    assert sum(scans(lines), Scan(NO_DIGEST, 0)) == scan_box(part.cpu(), box, (50, 9))
