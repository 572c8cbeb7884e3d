"""The order in which tensors are sent, and who reads them."""

from __future__ import annotations

from typing import Any

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
    pieces = [Piece(0, 1, 3, 0), Piece(1, 0, 6, 64)]
    to = torch.zeros(128, dtype=torch.uint8)
    source = TensorSource(tensors)
    found = Reading(source, source.metadata(), parts=False).pack(pieces, to)
    assert found == [scan(tensors["a"][1:], start=1), scan(tensors["b"])]
    assert to[:12].view(torch.float32).tolist() == [1.0, 2.0, 3.0]
    assert to[64:88].view(torch.float32).tolist() == tensors["b"].tolist()
    own = Own(tensors)
    assert Reading(own, own.metadata(), parts=False).pack(pieces, to) is None
