"""How a module of a vLLM model keeps its weight and takes a new one, found out without vLLM."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from weightwire.engines.vllm.copy_plan import Run
from weightwire.engines.vllm.layout import Slot, _packs
from weightwire.engines.vllm.recording import record
from weightwire.errors import VerificationError
from weightwire.sources.tensors import TensorSource
from weightwire.updates.digest import scan
from weightwire.updates.manifest import Manifest


def layer(*, weight: torch.Tensor, kernel: object = None) -> torch.nn.Module:
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(weight)
    if kernel is not None:
        module.cpu_linear = kernel
    return module


@pytest.mark.parametrize("rows", [1, 2, 3, 64])
def test_a_kernel_that_takes_the_weight_it_is_given_keeps_no_packing(rows: int) -> None:
    weight = torch.randn(rows, 8)
    packed = weight.clone()
    assert not _packs(layer(weight=weight, kernel=torch.nn.functional.linear))
    assert _packs(layer(weight=weight, kernel=lambda x, weight, bias: x @ packed.t()))


def test_a_weight_given_up_for_its_packing_and_a_module_without_a_kernel() -> None:
    assert _packs(layer(weight=torch.empty(0), kernel=torch.nn.functional.linear))
    assert not _packs(layer(weight=torch.randn(4, 8)))


def test_a_weight_that_nothing_else_shares_is_handed_the_staged_memory() -> None:
    module, new = layer(weight=torch.zeros(4, 8)), torch.randn(4, 8)
    parameter = module.weight
    slot = Slot(module, {"weight": "w"})
    slot.prepare({"w": new}, finite=True)
    slot.commit()
    assert module.weight is parameter
    assert module.weight.data_ptr() == new.data_ptr()
    assert slot.proof() == {"w": "read back"}


@pytest.mark.parametrize("undoable", [False, True])
def test_what_shares_memory_with_a_weight_sees_the_new_one(undoable: bool) -> None:
    module, new = layer(weight=torch.zeros(4, 8)), torch.randn(4, 8)
    other = module.weight.detach()[1:]
    slot = Slot(module, {"weight": "w"}, undoable=undoable)
    slot.prepare({"w": new}, finite=True)
    slot.commit()
    assert torch.equal(other, new[1:])
    assert torch.equal(module.weight, new)
    assert slot.proof() == {"w": "read back"}


@pytest.mark.parametrize("wrong", [None, 0, 1])
def test_what_is_live_is_compared_with_what_arrived(wrong: int | None) -> None:
    module, new = layer(weight=torch.zeros(4, 8)), torch.randn(4, 8)
    slot = Slot(module, {"weight": "w"})
    slot.prepare({"w": new}, finite=True, expected={"w"})
    slot.expect({"w": [(0, 8, scan(new[0])), (8, 24, scan(new[1:]))], "v": [(0, 1, scan(new[:1, :1]))]})
    slot.commit()
    if wrong is None:
        assert slot.proof() == {"w": "read back"}
        return
    module.weight.data[wrong, 0] += 1
    with pytest.raises(VerificationError, match="w was read back"):
        slot.proof()


class Fused(torch.nn.Module):
    """Loads `q` and `k` one after the other into `qk`, `wide` cast, `left` turned around, `few` into more."""

    def __init__(self) -> None:
        super().__init__()
        for name, rows in {"qk": 5, "wide": 2, "turned": 2, "padded": 4}.items():
            setattr(self, name, torch.nn.Parameter(torch.empty(rows, 2, device="meta")))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        places = {
            "q": self.qk.data[:2],
            "k": self.qk.data[2:],
            "wide": self.wide.data,
            "left": self.turned.data.t(),
            "few": self.padded.data[:3],
        }
        self.padded.data[3:].fill_(0)
        self.wide.data[2:].fill_(0)
        for name, tensor in weights:
            places[name].copy_(tensor)


def test_parameters_that_are_whole_tensors_end_to_end() -> None:
    sent = {"k": torch.ones(3, 2), "q": torch.ones(2, 2), "wide": torch.ones(2, 2), "left": torch.ones(2, 2)}
    source = TensorSource(sent | {"few": torch.ones(3, 2)})
    plan = record(Fused(), Manifest(version=1, tensors=tuple(source.metadata())))
    assert plan.runs == {"qk": [Run(0, 4, 1), Run(4, 6, 0)], "wide": [Run(0, 4, 2)]}
    cast = TensorSource(sent | {"few": torch.ones(3, 2), "wide": torch.ones(2, 2).double()})
    plan = record(Fused(), Manifest(version=1, tensors=tuple(cast.metadata())))
    assert list(plan.runs) == ["qk"]


def test_a_part_of_a_parameter_is_not_the_whole_of_it() -> None:
    source = TensorSource({"k": torch.ones(3, 2)})
    plan = record(Fused(), Manifest(version=1, tensors=tuple(source.metadata()), partial=True))
    assert plan.runs == {}
