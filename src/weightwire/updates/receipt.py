"""Receipts: what an engine says it did, and what a publish came to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

__all__ = ["EngineReceipt", "Proof", "Receipt", "weakest"]

Proof = Literal["read back", "asked", "staged"]
"""How a live parameter was shown to hold what was sent, strongest first.

`read back`: its bytes were read from the live model after the commit and have the digest of what was staged.
`asked`: it lives only in a kernel's own packing. Before the commit that packing was run on unit vectors, and the
columns of the weight that came out, 4 from a random one on, equal the staged ones; after it, the live module was seen
to hold that very packing. `staged`: only what was staged was verified (a packing with NaN or Inf cannot be asked).
"""


_STRENGTH: tuple[Proof, ...] = ("read back", "asked", "staged")


def weakest(proofs: Iterable[Mapping[str, Proof]]) -> dict[str, Proof]:
    """Each parameter's weakest proof, over the modules or ranks that hold it.

    >>> weakest([{"a": "read back", "b": "asked"}, {"a": "asked"}])
    {'a': 'asked', 'b': 'asked'}
    """
    merged: dict[str, Proof] = {}
    for part in proofs:
        for name, proof in part.items():
            merged[name] = max(merged.get(name, proof), proof, key=_STRENGTH.index)
    return merged


class EngineReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's account of one update. Seconds are by phase: begin, stage, seal, commit, verify; `pause` is how
    long generation stood still. `proven` maps each live parameter to its `Proof`, the weakest over all ranks;
    `digests` maps each tensor sent to the digest that was verified. `computed` names the parameters that are not copies
    of what was sent: the model's own loader made them of it before the commit, and their proof is of what it made.

    For a LoRA adapter, `adapter` is the label of the revision (`policy@7`), `proven` names the modules that it is bound
    to, and `held` is one digest for each rank of what those modules hold there. Its pause is zero."""

    engine: str
    version: int
    kind: str
    transport: str
    ranks: int
    tensors: int
    nbytes: int
    seconds: dict[str, float]
    pause: float
    proven: dict[str, Proof]
    digests: dict[str, str]
    adapter: str | None = None
    held: list[str] = []
    computed: list[str] = []

    @property
    def parameters(self) -> int:
        """How many live parameters were bound."""
        return len(self.proven)


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What `Publisher.publish()` came to: `engines` has each engine's own receipt.

    `seconds` are the trainer's, by phase; `total` is their sum; `pause` is the longest of any engine. `why` says why
    it went as a delta, or whole.
    """

    version: int
    kind: str
    tensors: int
    nbytes: int
    seconds: dict[str, float]
    engines: dict[str, EngineReceipt]
    why: str = ""

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def pause(self) -> float:
        return max(receipt.pause for receipt in self.engines.values())

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in self.seconds.items())
        where = ", ".join(f"{name} over {receipt.transport}" for name, receipt in self.engines.items())
        return (
            f"version {self.version} ({self.kind}): {self.tensors} tensors, {self.nbytes / 1e6:.1f} MB"
            f" to {where} in {self.total:.3f} s ({phases}), paused {self.pause * 1e3:.0f} ms"
            + (f"; {self.kind}: {self.why}" if self.why else "")
        )
