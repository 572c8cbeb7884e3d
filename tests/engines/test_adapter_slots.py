"""Where vLLM's modules hold an adapter, by shapes of vLLM's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from weightwire.engines.vllm import adapters
from weightwire.engines.vllm.adapters import _Binding, _Slot
from weightwire.errors import VerificationError
from weightwire.updates.digest import Joined, scan


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


def binding(**modules: Any) -> _Binding:
    manager = SimpleNamespace(_adapter_manager=SimpleNamespace(modules=modules, packed_modules={}))
    made = _Binding(manager, None)
    made.modules = modules
    return made


def given_for(bound: _Binding) -> dict[str, list[torch.Tensor | None]]:
    # In another order than that in which the modules are looked up.
    names = reversed(bound.modules)
    return {name: [torch.randn_like(place) for place in bound._slot(1).places[name]] for name in names}


def test_a_slot_is_filled_with_what_each_module_is_given() -> None:
    bound = binding(qkv=linear(), experts=experts())
    given = given_for(bound)
    proof, held = bound.fill(1, given)
    places = bound._slot(1).places
    assert proof == {"qkv": "read back", "experts": "read back"}
    assert all(torch.equal(*pair) for name in given for pair in zip(places[name], given[name], strict=True))
    assert held == scan(torch.cat([part.reshape(-1) for name in places for part in given[name]])).digest.hex()
    other = bound._slot(0).places.values()
    assert not any(place.any() for found in other for place in found)


def test_what_one_call_fills_is_as_what_is_copied_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, turned = binding(qkv=linear(), experts=experts()), binding(qkv=linear(), experts=experts())
    given = given_for(whole)
    calls = []
    for where, name in ((adapters, "_copy_into"), (Joined, "fill")):
        plain = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *args, name=name, plain=plain: (calls.append(name), plain(*args))[1])
    strided = {name: [part.mT.contiguous().mT for part in parts] for name, parts in given.items()}
    assert whole.fill(1, given) == turned.fill(1, strided)
    assert calls == ["fill", "_copy_into"]
    places = zip(whole._slot(1).joined._held, turned._slot(1).joined._held, strict=True)
    assert all(torch.equal(*pair) for pair in places)


def test_beside_what_is_smaller_or_missing_nothing_is_left() -> None:
    bound = binding(qkv=linear())
    bound.fill(1, given_for(bound))
    small = torch.ones(1, 8)
    bound.fill(1, {"qkv": [small, torch.ones(6, 1), None]})
    a, q, k = bound._slot(1).places["qkv"]
    assert torch.equal(a, torch.cat([small, torch.zeros(1, 8)]))
    assert torch.equal(q, torch.stack([torch.ones(6), torch.zeros(6)], 1))
    assert not k.any()


@pytest.mark.parametrize("layout", ["whole", "strided"])
def test_a_module_that_does_not_hold_what_it_was_given_is_named(layout: str) -> None:
    lost = linear()
    lost.lora_b_stacked = (lost.lora_b_stacked[0], lost.lora_b_stacked[0][:, :, :4])  # of one memory
    bound = binding(experts=experts(), qkv=lost)
    given = given_for(bound)
    if layout == "strided":
        given["experts"] = [part.mT.contiguous().mT for part in given["experts"] if part is not None]
    with pytest.raises(VerificationError, match="qkv was read back and does not hold"):
        bound.fill(1, given)


def test_what_vllm_has_set_itself_is_left_as_it_is() -> None:
    bound = binding(qkv=linear())
    bound._slot(1).places["qkv"][0].fill_(2.0)
    proof, held = bound.fill(1, {})
    assert proof == {"qkv": "staged"}
    assert held == bound._slot(1).joined.scan().digest.hex()
    assert (bound._slot(1).places["qkv"][0] == 2.0).all()
