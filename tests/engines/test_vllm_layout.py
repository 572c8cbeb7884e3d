"""How a module of a vLLM model keeps its weight, found out without vLLM."""

from __future__ import annotations

import pytest
import torch

from weightwire.engines.vllm.layout import _packs


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
