"""The order in which tensors are sent, and who reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from weightwire.reading import Reading
from weightwire.sources.tensors import TensorSource
from weightwire.updates.buckets import Piece
from weightwire.updates.digest import scan


class Own(TensorSource):
    """Reads in its own way."""

    def read(self, tensor: int, start: int, out: torch.Tensor) -> Any:
        return super().read(tensor, start, out)


def test_a_bucket_is_packed_by_one_call_but_not_past_a_source_that_reads_in_its_own_way() -> None:
    tensors = {"a": torch.arange(4.0), "b": torch.arange(6.0)}
    pieces = [Piece(0, 1, 3, 0, torch.float32), Piece(1, 0, 6, 64, torch.float32)]
    to = torch.zeros(128, dtype=torch.uint8)
    source = TensorSource(tensors)
    found = Reading(source, source.metadata(), parts=False).pack(pieces, to)
    assert found == [scan(tensors["a"][1:], start=1), scan(tensors["b"])]
    assert to[:12].view(torch.float32).tolist() == [1.0, 2.0, 3.0]
    assert to[64:88].view(torch.float32).tolist() == tensors["b"].tolist()
    own = Own(tensors)
    assert Reading(own, own.metadata(), parts=False).pack(pieces, to) is None


@pytest.mark.parametrize("way", ["pack", "read"])
def test_what_is_wider_is_cast_on_the_way(way: str) -> None:
    wide, narrow = torch.randn(7), torch.randn(5).to(torch.float16)
    source = TensorSource({"wide": wide, "narrow": narrow})
    reading = Reading(source, source.metadata(), parts=False, dtype="bfloat16")
    assert [spec.dtype for spec in reading.specs] == ["bfloat16", "float16"]
    to = torch.zeros(64, dtype=torch.uint8)
    if way == "pack":
        found = reading.pack([Piece(0, 2, 5, 0, torch.bfloat16), Piece(1, 0, 5, 16, torch.float16)], to)
    else:
        places = to[:10].view(torch.bfloat16), to[16:26].view(torch.float16)
        found = [reading.read(0, 2, places[0]), reading.read(1, 0, places[1])]
    cast = wide.to(torch.bfloat16)
    assert torch.equal(to[:10].view(torch.bfloat16), cast[2:])
    assert torch.equal(to[16:26].view(torch.float16), narrow)
    assert found == [scan(cast[2:], start=2), scan(narrow)]


def test_nothing_is_cast_to_what_is_wider() -> None:
    source = TensorSource({"w": torch.zeros(3, dtype=torch.bfloat16)})
    assert Reading(source, source.metadata(), parts=False, dtype="float32").specs == tuple(source.metadata())
