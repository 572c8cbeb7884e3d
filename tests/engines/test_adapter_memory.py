"""Memory of an adapter that was dropped, and when the next one may have it."""

from __future__ import annotations

import pytest
import torch

from weightwire.engines.vllm import spare
from weightwire.engines.vllm.adapter_memory import AdapterMemory, SpareMemory
from weightwire.updates.manifest import TensorSpec

CPU = torch.device("cpu")
SPECS = [
    TensorSpec(name=f"{module}.lora_{which}.weight", dtype="float32", shape=shape)
    for module in ("q", "v")
    for which, shape in (("A", (2, 4)), ("B", (6, 2)))
]


def test_every_matrix_lies_where_its_row_says_and_only_b_is_there_twice() -> None:
    memory = AdapterMemory(SPECS, torch.bfloat16, CPU)
    for number, spec in enumerate(SPECS):
        sent, given = memory.sent[spec.name], memory.given[spec.name]
        memory.rows[number].fill_(number + 1)
        assert (tuple(sent.shape), sent.dtype) == (spec.shape, torch.bfloat16)
        assert sent.unique().tolist() == [number + 1]
        assert (sent.data_ptr() == given.data_ptr()) is ("lora_A" in spec.name)
    assert [[flat.numel(), own.numel()] for flat, own in memory.flat] == [[16, 16], [24, 24]]


@pytest.mark.parametrize("of", ["sent", "given", "row"])
def test_memory_of_which_somebody_has_a_part_is_not_given_to_another(of: str) -> None:
    store = SpareMemory()
    memory = store.take(SPECS, torch.float32, CPU)
    name = SPECS[1].name
    part = {"sent": memory.sent[name], "given": memory.given[name], "row": memory.rows[1]}[of].detach()
    store.keep(memory)
    assert not store.fits(SPECS, torch.float32, CPU)
    assert store.take(SPECS, torch.float32, CPU) is not memory
    del part
    store.keep(memory)
    assert store.fits(SPECS, torch.float32, CPU)
    assert store.take(SPECS, torch.float32, CPU) is memory


def test_the_next_model_is_made_while_nobody_waits_for_it() -> None:
    memory, pattern, other = AdapterMemory(SPECS, torch.float32, CPU), object(), object()
    fits = lambda: memory.fits(SPECS, torch.float32, CPU)  # noqa: E731
    memory.prepare(pattern, dict)
    assert fits()
    held = memory.sent[SPECS[0].name].detach()
    assert not fits()
    del held
    model = memory.take_model(pattern)
    assert {name: tensor.data_ptr() for name, tensor in model.items()} == {
        name: tensor.data_ptr() for name, tensor in memory.given.items()
    }
    assert memory.take_model(pattern) is None
    assert not fits()  # somebody has it now
    memory.prepare(pattern, dict)
    assert memory.take_model(pattern) is None, "made of what another has"
    del model
    assert fits()
    memory.prepare(pattern, dict)
    assert memory.take_model(other) is None
    assert fits()


def test_it_must_fit() -> None:
    store = SpareMemory()
    for specs, dtype in ((SPECS[:2], torch.float32), (SPECS, torch.bfloat16)):
        memory = AdapterMemory(SPECS, torch.float32, CPU)
        store.keep(memory)
        assert store.take(specs, dtype, CPU) is not memory


def test_one_is_kept_and_no_more() -> None:
    store, first, second = SpareMemory(), *(AdapterMemory(SPECS, torch.float32, CPU) for _ in range(2))
    store.keep(first)
    store.keep(second)
    assert store.take(SPECS, torch.float32, CPU) is second
    assert store.take(SPECS, torch.float32, CPU) is not first


def test_where_torch_does_not_say_who_has_it_nothing_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    assert spare.uses(torch.zeros(1)) is None
    store, memory = SpareMemory(), AdapterMemory(SPECS, torch.float32, CPU)
    store.keep(memory)
    assert store.take(SPECS, torch.float32, CPU) is not memory
