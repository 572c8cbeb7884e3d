import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightwire.updates.buckets import ALIGNMENT, cut
from weightwire.updates.manifest import DTYPES, Manifest, TensorSpec

sizes = st.integers(0, 40) | st.integers(0, 3000)
shapes = st.just(()) | st.tuples(sizes) | st.tuples(st.integers(0, 60), st.integers(0, 60))


@st.composite
def manifests(draw):
    described = draw(st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), shapes), min_size=1, max_size=8))
    tensors = tuple(
        TensorSpec(name=f"t{number}", dtype=dtype, shape=shape) for number, (dtype, shape) in enumerate(described)
    )
    limit = draw(st.sampled_from([4096, 4097, 4100, 8192]) | st.integers(4096, 40_000))
    return Manifest(version=1, tensors=tensors, bucket_bytes=limit)


def manifest_of(*tensors, bucket_bytes=4096):
    specs = (TensorSpec(name=f"t{i}", dtype=dtype, shape=shape) for i, (dtype, shape) in enumerate(tensors))
    return Manifest(version=1, tensors=tuple(specs), bucket_bytes=bucket_bytes)


def pieces_by_tensor(manifest):
    pieces = [piece for bucket in cut(manifest) for piece in bucket.pieces]
    return {number: [p for p in pieces if p.tensor == number] for number in range(len(manifest.tensors))}


@given(manifests())
def test_every_element_travels_exactly_once(manifest):
    for number, pieces in pieces_by_tensor(manifest).items():
        ends = [0, *(piece.start + piece.count for piece in pieces)]
        assert [piece.start for piece in pieces] == ends[:-1]
        assert ends[-1] == manifest.tensors[number].numel


@given(manifests())
def test_pieces_travel_in_manifest_order(manifest):
    travelled = [(piece.tensor, piece.start) for bucket in cut(manifest) for piece in bucket.pieces]
    assert travelled == sorted(travelled)


@given(manifests())
def test_no_bucket_is_larger_than_agreed(manifest):
    assert all(bucket.nbytes <= manifest.bucket_bytes for bucket in cut(manifest))


@given(manifests())
def test_no_bucket_and_no_piece_is_empty(manifest):
    assert all(bucket.pieces and all(piece.count > 0 for piece in bucket.pieces) for bucket in cut(manifest))


@given(manifests())
def test_buckets_are_numbered_as_they_come(manifest):
    buckets = cut(manifest)
    assert [bucket.index for bucket in buckets] == list(range(len(buckets)))


@given(manifests())
def test_pieces_are_aligned_apart_and_packed_as_close_as_that_allows(manifest):
    for bucket in cut(manifest):
        ends = [piece.offset + piece.count * manifest.tensors[piece.tensor].itemsize for piece in bucket.pieces]
        assert bucket.pieces[0].offset == 0
        assert all(piece.offset % ALIGNMENT == 0 for piece in bucket.pieces)
        gaps = [piece.offset - end for end, piece in zip(ends, bucket.pieces[1:], strict=False)]
        assert all(0 <= gap < ALIGNMENT for gap in gaps)
        assert bucket.nbytes == ends[-1]


@given(manifests())
def test_a_tensor_that_fits_one_bucket_is_never_split(manifest):
    for number, pieces in pieces_by_tensor(manifest).items():
        if 0 < manifest.tensors[number].nbytes <= manifest.bucket_bytes:
            assert len(pieces) == 1


@given(manifests())
def test_a_split_tensor_leaves_no_bucket_half_empty(manifest):
    for bucket, following in itertools.pairwise(cut(manifest)):
        last, first = bucket.pieces[-1], following.pieces[0]
        if last.tensor == first.tensor:
            assert manifest.bucket_bytes - bucket.nbytes < manifest.tensors[last.tensor].itemsize


@given(manifests())
def test_both_sides_cut_the_same(manifest):
    again = Manifest(version=9, tensors=manifest.tensors, bucket_bytes=manifest.bucket_bytes)
    assert cut(manifest) == cut(again)


def test_a_scalar_travels_as_one_element():
    (bucket,) = cut(manifest_of(("float64", ())))
    assert [(piece.start, piece.count) for piece in bucket.pieces] == [(0, 1)]
    assert bucket.nbytes == 8


def test_tensors_without_elements_take_no_room():
    (bucket,) = cut(manifest_of(("float32", (0,)), ("float32", (4096, 0)), ("int8", (1,))))
    assert [piece.tensor for piece in bucket.pieces] == [2]


def test_an_update_without_elements_has_no_bucket():
    assert cut(manifest_of(("float32", (0,)))) == ()


def test_a_tensor_of_exactly_one_bucket_fills_it():
    buckets = cut(manifest_of(("int8", (1,)), ("int8", (4096,)), ("int8", (1,))))
    assert [bucket.nbytes for bucket in buckets] == [1, 4096, 1]


def test_a_large_tensor_begins_in_the_room_that_is_left():
    first, second = cut(manifest_of(("int8", (64,)), ("int8", (5000,))))
    assert [piece.count for piece in first.pieces] == [64, 4032]
    assert [piece.count for piece in second.pieces] == [968]


def test_what_follows_a_large_tensor_shares_its_last_bucket():
    _, last = cut(manifest_of(("int8", (4097,)), ("int8", (10,))))
    assert [(piece.tensor, piece.offset) for piece in last.pieces] == [(0, 0), (1, ALIGNMENT)]


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_no_element_is_cut_in_two(name):
    size = DTYPES[name]
    for limit in range(4096, 4096 + 8):
        buckets = cut(manifest_of((name, (5000,)), bucket_bytes=limit))
        assert all(bucket.nbytes % size == 0 for bucket in buckets)
        assert sum(bucket.nbytes for bucket in buckets) == 5000 * size
