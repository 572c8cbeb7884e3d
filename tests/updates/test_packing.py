"""Pieces of a bucket, copied and scanned by one call."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightwire.updates.buckets import Bucket, Piece, cut
from weightwire.updates.digest import Joined, scan
from weightwire.updates.manifest import Manifest, TensorSpec
from weightwire.updates.packing import narrow, pack, spread

DTYPES = ("float32", "bfloat16", "float64", "uint8")
LAYOUTS = st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(1, 3000)), min_size=1, max_size=6)


def buckets_of(layout: list[tuple[str, int]]) -> tuple[Bucket, ...]:
    specs = tuple(TensorSpec(name=str(n), dtype=dtype, shape=(size,)) for n, (dtype, size) in enumerate(layout))
    return cut(Manifest(version=1, tensors=specs, bucket_bytes=4096))


def bits(layout: list[tuple[str, int]]) -> list[torch.Tensor]:
    dtypes = [getattr(torch, dtype) for dtype, _ in layout]
    sizes = [size * dtype.itemsize for dtype, (_, size) in zip(dtypes, layout, strict=True)]
    return [torch.randint(0, 256, (n,), dtype=torch.uint8).view(dtype) for n, dtype in zip(sizes, dtypes, strict=True)]


@given(layout=LAYOUTS)
def test_what_is_packed_and_spread_is_what_it_was_and_both_say_so(layout: list[tuple[str, int]]) -> None:
    tensors = bits(layout)
    targets = [torch.zeros_like(tensor) for tensor in tensors]
    for bucket in buckets_of(layout):
        data = torch.full((bucket.nbytes,), 7, dtype=torch.uint8)
        expected = [scan(piece.of(tensors[piece.tensor]), piece.start) for piece in bucket.pieces]
        assert pack(bucket.pieces, tensors, data) == expected
        assert spread(bucket.pieces, data, targets) == expected
        between = torch.ones(bucket.nbytes, dtype=torch.bool)
        for piece in bucket.pieces:
            between[piece.offset : piece.offset + piece.count * piece.dtype.itemsize] = False
        assert (data[between] == 7).all()  # what lies between two pieces is left alone
    for tensor, target in zip(tensors, targets, strict=True):
        assert torch.equal(tensor.view(torch.uint8), target.view(torch.uint8))


@given(words=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5000))
def test_narrowing_rounds_as_torch_does(words: list[int]) -> None:
    wide = torch.from_numpy(np.array(words, np.uint32).view(np.float32))
    layout = [("bfloat16", len(words))]
    for bucket in buckets_of(layout):
        data = torch.zeros(bucket.nbytes, dtype=torch.uint8)
        found = narrow(bucket.pieces, [wide], data)
        for piece, scanned in zip(bucket.pieces, found, strict=True):
            expected, narrowed = piece.of(wide).to(torch.bfloat16), piece.within(data)
            nan = expected.isnan()
            assert torch.equal(narrowed.isnan(), nan)
            assert torch.equal(narrowed[~nan].view(torch.int16), expected[~nan].view(torch.int16))
            assert scanned == scan(narrowed, piece.start)


def test_halves_zeros_and_ends_round_as_torch_does() -> None:
    edges = [0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x80000000, 1]
    wide = torch.from_numpy(np.array(edges, np.uint32).view(np.float32))
    (bucket,) = buckets_of([("bfloat16", len(edges))])
    data = torch.zeros(bucket.nbytes, dtype=torch.uint8)
    (found,) = narrow(bucket.pieces, [wide], data)
    assert torch.equal(bucket.pieces[0].within(data).view(torch.int16), wide.to(torch.bfloat16).view(torch.int16))
    assert found.nonfinite == 3  # the largest number rounds up to infinity


@pytest.mark.parametrize("way", ["pack", "narrow", "spread"])
@pytest.mark.parametrize("short", ["tensor", "bucket"])
def test_nothing_is_copied_past_an_end(way: str, short: str) -> None:
    (bucket,) = buckets_of([("bfloat16", 40)])
    dtype = torch.float32 if way == "narrow" else torch.bfloat16
    tensors = [torch.zeros(39 if short == "tensor" else 40, dtype=dtype)]
    data = torch.zeros(bucket.nbytes - (short == "bucket"), dtype=torch.uint8)
    arguments = (bucket.pieces, data, tensors) if way == "spread" else (bucket.pieces, tensors, data)
    with pytest.raises(ValueError, match="go beyond"):
        {"pack": pack, "narrow": narrow, "spread": spread}[way](*arguments)  # type: ignore[operator]


@given(layout=LAYOUTS)
def test_what_is_filled_is_read_back(layout: list[tuple[str, int]]) -> None:
    layout = [(layout[0][0], size) for _, size in layout]
    tensors = bits(layout)
    places = [torch.zeros_like(tensor) for tensor in tensors]
    assert Joined(places).fill(tensors) == (True, Joined(tensors).scan())
    for tensor, place in zip(tensors, places, strict=True):
        assert torch.equal(tensor.view(torch.uint8), place.view(torch.uint8))


def test_it_is_filled_some_at_a_time() -> None:
    sizes = [10, 70_000, 65_536, 1, 40_000, 30_000, 200_000, 3]  # 256 KiB are 65,536 elements
    tensors = [torch.randn(size) for size in sizes]
    places = [torch.zeros(size) for size in sizes]
    assert Joined(places).fill(tensors) == (True, Joined(tensors).scan())
    assert all(torch.equal(*pair) for pair in zip(places, tensors, strict=True))


def test_places_with_memory_in_common_cannot_be_filled_by_one_call() -> None:
    both = torch.zeros(600)
    assert Joined([both[400:], both[:400]]).can_be_filled
    joined = Joined([both[:400], both[200:]])
    assert not joined.can_be_filled
    with pytest.raises(ValueError, match="each apart"):
        joined.fill([torch.ones(400), torch.zeros(400)])


def test_a_piece_before_its_tensor_is_refused() -> None:
    whole = torch.arange(8.0)
    with pytest.raises(ValueError, match="go beyond"):
        pack([Piece(0, -3, 2, 0, torch.float32)], [whole[4:]], torch.zeros(8, dtype=torch.uint8))


@pytest.mark.parametrize(
    "sources", [[torch.zeros(3)], [torch.zeros(4), torch.zeros(1)], [torch.zeros(2, 4)[:, ::2]], [torch.zeros(4).int()]]
)
def test_only_what_fits_is_filled_in(sources: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError):
        Joined([torch.zeros(4)]).fill(sources)


def test_copies_are_not_filled_in_place_of_what_they_are_copies_of() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        Joined([torch.zeros(4, 4).t()[:2]]).fill([torch.zeros(2, 4)])
