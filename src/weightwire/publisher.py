"""The publisher: one source of weights, any number of engines, one version for all.

Nobody commits before everybody has sealed, so up to that point a failure anywhere leaves every engine as it was.
"""

from __future__ import annotations

import contextlib
import operator
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

from weightwire import interpreter, sources, transports
from weightwire.baseline import Baseline
from weightwire.baseline_device import DeviceBaseline
from weightwire.engines.base import KeepCache, Pause
from weightwire.engines.find import find
from weightwire.errors import (
    PoisonedError,
    UnsupportedError,
    UsageError,
    VersionError,
)
from weightwire.reading import Weights
from weightwire.route import Kept
from weightwire.run import Means, Run
from weightwire.transports import Choice
from weightwire.updates.receipt import Receipt

__all__ = ["Explanation", "Publisher"]

_SLACK_SECONDS = 60.0


class Publisher:
    """Puts the weights of `source` into `engines`.

    `source`: a module (FSDP2 included; of DDP's replicas, rank 0 alone publishes), a mapping of names to tensors, the
    path of a safetensors checkpoint, or any `sources.Source`. `engines`: what `connect` returns or takes. With a source
    that is spread over the ranks of `torch.distributed`, every rank makes a publisher and all call `publish` together;
    only rank 0 speaks to engines.

    A source that is a LoRA adapter (a PEFT model, an adapter's folder) is served as the model `adapter`, "policy" if
    that is not given, beside the base model.

    `transport` asks for one by name; else each engine gets the first that works (`explain()` says why). `bucket_bytes`
    bounds the trainer's extra memory: at most two buckets; by itself it is 64 MiB, and over NCCL three of 256 MiB. An
    engine that hears nothing for `lease` seconds forgets the update. A publish takes at most `deadline` seconds.

    `baseline="host"` keeps a copy of what was published last in this process's memory, so that updates can be deltas;
    `"device"` keeps it on the parameters' GPU, where the deltas are made; not of an adapter.
    """

    def __init__(
        self,
        source: Any,
        engines: Any = None,
        *,
        adapter: str | None = None,
        transport: str | None = None,
        bucket_bytes: int | None = None,
        baseline: Literal["host", "device"] | None = None,
        lease: float = 60.0,
        deadline: float = 600.0,
    ) -> None:
        if transport is not None and transport not in transports.NAMES:
            raise UsageError(f"no transport {transport!r}", next_step=f"Known are {', '.join(transports.NAMES)}.")
        if bucket_bytes is not None and not 4096 <= bucket_bytes <= 1 << 30:
            raise UsageError(f"bucket_bytes={bucket_bytes}", next_step="Take 4096 to 1073741824 bytes.")
        if not 0 < lease <= 3600 or deadline <= 0:
            raise UsageError(
                f"lease={lease}, deadline={deadline}", next_step="Seconds: both must be positive, a lease at most 3600."
            )
        if baseline not in (None, "host", "device"):
            raise UsageError(f"baseline={baseline!r}", next_step="Take 'host' or 'device', or None to send no deltas.")
        # The ranks wait for each other a little longer than rank 0 waits for engines, whose error then reaches all.
        found = sources.find(source, timeout=deadline + _SLACK_SECONDS)
        leads = found.ranks is None or found.ranks.rank == 0
        connected = find(engines) if leads and engines is not None else ()
        if leads and not connected:
            raise UsageError("no engines", next_step="Pass what weightwire.connect(...) returned.")
        is_adapter = getattr(found, "lora", None) is not None
        self.adapter = (adapter or "policy") if is_adapter else None
        """The model as which a LoRA adapter is served; None for a source that is a whole model."""
        if adapter is not None and not is_adapter:
            raise UsageError(
                f"adapter={adapter!r}, but {type(found).__name__} is no LoRA adapter",
                next_step="Pass a PEFT model or an adapter's folder, or leave `adapter` out.",
            )
        if baseline == "device" and is_adapter:
            raise UsageError(
                "baseline='device', and this is a LoRA adapter", next_step="Take baseline='host': an adapter is small."
            )
        if baseline is not None and found.ranks is not None and not hasattr(found, "read_part"):
            raise UnsupportedError(
                f"{type(found).__name__} is spread over ranks and does not say which part is whose",
                next_step="Leave `baseline` out, or give it `parts` and `read_part`.",
            )
        self._deadline = deadline
        self._means = Means(
            source=found,
            engines=connected,
            adapter=self.adapter,
            transports=transports.make(Weights(found)),
            wanted=transport,
            bucket_bytes=bucket_bytes,
            lease=lease,
            kept=None if baseline is None else Kept(DeviceBaseline(found) if baseline == "device" else Baseline()),
        )

    def publish(
        self,
        version: int,
        *,
        kind: Literal["auto", "dense", "delta"] = "auto",
        partial: bool = False,
        finite: bool = True,
        staging: Literal["copy", "none"] = "copy",
        pause: Pause = "keep",
        keep_cache: KeepCache = False,
        deadline: float | None = None,
    ) -> Receipt:
        """Make the source's weights, as they are now, version `version` of every engine, or of the adapter there.

        With a baseline, `kind="auto"` sends the delta from the version before unless more than a fifth of the elements
        changed or an engine has another version, from which none of the deltas kept leads on; else everything, and
        `Receipt.why` says which and why. `"delta"` raises `UsageError` or the engine's refusal instead, `"dense"`
        always sends everything, of an adapter too.

        `partial` allows parameters to be left out; `finite` refuses NaN and Inf. `staging="none"`, for engines on a GPU
        without room for a second copy, writes over the live weights while the engine stands still; if that fails it
        refuses to generate until the next complete update. `pause` says what happens to requests in flight
        (`engines.base.Pause`), `keep_cache` what to keys and values in the cache (`engines.base.KeepCache`).

        Raises a `WeightwireError` with the engine and the phase; unless that is `commit`, every engine still serves
        what it served before. After it, `PublishError.outcomes` and each engine's `status()` say which has changed; an
        adapter is taken back.
        """
        if pause not in ("keep", "wait", "abort"):
            raise UsageError(f"pause={pause!r}", next_step="Take 'keep', 'wait' or 'abort'.")
        if keep_cache not in (True, False, "running"):
            raise UsageError(f"keep_cache={keep_cache!r}", next_step="Take True, False or 'running'.")
        if staging not in ("copy", "none") or (staging == "none" and pause != "keep"):
            raise UsageError(
                f"staging={staging!r} with pause={pause!r}",
                next_step="Take staging='copy', or 'none' with pause='keep': then the engine stands still from the "
                "beginning, and requests in flight go on under the new weights.",
            )
        if kind not in ("auto", "dense", "delta"):
            raise UsageError(f"kind={kind!r}", next_step="Take 'auto', 'dense' or 'delta'.")
        version = _as_version(version)
        if deadline is not None and deadline <= 0:
            raise UsageError(f"deadline={deadline}: it is seconds and must be positive")
        if self._means.source.ranks is not None and deadline is not None and deadline > self._deadline:
            raise UsageError(
                f"deadline={deadline}, but the ranks were told to wait for {self._deadline} s",
                next_step="Give Publisher(..., deadline=...) the longest deadline of all.",
            )
        for engine in self._means.engines:
            engine.check_caller()
        end = time.monotonic() + (self._deadline if deadline is None else deadline)
        how = (partial, finite, staging, pause, keep_cache)
        with interpreter.collecting_later(), interpreter.taking_turns():
            try:
                with contextlib.closing(Run(self._means, end, kind)) as run:
                    return run.publish(version, *how)
            except (VersionError, UnsupportedError, PoisonedError) as error:
                if kind != "auto" or not run.of_deltas or run.committing:
                    raise
                refused = f"the delta was refused: {error}"
            with contextlib.closing(Run(self._means, end, "dense", refused)) as run:
                return run.publish(version, *how)

    def start_from(self, base: Any, version: int) -> None:
        """Take what `base` holds, a source or what `Publisher` takes as one, for what was published last, as `version`:
        the next publish can be a delta from it. For trainers that were restarted, and for checkpoints. Whether engines
        hold the same is found out by them; they refuse a delta from anything else. An adapter is cast as engines would,
        which they are asked. Needs `baseline="host"`. All ranks of a source that is spread over several call it
        together; each reads of `base` what it holds itself."""
        if (kept := self._means.kept) is None:
            raise UsageError("no baseline is kept", next_step="Make the Publisher with baseline='host'.")
        source = sources.find(base, timeout=self._deadline)
        if source.ranks is not None:
            raise UsageError("a base that is spread over ranks", next_step="Pass whole tensors or a checkpoint.")
        with contextlib.closing(Run(self._means, time.monotonic() + self._deadline, "auto")) as run:
            run.start_from(source, _as_version(version))
        kept.unsure = None

    def explain(self, *, timeout: float = 30.0) -> Explanation:
        """What a publish would send, and by which transport to each engine; for each other transport, why not.
        Like `publish`, all ranks of a source that is spread over several call it together."""
        for engine in self._means.engines:
            engine.check_caller()
        specs = self._means.source.metadata()
        return Explanation(
            source=type(self._means.source).__name__,
            tensors=len(specs),
            nbytes=sum(spec.nbytes for spec in specs),
            aliases=dict(self._means.source.aliases),
            engines={engine.name: self._means.choose(engine, timeout) for engine in self._means.engines},
        )

    def close(self) -> None:
        """Withdraw what was offered to engines, and leave the ranks' group. The engines themselves stay connected."""
        for transport in self._means.transports.values():
            transport.close()
        self._means.choices.clear()
        if self._means.source.ranks is not None:
            self._means.source.ranks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _as_version(version: Any) -> int:
    if hasattr(version, "__index__") and not isinstance(version, bool) and operator.index(version) >= 0:
        return operator.index(version)
    raise UsageError(f"version={version!r}", next_step="A version is a non-negative integer that only grows.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What `Publisher.explain` found. `str()` of it is for people, `msgspec.to_builtins` of it for machines."""

    source: str
    tensors: int
    nbytes: int
    aliases: Mapping[str, str]
    engines: Mapping[str, Choice]

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.tensors} tensors, {self.nbytes / 1e6:.1f} MB, {len(self.aliases)} aliases"]
        for name, choice in self.engines.items():
            lines.append(f"{name}: over {choice.name}")
            lines += [f"  {t}: {reason or 'can be used'}" for t, reason in choice.reasons.items()]
        return "\n".join(lines)
