"""Deltas of weights that are spread over ranks: each rank encodes its own part of a tensor, rank 0 joins them.

What travels between the ranks is encoded deltas, some hundredth of the weights; nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from weightwire.sources.ranks import Ranks
from weightwire.updates.boxes import Part
from weightwire.updates.delta import Delta, join, parse

__all__ = ["collect", "join_all"]

Parts = Sequence[Mapping[int, Part]]
"""For each tensor, by rank, the parts that make it up: `FsdpSource.parts`."""


def collect(ranks: Ranks, parts: Parts, mine: Sequence[Delta]) -> list[list[torch.Tensor]]:
    """The bytes of all parts' deltas, tensor by tensor, on rank 0; collective. `mine` are this rank's own deltas."""
    sizes = ranks.gather(torch.tensor([delta.nbytes for delta in mine]))
    collected: list[list[torch.Tensor]] = [[] for _ in parts]
    for number, of_ranks in enumerate(parts):
        for rank in of_ranks:
            if rank == ranks.rank != 0:
                ranks.send(mine[number].data, 0)
            elif ranks.rank == 0:
                collected[number].append(torch.empty(int(sizes[rank][number]), dtype=torch.uint8))
                if rank:
                    ranks.receive(collected[number][-1], rank)
                else:
                    collected[number][-1] = mine[number].data
    return collected


def join_all(
    names: Sequence[str], parts: Parts, mine: Sequence[Delta], collected: Sequence[Sequence[torch.Tensor]]
) -> list[Delta]:
    """A delta for each whole tensor; `mine` for those that have no elements. Raises what `parse` and `join` do."""
    return [
        join(name, [(part, parse(name, data)) for part, data in zip(of_ranks.values(), datas, strict=True)])
        if of_ranks
        else own
        for name, of_ranks, own, datas in zip(names, parts, mine, collected, strict=True)
    ]
