"""What an update consists of: deltas, and from which version for which engine; or everything, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import torch

from weightwire.baseline import Baseline, Look
from weightwire.reading import Reading
from weightwire.sources.ranks import Ranks
from weightwire.sources.shards import collect, join_all
from weightwire.sources.together import Together
from weightwire.updates.delta import Delta
from weightwire.updates.manifest import Manifest

__all__ = ["Behind", "Kept", "Route", "find_route"]

_DENSEST = 0.2  # where more changes, a CPU encodes more slowly (0.3 GB/s) than most links carry everything


@dataclass(slots=True)
class Kept:
    """What a publisher keeps between publishes for deltas to come."""

    baseline: Baseline
    apart: bool = False
    """A commit has failed, and engines may be at different versions since."""
    unsure: tuple[int, list[Delta]] | None = None
    """The version that it would have made, and the deltas that it was, if it was of deltas."""

    def settle(self, serves: dict[str, int | None]) -> None:
        """If an engine has what the commit that failed was to make, the next delta starts from that."""
        made, self.unsure = self.unsure, None
        if made is not None and made[0] in serves.values() and self.baseline.version is not None:
            self.baseline.advance(*made)

    def committing(self, version: int, own: list[Delta]) -> None:
        self.apart = True
        self.unsure = (version, own) if own else None

    def committed(self) -> None:
        self.apart, self.unsure = False, None


@dataclass(frozen=True, slots=True)
class Behind:
    """Engines that serve an older version, and the one delta that does what they have missed and this publish's too."""

    engines: Sequence[str]
    base: int
    steps: int
    deltas: list[Delta]

    def of(self, manifest: Manifest) -> Manifest:
        """What they get, where the others get `manifest`."""
        encoded = tuple(delta.nbytes for delta in self.deltas)
        return msgspec.structs.replace(manifest, base_version=self.base, encoded=encoded)

    def __str__(self) -> str:
        return f"{', '.join(self.engines)}: delta from {self.base} through {self.steps} deltas"


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """`deltas` go to all engines but those in `behind`, which get their own; None sends everything to all. `own` are
    those that this rank has encoded."""

    why: str = ""
    deltas: list[Delta] | None = None
    own: list[Delta] = field(default_factory=list)
    base: int | None = None
    behind: Sequence[Behind] = ()


def find_route(
    kept: Kept,
    reading: Reading,
    ranks: Ranks | None,
    *,
    always: bool,
    finite: bool,
    refusal: Callable[[], str | None],
    ask_versions: Callable[[], dict[str, int | None]],
) -> Route:
    """Encode deltas unless too much has changed (which `always` does not ask), something forbids them on any rank, as
    `refusal` says, or an engine has a version that none lead on from. All ranks call it together."""
    together, baseline = Together(ranks), kept.baseline
    serves: dict[str, int | None] = {}
    if kept.apart:
        serves = together.from_leader(ask_versions, dict[str, int | None])
        together.everywhere(lambda: kept.settle(serves))
    why = together.everywhere(lambda: refusal() or baseline.refusal(reading.specs, reading.mine))
    if ranks is not None:
        why = ranks.reason(why)
    if why is not None:
        return Route(why=why)
    look: Look | None = None if always else together.everywhere(lambda: baseline.look(reading.read_own))
    if look is not None and (share := _density(look, baseline.numel, ranks)) > _DENSEST:
        return Route(why=_too_dense(share))
    own = together.everywhere(lambda: baseline.encode(reading.read_own, look, finite=finite))
    step = own
    if ranks is not None:
        together.everywhere(baseline.wait)
        collected = collect(ranks, reading.parts, own)
        names = [spec.name for spec in reading.specs]
        step = together.on_leader(lambda: join_all(names, reading.parts, own, collected)) or []
    # Known now, where before it was a guess.
    share = together.from_leader(lambda: _share(step), float)
    if not always and share > _DENSEST:
        return Route(why=_too_dense(share), own=own)
    behind: list[Behind] = []
    for version in sorted({v for v in serves.values() if v not in (baseline.version, None)}):
        engines = [name for name, served in serves.items() if served == version]
        baseline.wait()
        found = None if ranks else baseline.chain.since(version, step)
        if found is None:
            return Route(
                why=f"{', '.join(engines)} serves {version}, from where no deltas that are kept lead on", own=own
            )
        behind.append(Behind(engines, version, *found))
    why = together.from_leader(lambda: _summary(reading, step, behind), str)
    if behind and baseline.version not in serves.values():
        first, *others = behind
        return Route(why=why, deltas=first.deltas, own=own, base=first.base, behind=others)
    return Route(why=why, deltas=step, own=own, base=baseline.version, behind=behind)


def _density(own: Look, numel: int, ranks: Ranks | None) -> float:
    """About which share of the elements has changed, of all ranks."""
    if ranks is None:
        return own.density
    tables = ranks.gather(torch.tensor([own.density * numel, numel], dtype=torch.float64))
    changed, total = torch.stack(tables).sum(0)
    return float(changed / total.clamp(1))


def _share(deltas: Sequence[Delta]) -> float:
    return sum(delta.count for delta in deltas) / max(sum(delta.numel for delta in deltas), 1)


def _too_dense(share: float) -> str:
    return f"about {share:.0%} of the elements changed, more than the {_DENSEST:.0%} up to which deltas pay"


def _summary(reading: Reading, step: Sequence[Delta], behind: Sequence[Behind]) -> str:
    share = _share(step)
    dense = sum(spec.nbytes for spec in reading.specs) / 1e6
    return f"{share:.2%} of the elements changed, instead of {dense:.1f} MB" + "".join(f"; {way}" for way in behind)
