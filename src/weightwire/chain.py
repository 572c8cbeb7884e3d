"""The deltas that were published last, for engines that missed some of them."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Sequence

from weightwire.updates.delta import Delta, compose

__all__ = ["Chain"]

_SHARE = 0.1  # of the dense bytes; at 1 % changed, some fifteen steps


class Chain:
    """Encoded deltas, each from the version that the one before it leads to. They take at most a tenth of what the
    tensors take: what would be more is forgotten, oldest first."""

    def __init__(self) -> None:
        self._links: deque[tuple[int, Sequence[Delta]]] = deque()

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(deltas) for _, deltas in self._links)

    def add(self, base: int, deltas: Sequence[Delta]) -> None:
        """The step from version `base`, a delta for each tensor, to what the next one starts from."""
        self._links.append((base, deltas))
        room = _SHARE * sum(delta.numel * delta.dtype.itemsize for delta in deltas)
        while self.nbytes > room:
            self._links.popleft()

    def clear(self) -> None:
        self._links.clear()

    def since(self, version: int, last: Sequence[Delta]) -> tuple[int, list[Delta]] | None:
        """How many steps lead from `version` through those kept and `last`, and one delta for each tensor that does
        what they do. None where a step is missing."""
        bases = [base for base, _ in self._links]
        if version not in bases:
            return None
        steps = [*(deltas for _, deltas in self._links), last][bases.index(version) :]
        deltas = (
            functools.reduce(functools.partial(compose, f"tensor {n}"), each)
            for n, each in enumerate(zip(*steps, strict=True))
        )
        return len(steps), list(deltas)


def _nbytes(deltas: Sequence[Delta]) -> int:
    return sum(delta.nbytes for delta in deltas)
