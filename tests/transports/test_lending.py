"""When a trainer may say again where its weights are, without asking the driver for each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from weightwire.errors import TransportError
from weightwire.transports import cuda_driver
from weightwire.transports.cuda_ipc import _Known, _parse

SIZE = 1 << 12


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """A driver whose allocations begin at multiples of `SIZE`: the number of each."""
    made: dict[int, int] = {}

    def range_of(address: int) -> tuple[int, int]:
        base = address // SIZE * SIZE
        made.setdefault(base, len(made))
        return base, SIZE

    def number_of(base: int) -> int:
        if base not in made:
            raise TransportError("cuPointerGetAttribute: invalid argument (1)")
        return made[base]

    monkeypatch.setattr(cuda_driver, "range_of", range_of)
    monkeypatch.setattr(cuda_driver, "number_of", number_of)
    monkeypatch.setattr(cuda_driver, "handle_of", lambda base: base.to_bytes(64, "little"))
    monkeypatch.setattr(cuda_driver, "uuid_of", lambda device: "GPU-0")
    return made


def test_the_address_is_good_as_long_as_the_allocations_are_the_same(numbers: dict[int, int]) -> None:
    tensors = [torch.zeros(3000), torch.zeros(0), torch.zeros(3000)]
    known = _Known(tensors)
    lent = _parse(known.address)
    bases = [int.from_bytes(handle, "little") for handle, _ in lent.allocations]
    starts = [bases[number] + offset for number, offset in lent.tensors]
    assert (starts[0], starts[2], lent.tensors[1]) == (tensors[0].data_ptr(), tensors[2].data_ptr(), (0, 0))
    assert known.holds(tensors)
    assert not known.holds(tensors[:2])
    assert not known.holds([tensors[0], tensors[1], torch.zeros(3000)])


@pytest.mark.parametrize("happened", ["another is there", "none is there"])
def test_memory_that_was_freed_and_came_again_is_looked_up_anew(numbers: dict[int, int], happened: str) -> None:
    tensors: list[Any] = [torch.zeros(3000), torch.zeros(3000)]
    known = _Known(tensors)
    base = tensors[1].data_ptr() // SIZE * SIZE
    if happened == "another is there":
        numbers[base] = 99
    else:
        del numbers[base]
    assert not known.holds(tensors)


def test_at_first_nothing_is_known() -> None:
    assert not _Known().holds([torch.zeros(1)])
