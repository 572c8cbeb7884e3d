import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightwire.updates.boxes import Box, Part, intersect, rectangles, strides_of


def places(box):
    return list(itertools.product(*(range(a, a + n) for a, n in zip(box.start, box.shape, strict=True))))


@st.composite
def intervals(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=5)))
    start, stop = sorted(draw(st.tuples(*[st.integers(0, math.prod(shape))] * 2)))
    return shape, start, stop


@st.composite
def parts(draw):
    shape, starts, sizes = [], [], []
    for _ in range(draw(st.integers(0, 4))):
        start, size, rest = draw(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 3)))
        shape.append(start + size + rest)
        starts.append(start)
        sizes.append(size)
    return Part(tuple(shape), Box(tuple(starts), tuple(sizes)))


@st.composite
def box_pairs(draw):
    ndim = draw(st.integers(0, 4))
    box = st.builds(Box, st.tuples(*[st.integers(0, 5)] * ndim), st.tuples(*[st.integers(0, 4)] * ndim))
    return draw(box), draw(box)


@given(st.lists(st.integers(0, 5), max_size=5))
def test_strides_are_those_of_a_contiguous_tensor(shape):
    assert strides_of(shape) == torch.empty(shape).stride()


@given(parts())
def test_places_of_a_part_are_those_of_its_elements_in_the_tensor(part):
    numbers = torch.arange(math.prod(part.shape)).reshape(part.shape)
    inside = tuple(slice(a, a + n) for a, n in zip(part.box.start, part.box.shape, strict=True))
    there = numbers[inside].reshape(-1).numpy()
    assert part.numel == len(there)
    assert part.places(np.arange(part.numel)).tolist() == there.tolist()
    assert part.is_run == (part.numel == 0 or there[-1] - there[0] == part.numel - 1)
    assert part.numel == 0 or part.start == there[0]
    filled = np.full(part.numel, -1)
    for own, at, length in part.runs():
        filled[own : own + length] = np.arange(at, at + length)
    assert filled.tolist() == there.tolist()


@given(intervals())
def test_rectangles_are_exactly_the_interval_in_order(interval):
    shape, start, stop = interval
    every = list(itertools.product(*map(range, shape)))
    covered = [place for box in rectangles(shape, start, stop) for place in places(box)]
    assert covered == every[start:stop]


@given(intervals())
def test_rectangles_are_disjoint_and_none_is_empty(interval):
    boxes = list(rectangles(*interval))
    assert all(math.prod(box.shape) for box in boxes)
    assert all(intersect(a, b) is None for a, b in itertools.combinations(boxes, 2))


@given(intervals())
def test_rectangles_are_at_most_two_a_dimension_less_one(interval):
    assert len(list(rectangles(*interval))) <= max(2 * len(interval[0]) - 1, 1)


@pytest.mark.parametrize("ndim", [1, 2, 3, 4, 5])
def test_all_but_the_corners_takes_the_most_rectangles(ndim):
    shape = (3,) * ndim
    assert len(list(rectangles(shape, 1, 3**ndim - 1))) == 2 * ndim - 1


@given(intervals())
def test_a_whole_tensor_is_one_rectangle(interval):
    shape = interval[0]
    assert list(rectangles(shape, 0, math.prod(shape))) == [Box((0,) * len(shape), shape)]


@pytest.mark.parametrize("shape", [(), (4,), (0,), (3, 0), (3, 4)])
def test_an_empty_interval_has_no_rectangle(shape):
    assert list(rectangles(shape, 0, 0)) == []


def test_a_huge_tensor_takes_no_longer():
    boxes = list(rectangles((1 << 16, 1 << 16, 1 << 16), 1, (1 << 48) - 1))
    assert len(boxes) == 5
    assert sum(math.prod(box.shape) for box in boxes) == (1 << 48) - 2


@given(box_pairs())
def test_an_intersection_is_every_place_in_both(pair):
    a, b = pair
    both = sorted(set(places(a)) & set(places(b)))
    shared = intersect(a, b)
    assert both == ([] if shared is None else places(shared))


@given(box_pairs())
def test_an_intersection_has_no_order(pair):
    a, b = pair
    assert intersect(a, b) == intersect(b, a)


def test_boxes_that_only_touch_share_nothing():
    assert intersect(Box((0, 0), (2, 2)), Box((2, 0), (2, 2))) is None


def test_boxes_of_different_dimensions_are_a_mistake():
    with pytest.raises(ValueError):
        intersect(Box((0,), (2,)), Box((0, 0), (2, 2)))
