"""Whether tensors hold the same bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightwire.updates.alike import alike

DTYPES = [torch.float32, torch.bfloat16, torch.uint8]


@given(sizes=st.lists(st.integers(0, 70), min_size=1, max_size=6), dtype=st.sampled_from(DTYPES), data=st.data())
def test_any_bit_that_differs_is_seen(sizes: list[int], dtype: torch.dtype, data: st.DataObject) -> None:
    ones = [torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8).view(dtype) for size in sizes]
    others = [one.clone() for one in ones]
    assert alike(ones, others)
    if (total := sum(one.nbytes for one in ones)) == 0:
        return
    at = data.draw(st.integers(0, total - 1))
    for other in others:
        if at < other.nbytes:
            other.view(torch.uint8)[at] ^= 1 << data.draw(st.integers(0, 7))
            break
        at -= other.nbytes
    assert not alike(ones, others)


def test_it_is_bits_that_are_compared() -> None:
    nan, zero = torch.tensor([float("nan")]), torch.zeros(1)
    assert alike([nan], [nan.clone()])
    assert not alike([zero], [-zero])


def test_strides_and_leading_ones_do_not_count() -> None:
    whole = torch.randn(6, 8)
    assert alike([whole[:, 2:5], whole[None]], [whole[:, 2:5].clone(), whole])
    assert not alike([whole[:, 2:5]], [whole[:, 3:6]])


@pytest.mark.parametrize("other", [torch.zeros(3), torch.zeros(2, dtype=torch.float64)])
def test_what_cannot_be_compared_is_an_error(other: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="beside"):
        alike([torch.zeros(2)], [other])
    with pytest.raises(ValueError, match="shorter"):
        alike([torch.zeros(2)], [])
