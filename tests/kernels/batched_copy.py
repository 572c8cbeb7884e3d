"""The batched copy's kernel against tensor assignments."""

from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.device import DEVICE, few_rows

from weightwire.engines.vllm import batched_copy
from weightwire.engines.vllm.adapters import _Slot
from weightwire.updates.boxes import rows_of
from weightwire.updates.digest import scan


@st.composite
def rectangles(draw, shape):
    start = [draw(st.integers(0, size - 1)) for size in shape]
    extent = [draw(st.integers(1, size - at)) for size, at in zip(shape, start, strict=True)]
    return tuple(slice(at, at + size) for at, size in zip(start, extent, strict=True))


@settings(max_examples=25, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.uint8, torch.int16, torch.float32, torch.float64]))
def test_rectangles_go_where_an_assignment_puts_them(data, dtype):
    source = torch.arange(7 * 5 * 70).view(7, 5, 70).to(DEVICE, dtype)
    # Bands of the target, so that copies do not overlap.
    target = torch.zeros(3, 9, 6, 80, dtype=dtype, device=DEVICE)
    expected = target.clone()
    moves = []
    for band in range(3):
        part = source[data.draw(rectangles(source.shape))]
        corner = tuple(slice(at, at + size) for at, size in zip((1, 1, 3), part.shape, strict=True))
        place = target[band][corner]
        expected[band][corner] = part
        rows = rows_of(part.shape, part.stride(), place.stride())
        moves += [batched_copy.Move.of(r, part.data_ptr(), place.data_ptr(), part.itemsize) for r in rows]
    with few_rows():
        copies = batched_copy.BatchedCopy(moves, DEVICE)
        copies.run()
    assert torch.equal(target, expected)
    assert copies.nbytes == sum(move.rows * move.width for move in moves)


def test_long_runs_and_nothing_at_all():
    source, target = torch.randn(50_001, device=DEVICE), torch.zeros(50_001, device=DEVICE)
    batched_copy.BatchedCopy([], DEVICE).run()
    move = batched_copy.Move(source.data_ptr(), target.data_ptr(), 1, source.nbytes, 0, 0)
    batched_copy.BatchedCopy([move], DEVICE).run()
    assert torch.equal(source, target)


def test_a_rectangle_of_more_rows_than_a_tile():
    source = torch.arange(50 * 9, dtype=torch.int16, device=DEVICE).view(50, 9)
    target = torch.zeros(60, 20, dtype=torch.int16, device=DEVICE)
    part, place = source[3:43, 2:7], target[11:51, 4:9]
    rows = rows_of(part.shape, part.stride(), place.stride())
    batched_copy.BatchedCopy(
        [batched_copy.Move.of(r, part.data_ptr(), place.data_ptr(), 2) for r in rows], DEVICE
    ).run()
    expected = torch.zeros_like(target)
    expected[11:51, 4:9] = part
    assert torch.equal(target, expected)


def test_a_slot_of_an_adapter_is_filled_by_one_launch():
    stacks = [torch.zeros(3, 1, *shape, device=DEVICE) for shape in ((2, 8), (6, 2), (4, 2))]
    slot = _Slot({"qkv": SimpleNamespace(lora_a_stacked=(stacks[0],), lora_b_stacked=tuple(stacks[1:]))}, 1)
    parts = [torch.randn_like(place) for place in slot.places["qkv"]]
    for again in range(3):
        if again == 2:  # elsewhere
            parts = [part.clone() for part in parts]
        parts[again].mul_(2)
        same, held = slot.fill(parts)
        assert same
        assert all(torch.equal(place, part) for place, part in zip(slot.places["qkv"], parts, strict=True))
        assert held == scan(torch.cat([part.reshape(-1) for part in parts]).cpu())
    assert not any(stack[[0, 2]].any() for stack in stacks)
