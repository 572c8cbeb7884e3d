"""Later revisions' models from the first one's, with classes shaped like vLLM's."""

from __future__ import annotations

from typing import Any

import torch

from weightwire.engines.vllm.adapter_template import AdapterTemplate


class Weights:
    def __init__(self, name: str, a: Any, b: Any, scaling: float) -> None:
        self.module_name, self.rank, self.lora_a, self.lora_b, self.scaling = name, 2, a, b, scaling

    def optimize(self) -> None:
        self.lora_b *= self.scaling
        self.scaling = 1


class Model:
    def __init__(self, id: int, loras: dict[str, Weights]) -> None:
        self.id, self.rank, self.loras, self.modules_to_save = id, 2, loras, {}


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {f"{module}.{which}": torch.full((2, 3), value) for module in ("q", "k") for which in "ab"}


def built(id: int, given: dict[str, torch.Tensor]) -> Model:
    return Model(id, {m: Weights(m, given[f"{m}.a"], given[f"{m}.b"], s) for m, s in (("q", 2.0), ("k", 0.5))})


def facts(model: Any) -> dict[str, Any]:
    return {**vars(model), "loras": {name: vars(lora) for name, lora in model.loras.items()}}


def test_it_makes_what_would_have_been_made_whatever_became_of_the_first() -> None:
    first = built(1, given := tensors(1.0))
    template = AdapterTemplate.of(first, given)
    assert template is not None
    # As vLLM does when it takes one: matrices are scaled, and parts packed.
    for lora in first.loras.values():
        lora.optimize()
    first.loras["qk"] = first.loras.pop("q")
    first.modules_to_save["head"] = object()
    for id in (2, 3):
        again, expected = template.build(id, own := tensors(float(id))), built(id, own)
        assert type(again) is Model
        assert {type(lora) for lora in again.loras.values()} == {Weights}
        assert facts(again) == facts(expected)
        assert all(again.loras[m].lora_a is own[f"{m}.a"] and again.loras[m].lora_b is own[f"{m}.b"] for m in "qk")
        for lora in again.loras.values():
            lora.optimize()
        again.modules_to_save["head"] = object()


def test_of_what_it_does_not_know_it_makes_no_pattern() -> None:
    copied = built(1, given := tensors(1.0))
    copied.loras["q"].lora_a = given["q.a"].clone()
    assert AdapterTemplate.of(copied, given) is None
    odd = built(1, given)
    odd.loras["k"].bias = torch.zeros(3)  # type: ignore[attr-defined]
    assert AdapterTemplate.of(odd, given) is None
    listed = built(1, given)
    listed.loras["k"].lora_a = [given["k.a"]]
    assert AdapterTemplate.of(listed, given) is None
    odd = built(1, given)
    odd.modules_to_save["head"] = torch.zeros(2)
    assert AdapterTemplate.of(odd, given) is None
