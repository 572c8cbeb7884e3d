"""Where vLLM's modules hold an adapter, by shapes of vLLM's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from weightwire.engines.vllm.adapters import _Slot
from weightwire.updates.digest import scan


def linear() -> Any:
    return SimpleNamespace(
        lora_a_stacked=(torch.zeros(3, 1, 2, 8),), lora_b_stacked=(torch.zeros(3, 1, 6, 2), torch.zeros(3, 1, 4, 2))
    )


def experts() -> Any:
    """As `FusedMoEWithLoRA` makes them, two experts in each of three slots."""
    shapes = {"w13_lora_a": (2, 8), "w2_lora_a": (2, 6), "w13_lora_b": (6, 2), "w2_lora_b": (8, 2)}
    made = SimpleNamespace()
    for name, shape in shapes.items():
        stacks = (torch.zeros(3, 2, *shape) for _ in range(2 if "w13" in name else 1))
        setattr(made, f"{name}_stacked", tuple(stacks))
    for which in "ab":
        stacked = getattr(made, f"w13_lora_{which}_stacked")
        listed = [stack[slot][expert] for slot in range(3) for expert in range(2) for stack in stacked]
        setattr(made, f"lora_{which}_stacked", listed)
    return made


def test_a_slot_is_what_every_module_holds_of_it_and_no_more() -> None:
    modules = {"qkv": linear(), "experts": experts()}
    slot = _Slot(modules, 1)
    assert (slot.matrices, slot.numel) == (9, 16 + 12 + 8 + 32 + 32 + 24 + 24 + 24 + 32)
    empty = slot.joined.scan()
    for number, stack in enumerate((*modules["qkv"].lora_b_stacked, *modules["experts"].w2_lora_b_stacked)):
        stack[1] = number + 1.0
        assert slot.joined.scan() != empty
        empty = slot.joined.scan()
    modules["experts"].w13_lora_a_stacked[0][2] = 1.0
    assert slot.joined.scan() == empty
    held = torch.cat([place.reshape(-1) for places in slot.places.values() for place in places])
    assert slot.joined.scan() == scan(held)


def test_modules_whose_memory_has_moved_are_looked_up_again() -> None:
    modules = {"qkv": linear(), "experts": experts()}
    slot = _Slot(modules, 0)
    assert slot.is_there(modules)
    modules["experts"].w2_lora_a_stacked = (torch.zeros(3, 2, 2, 6),)
    assert not slot.is_there(modules)


def test_a_slot_is_compared_with_what_it_was_to_hold_wherever_that_is() -> None:
    slot = _Slot({"qkv": linear()}, 1)
    places = slot.places["qkv"]
    for place in places:
        place.normal_()
    expected = [place.clone() for place in places]
    assert slot.is_as(expected) == (True, slot.joined.scan())
    expected[2][0, 0] += 1  # in the same place as before
    assert not slot.is_as(expected)[0]
    assert slot.is_as([place.clone() for place in places])[0]
    turned = [place.t().contiguous().t() for place in places]
    assert slot.is_as(turned)[0]
    turned[0].zero_()  # these are copied each time
    assert not slot.is_as(turned)[0]
