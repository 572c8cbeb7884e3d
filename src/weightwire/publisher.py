"""The publisher: one source of weights, any number of engines, one version for all.

Nobody commits before everybody has sealed, so up to that point a failure anywhere leaves every engine as it was.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import operator
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, cast

import msgspec
import torch

from weightwire import sources, transports
from weightwire.baseline import Baseline, Read
from weightwire.baseline_device import DeviceBaseline
from weightwire.engines.base import Begun, Engine, Pause
from weightwire.engines.find import find
from weightwire.errors import (
    DeadlineError,
    EngineError,
    PoisonedError,
    PublishError,
    SourceError,
    UnsupportedError,
    UsageError,
    VersionError,
    WeightwireError,
)
from weightwire.sources.base import Source, SpreadSource
from weightwire.sources.shards import collect, join_all
from weightwire.transports import Choice, Lender, Link, Sender, Transport
from weightwire.updates.adapter import check_name
from weightwire.updates.boxes import NOTHING, Part
from weightwire.updates.buckets import Bucket, cut
from weightwire.updates.delta import Delta
from weightwire.updates.digest import NO_DIGEST, Pending, Scan, scan_any, scan_tensors_any, settle
from weightwire.updates.manifest import Adapter, Manifest, Staging, TensorSpec
from weightwire.updates.receipt import EngineReceipt, Receipt

__all__ = ["Explanation", "Publisher"]

logger = logging.getLogger("vllm.weightwire.publisher")

T = TypeVar("T")
_PHASES = ("begin", "stage", "seal", "commit")
_ABORT_SECONDS = 5.0
_SLACK_SECONDS = 60.0
_DENSEST = 0.2  # where more changes, a CPU encodes more slowly (0.3 GB/s) than most links carry everything


class Publisher:
    """Puts the weights of `source` into `engines`.

    `source`: a module (FSDP2 included; of DDP's replicas, rank 0 alone publishes), a mapping of names to tensors, the
    path of a safetensors checkpoint, or any `sources.Source`. `engines`: what `connect` returns or takes. With a source
    that is spread over the ranks of `torch.distributed`, every rank makes a publisher and all call `publish` together;
    only rank 0 speaks to engines.

    A source that is a LoRA adapter (a PEFT model, an adapter's folder) is served as the model `adapter`, "policy" if
    that is not given, beside the base model.

    `transport` asks for one by name; else each engine gets the first that works (`explain()` says why). `bucket_bytes`
    bounds the trainer's extra memory: at most two buckets; by itself it is 64 MiB, and 256 MiB over NCCL. An engine
    that hears nothing for `lease` seconds forgets the update. A publish takes at most `deadline` seconds.

    `baseline="host"` keeps a copy of what was published last in this process's memory, so that updates can be deltas;
    `"device"` keeps it on the parameters' GPU, where the deltas are made.
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
        self._source = sources.find(source, timeout=deadline + _SLACK_SECONDS)
        self._leads = self._source.ranks is None or self._source.ranks.rank == 0
        self._engines = find(engines) if self._leads and engines is not None else ()
        if self._leads and not self._engines:
            raise UsageError("no engines", next_step="Pass what weightwire.connect(...) returned.")
        is_adapter = getattr(self._source, "lora", None) is not None
        self.adapter = (adapter or "policy") if is_adapter else None
        """The model as which a LoRA adapter is served; None for a source that is a whole model."""
        if adapter is not None and not is_adapter:
            raise UsageError(
                f"adapter={adapter!r}, but {type(self._source).__name__} is no LoRA adapter",
                next_step="Pass a PEFT model or an adapter's folder, or leave `adapter` out.",
            )
        self._wanted = transport
        self._bucket_bytes = bucket_bytes
        self._lease = lease
        self._deadline = deadline
        self._weights = _Weights(self._source)
        self._transports = transports.make(self._weights)
        self._choices: dict[str, Choice] = {}
        if baseline is not None and self._source.ranks is not None and not hasattr(self._source, "read_part"):
            raise UnsupportedError(
                f"{type(self._source).__name__} is spread over ranks and does not say which part is whose",
                next_step="Leave `baseline` out, or give it `parts` and `read_part`.",
            )
        self._baseline: Baseline | None = None
        if baseline is not None and not is_adapter:
            self._baseline = DeviceBaseline(self._source) if baseline == "device" else Baseline()
        self._apart = False  # a commit has failed, and engines may be at different versions since
        self._unsure: tuple[int, list[Delta]] | None = None  # what it would have made, where it was a delta

    def publish(
        self,
        version: int,
        *,
        kind: Literal["auto", "dense", "delta"] = "auto",
        partial: bool = False,
        finite: bool = True,
        staging: Literal["copy", "none"] = "copy",
        pause: Pause = "keep",
        keep_cache: bool = False,
        deadline: float | None = None,
    ) -> Receipt:
        """Make the source's weights, as they are now, version `version` of every engine, or of the adapter there.

        With a baseline, `kind="auto"` sends the delta from the version before unless more than a fifth of the elements
        changed or an engine has another version, from which none of the deltas kept leads on; else everything, and
        `Receipt.why` says which and why. `"delta"` raises `UsageError` or the engine's refusal instead, `"dense"`
        always sends everything.

        `partial` allows parameters to be left out; `finite` refuses NaN and Inf. `staging="none"`, for engines on a GPU
        without room for a second copy, writes over the live weights while the engine stands still; if that fails it
        refuses to generate until the next complete update. `pause` says what happens to requests
        in flight (`engines.base.Pause`). The prefix cache is reset, unless `keep_cache`. Raises a `WeightwireError`
        with the engine and the phase; unless that is `commit`, every engine still serves what it served before. After
        it, `PublishError.outcomes` and each engine's `status()` say which has changed; an adapter is taken back.
        """
        if pause not in ("keep", "wait", "abort"):
            raise UsageError(f"pause={pause!r}", next_step="Take 'keep', 'wait' or 'abort'.")
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
        if self._source.ranks is not None and deadline is not None and deadline > self._deadline:
            raise UsageError(
                f"deadline={deadline}, but the ranks were told to wait for {self._deadline} s",
                next_step="Give Publisher(..., deadline=...) the longest deadline of all.",
            )
        for engine in self._engines:
            engine.check_caller()
        end = time.monotonic() + (self._deadline if deadline is None else deadline)
        how = (partial, finite, staging, pause, keep_cache)
        try:
            with contextlib.closing(_Run(self, end, kind)) as run:
                return run.publish(version, *how)
        except (VersionError, UnsupportedError, PoisonedError) as error:
            if kind != "auto" or run.deltas is None or run.committing:
                raise
            refused = f"the delta was refused: {error}"
        with contextlib.closing(_Run(self, end, "dense", refused)) as run:
            return run.publish(version, *how)

    def start_from(self, base: Any, version: int) -> None:
        """Take what `base` holds, a source or what `Publisher` takes as one, for what was published last, as `version`:
        the next publish can be a delta from it. For trainers that were restarted, and for checkpoints. Whether engines
        hold the same is found out by them; they refuse a delta from anything else. Needs `baseline="host"`. All ranks
        of a source that is spread over several call it together; each reads of `base` what it holds itself."""
        if self._baseline is None:
            raise UsageError("no baseline is kept", next_step="Make the Publisher with baseline='host'.")
        source = sources.find(base, timeout=self._deadline)
        if source.ranks is not None:
            raise UsageError("a base that is spread over ranks", next_step="Pass whole tensors or a checkpoint.")
        with contextlib.closing(_Run(self, time.monotonic() + self._deadline, "auto")) as run:
            run.start_from(self._baseline, source, _as_version(version))
        self._unsure = None

    def explain(self, *, timeout: float = 30.0) -> Explanation:
        """What a publish would send, and by which transport to each engine; for each other transport, why not.
        Like `publish`, all ranks of a source that is spread over several call it together."""
        for engine in self._engines:
            engine.check_caller()
        specs = self._source.metadata()
        return Explanation(
            source=type(self._source).__name__,
            tensors=len(specs),
            nbytes=sum(spec.nbytes for spec in specs),
            aliases=dict(self._source.aliases),
            engines={engine.name: self._choose(engine, timeout) for engine in self._engines},
        )

    def close(self) -> None:
        """Withdraw what was offered to engines, and leave the ranks' group. The engines themselves stay connected."""
        for transport in self._transports.values():
            transport.close()
        self._choices.clear()
        if self._source.ranks is not None:
            self._source.ranks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _choose(self, engine: Engine, timeout: float) -> Choice:
        if engine.name not in self._choices:
            try:
                self._choices[engine.name] = transports.resolve(
                    self._transports,
                    lambda offers: engine.status(offers, timeout=timeout).offers,
                    host=engine.host,
                    wanted=self._wanted,
                    over_http=engine.over_http,
                )
            except WeightwireError as error:
                raise error.at(engine=engine.name, phase="resolve") from None
        return self._choices[engine.name]


def _order(specs: Sequence[TensorSpec]) -> list[int]:
    # Large ones first: what an engine does with a tensor once it has all of it takes longest for them, and what it does
    # for the last one is waited for.
    return sorted(range(len(specs)), key=lambda n: specs[n].nbytes <= transports.BUCKET_BYTES)


def _check_base(specs: Sequence[TensorSpec], base: Sequence[TensorSpec]) -> None:
    known = set(base)
    odd = next((spec for spec in specs if spec not in known), None)
    if odd is not None:
        raise UsageError(f"the base has no {odd.dtype} tensor {odd.name!r} of shape {odd.shape}")


class _Weights:
    """A source as transports see it."""

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def device(self) -> torch.device:
        return getattr(self._source, "device", torch.device("cpu"))

    def whole(self) -> Sequence[torch.Tensor] | None:
        whole = getattr(self._source, "whole", None)
        return None if whole is None else whole()


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


@dataclass(frozen=True, slots=True)
class _Behind:
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


class _Run:
    """One publish. On rank 0 it drives the engines; on the others it only reads weights along."""

    def __init__(self, publisher: Publisher, deadline: float, kind: str, why: str = "") -> None:
        self._publisher = publisher
        self._baseline = publisher._baseline
        self._kind = kind
        self._why = why
        self.deltas: list[Delta] | None = None
        self._own: list[Delta] = []
        self._step: list[Delta] = []
        self._base: int | None = None
        self._caught_up: list[_Behind] = []
        self._behind: list[_Behind] = []
        self._serves: dict[str, int | None] = {}
        self._source: Source = publisher._source
        self._ranks = self._source.ranks
        self._spread = cast(SpreadSource, self._source)  # where there are ranks, and a baseline is kept
        self._engines = list(publisher._engines)
        self._deadline = deadline
        self._pool = ThreadPoolExecutor(max_workers=max(1, 2 * len(self._engines)), thread_name_prefix="weightwire")
        self._begun: dict[str, Begun] = {}
        self._senders: list[Sender] = []
        self._lent = contextlib.ExitStack()
        self._stages: list[Future[None]] = []
        self._order: list[int] = []
        self._parts: list[Mapping[int, Part]] = []
        self._mine: tuple[Part, ...] = ()
        self.committing = False
        self._done = False

    def publish(
        self, version: int, partial: bool, finite: bool, staging: Staging, pause: Pause, keep_cache: bool
    ) -> Receipt:
        marks = [time.perf_counter()]
        baseline = self._baseline
        specs = tuple(self._everywhere(self._source.metadata))
        if not specs:
            raise SourceError("there are no tensors to publish", phase="begin", next_step="Is this the right source?")
        self._sort(specs)
        config = getattr(self._source, "lora", None)
        if config is not None and (partial or keep_cache):
            raise UsageError("`partial` and `keep_cache` are for whole models, and this is a LoRA adapter")
        ordered = tuple(specs[n] for n in self._order)
        self._decide(ordered, partial=partial, finite=finite, whole=config is None and staging == "copy")
        encoded = time.perf_counter()
        draft = Manifest(
            version=version,
            kind="adapter" if config is not None else "dense" if self.deltas is None else "delta",
            base_version=self._base,
            encoded=tuple(delta.nbytes for delta in self.deltas or ()),
            adapter=None
            if config is None
            else Adapter(name=check_name(str(self._publisher.adapter)), config=dict(config)),
            tensors=ordered,
            aliases=dict(self._source.aliases),
            partial=partial,
            finite=finite,
            staging=staging,
            keep=self._baseline is not None and self.deltas is None and not partial and staging == "copy",
        )
        manifest = self._from_leader(lambda: self._begin(draft.check()), Manifest)
        if baseline is not None and self.deltas is None:
            baseline.start(ordered, self._mine)
        marks.append(time.perf_counter())
        scans = kept = self._stage(manifest)
        if baseline is not None and self.deltas is None and self._ranks is not None:
            kept = self._everywhere(lambda: baseline.take(self._read_own))
        behind = self._stage_behind(manifest)
        marks.append(time.perf_counter())
        self._on_leader(lambda: self._seal(scans, behind))
        marks.append(time.perf_counter())
        # From here on engines may differ, and aborting could not make them alike again.
        self.committing = self._publisher._apart = True
        self._publisher._unsure = (version, self._own) if self._own else None
        receipts = self._from_leader(lambda: self._commit(manifest, pause, keep_cache), dict[str, EngineReceipt])
        marks.append(time.perf_counter())
        seconds = {phase: b - a for phase, (a, b) in zip(_PHASES, itertools.pairwise(marks), strict=True)}
        if self.deltas is not None:
            seconds = {"encode": encoded - marks[0], **seconds, "begin": marks[1] - encoded}
        self._done = True
        if baseline is not None:
            if self.deltas is None:
                baseline.finish(version, kept)
            else:
                self._everywhere(lambda: baseline.advance(version, self._own))
        self._publisher._apart, self._publisher._unsure = False, None
        return Receipt(
            version=version,
            kind=manifest.kind,
            tensors=len(specs),
            nbytes=max(receipt.nbytes for receipt in receipts.values()),
            seconds=seconds,
            engines=receipts,
            why=self._why,
        )

    def _decide(self, specs: tuple[TensorSpec, ...], *, partial: bool, finite: bool, whole: bool) -> None:
        """Encode deltas, or note why not."""
        if self._kind == "dense" or (self._baseline is None and self._kind == "auto"):
            return
        if self._baseline is not None:
            self._settle(self._baseline)
        why = self._everywhere(lambda: self._no_delta(specs, whole=whole and not partial))
        if self._ranks is not None:
            why = self._ranks.reason(why)
        if why is None and self._baseline is not None:
            if self._kind == "auto" and (share := self._density(self._baseline)) > _DENSEST:
                why = f"about {share:.0%} of the elements changed, more than the {_DENSEST:.0%} up to which deltas pay"
            else:
                self._step = self._encode(self._baseline, specs, finite=finite)
                why = self._route(self._baseline)
        if self.deltas is not None:
            why = self._from_leader(lambda: self._summary(specs), str)
        elif self._kind == "delta":
            raise UsageError(f"no delta can be sent: {why}", next_step="Publish with kind='auto' or 'dense'.")
        self._why = why or ""

    def _settle(self, baseline: Baseline) -> None:
        """After a commit that failed: if an engine has what it was to make, the next delta starts from that."""
        if self._publisher._apart:
            self._serves = self._from_leader(self._ask_versions, dict[str, int | None])
            made, self._publisher._unsure = self._publisher._unsure, None
            if made is not None and made[0] in self._serves.values() and baseline.version is not None:
                self._everywhere(lambda: baseline.advance(*made))

    def _ask_versions(self) -> dict[str, int | None]:
        return self._each("resolve", lambda engine: engine.status(timeout=self._left()).version)

    def _route(self, baseline: Baseline) -> str | None:
        """Find what leads every engine on, also one that is behind; or say why that cannot be."""
        ways: list[_Behind] = []
        for version in sorted({v for v in self._serves.values() if v not in (baseline.version, None)}):
            engines = [name for name, serves in self._serves.items() if serves == version]
            found = None if self._ranks else baseline.chain.since(version, self._step)
            if found is None:
                return f"{', '.join(engines)} serves {version}, from where no deltas that are kept lead on"
            ways.append(_Behind(engines, version, *found))
        self.deltas, self._base, self._caught_up, self._behind = self._step, baseline.version, ways, ways
        if ways and baseline.version not in self._serves.values():
            first, *self._behind = ways
            self.deltas, self._base = first.deltas, first.base
        return None

    def _summary(self, specs: Sequence[TensorSpec]) -> str:
        share = sum(delta.count for delta in self._step) / max(sum(delta.numel for delta in self._step), 1)
        ways = "".join(f"; {way}" for way in self._caught_up)
        return f"{share:.2%} of the elements changed, instead of {sum(s.nbytes for s in specs) / 1e6:.1f} MB{ways}"

    def _no_delta(self, specs: tuple[TensorSpec, ...], *, whole: bool) -> str | None:
        """What this rank knows that forbids a delta."""
        if self._baseline is None:
            return "no baseline is kept; make the Publisher with baseline='host'"
        if not whole:
            return "a delta is of a whole model, and is staged"
        if any(isinstance(way, Lender) for way in self._ways().values()):
            return "the engine reads the weights in the trainer's own memory"
        return self._baseline.refusal(specs, self._mine)

    def _density(self, baseline: Baseline) -> float:
        """About which share of the elements has changed, of all ranks."""
        share: float = self._everywhere(lambda: baseline.density(self._read_own))
        if self._ranks is None:
            return share
        tables = self._ranks.gather(torch.tensor([share * baseline.numel, baseline.numel], dtype=torch.float64))
        changed, numel = torch.stack(tables).sum(0)
        return float(changed / numel.clamp(1))

    def _encode(self, baseline: Baseline, specs: Sequence[TensorSpec], *, finite: bool) -> list[Delta]:
        """Every tensor's delta, on rank 0: of what each rank holds, each has encoded it."""
        own = self._own = self._everywhere(lambda: baseline.encode(self._read_own, finite=finite))
        if self._ranks is None:
            return own
        collected = collect(self._ranks, self._parts, own)
        names = [spec.name for spec in specs]
        return self._on_leader(lambda: join_all(names, self._parts, own, collected)) or []

    def start_from(self, baseline: Baseline, base: Source, version: int) -> None:
        """What `Publisher.start_from` does."""
        specs = tuple(self._everywhere(base.metadata))
        there = {spec.name: number for number, spec in enumerate(specs)}
        if self._ranks is not None:
            known, specs = specs, tuple(self._everywhere(self._source.metadata))
            self._everywhere(lambda: _check_base(specs, known))
        self._sort(specs)
        ordered = [specs[n] for n in self._order]

        def read(tensor: int, start: int, out: torch.Tensor) -> Scan:
            spec = ordered[tensor]
            runs = (self._mine[tensor] if self._mine else Part.whole(spec.shape)).runs()
            scans = settle([base.read(there[spec.name], at, out[own : own + n]) for own, at, n in runs])
            return sum(scans, Scan(NO_DIGEST, 0))

        baseline.start(tuple(ordered), self._mine)
        baseline.finish(version, self._everywhere(lambda: baseline.take(read)))
        base.release()
        self._done = True

    def _sort(self, specs: Sequence[TensorSpec]) -> None:
        """Settle in which order tensors are sent, and which part of each is this rank's, if they are spread."""
        self._order = _order(specs)
        if self._ranks is not None and self._baseline is not None:
            self._parts = [self._spread.parts(n) for n in self._order]
            self._mine = tuple(parts.get(self._ranks.rank, NOTHING) for parts in self._parts)

    def close(self) -> None:
        """Free everything, and abort what was not committed."""
        self._close_senders()
        self._lent.close()
        if not self._done:
            # What was found out about the transports may no longer be so.
            self._publisher._choices.clear()
        if not self._done and not self.committing:
            begun = [engine for engine in self._engines if engine.name in self._begun]
            wait([self._pool.submit(engine.abort, self._id(engine), timeout=_ABORT_SECONDS) for engine in begun])
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._source.release()

    def _choices(self) -> dict[str, Choice]:
        return self._each("resolve", lambda engine: self._publisher._choose(engine, self._left()))

    def _ways(self) -> dict[str, Transport | Lender]:
        return {choice.name: self._publisher._transports[choice.name] for choice in self._choices().values()}

    # -- the steps, on rank 0 --------------------------------------------------------------------------------------

    def _begin(self, draft: Manifest) -> Manifest:
        choices = self._choices()
        used = self._ways()
        senders = {name: way for name, way in used.items() if not isinstance(way, Lender)}
        limits = [limit for way in senders.values() if (limit := way.bucket_limit(draft.nbytes)) is not None]
        wanted = self._publisher._bucket_bytes or min((w.bucket_bytes for w in senders.values()), default=1 << 30)
        manifest = msgspec.structs.replace(draft, bucket_bytes=max(4096, min([wanted, *limits])))
        holder = f"{socket.gethostname()}:{os.getpid()}"

        def begin(engine: Engine) -> Begun:
            lends = choices[engine.name].name not in senders and not manifest.adapter
            own = msgspec.structs.replace(manifest, staging="lent") if lends else manifest
            own = next((each.of(manifest) for each in self._behind if engine.name in each.engines), own)
            begun = engine.begin(own, holder=holder, lease=self._publisher._lease, timeout=self._left())
            self._begun[engine.name] = begun
            return begun

        self._each("begin", begin)
        behind = {engine for each in self._behind for engine in each.engines}
        self._offer(manifest, [engine for engine in self._engines if engine.name not in behind])
        return manifest

    def _offer(self, manifest: Manifest, engines: Sequence[Engine]) -> None:
        choices = self._choices()
        buckets = cut(manifest)
        for name, way in self._ways().items():
            taking = [e for e in engines if choices[e.name].name == name]
            if isinstance(way, Lender):
                self._lend(way, taking)
            elif taking:
                self._open(way, taking, buckets)

    def _lend(self, lender: Lender, engines: Sequence[Engine]) -> None:
        address = self._lent.enter_context(lender.lend(self._whole()))
        self._stages += [self._pool.submit(self._fetch, engine, address) for engine in engines]

    def _open(self, transport: Transport, engines: Sequence[Engine], buckets: Sequence[Bucket]) -> None:
        links = [self._link(engine) for engine in engines]
        sender = transport.sender(links, buckets, self._wait, self._publisher._lease)
        self._senders.append(sender)
        for engine, address in zip(engines, sender.addresses, strict=True):
            if address is not None:
                self._stages.append(self._pool.submit(self._fetch, engine, address))

    def _link(self, engine: Engine) -> Link:
        begun = self._begun[engine.name]

        def put(index: int, body: memoryview) -> None:
            try:
                engine.put(begun.id, index, body, timeout=self._left())
            except WeightwireError as error:
                raise error.at(engine=engine.name, phase="stage") from None

        return Link(engine=engine.name, update=begun.id, ranks=begun.ranks, put=put)

    def _fetch(self, engine: Engine, address: str) -> None:
        try:
            engine.stage(self._begun[engine.name].id, address, timeout=self._left())
        except WeightwireError as error:
            raise error.at(engine=engine.name, phase="stage") from None

    def _stage(self, manifest: Manifest) -> list[Scan]:
        """Read every bucket, on all ranks together, and send it from rank 0."""
        scans: list[Scan | Pending] = [Scan(NO_DIGEST, 0)] * len(manifest.tensors)
        if self._ranks is None and not self._senders:
            # Nothing travels: the weights are scanned where they are, while engines do the same.
            whole = self._whole()
            scans = scan_tensors_any(whole)
            if self._baseline is not None:
                for number, tensor in enumerate(whole):
                    self._baseline.write(number, 0, tensor)
            self._on_leader(self._finish)
            return settle(scans)
        ahead: list[torch.Tensor] = []
        plain = self._ranks is None and self.deltas is None and not (self._baseline and self._baseline.reads_along)
        if plain and self._publisher._weights.device.type == "cuda":
            # On a GPU, one launch for all is much cheaper than one for each piece.
            ahead = self._whole()
            scans = scan_tensors_any(ahead) if ahead else scans
        wire = manifest.wire
        for bucket in cut(manifest):
            data = self._on_leader(lambda bucket=bucket: self._senders[0].buffer(bucket))  # type: ignore[misc]
            for piece in bucket.pieces:
                spec = wire[piece.tensor]
                nbytes = piece.count * spec.itemsize
                # Only rank 0 has a bucket to fill; the others say by an empty shell what they read along.
                part = (
                    torch.empty(nbytes, dtype=torch.uint8, device="meta")
                    if data is None
                    else data[piece.offset : piece.offset + nbytes]
                )
                run = part.view(getattr(torch, spec.dtype))
                if ahead:
                    run.copy_(ahead[piece.tensor].reshape(-1)[piece.start : piece.start + piece.count])
                else:
                    scans[piece.tensor] = self._fill(piece.tensor, piece.start, run) + scans[piece.tensor]
            self._on_leader(lambda bucket=bucket, data=data: self._send(bucket, data))  # type: ignore[misc]
        self._on_leader(self._finish)
        known = settle(scans)
        return known if self._ranks is None else self._ranks.total(known)

    def _stage_behind(self, manifest: Manifest) -> dict[str, list[Scan]]:
        """The same, from memory, for engines that are behind; what each is sent, by its name."""
        found: dict[str, list[Scan]] = {}
        for each in self._behind:
            self.deltas = each.deltas
            self._offer(each.of(manifest), [engine for engine in self._engines if engine.name in each.engines])
            found |= dict.fromkeys(each.engines, self._stage(each.of(manifest)))
        return found

    def _whole(self) -> list[torch.Tensor]:
        """The source's tensors in the manifest's order, where they are all of them contiguous and on one device."""
        whole = [tensor.detach() for tensor in self._publisher._weights.whole() or ()]
        alike = len({tensor.device for tensor in whole}) == 1 and all(tensor.is_contiguous() for tensor in whole)
        return [whole[n] for n in self._order] if alike else []

    def _fill(self, tensor: int, start: int, out: torch.Tensor) -> Scan | Pending:
        if self.deltas is not None:
            if out.device.type == "meta":
                return Scan(NO_DIGEST, 0)
            out.copy_(self.deltas[tensor].data[start : start + out.numel()])
            return scan_any(out, start)
        scanned = self._read(tensor, start, out)
        if self._baseline is not None and self._ranks is None:
            self._baseline.write(tensor, start, out)
        return scanned

    def _read(self, tensor: int, start: int, out: torch.Tensor) -> Scan | Pending:
        return self._guard(self._source.read, tensor, start, out)

    def _read_own(self, tensor: int, start: int, out: torch.Tensor) -> Scan | Pending:
        """What this rank holds, by itself."""
        return self._guard(self._source.read if self._ranks is None else self._spread.read_part, tensor, start, out)

    def _guard(self, read: Read, tensor: int, start: int, out: torch.Tensor) -> Scan | Pending:
        try:
            return read(self._order[tensor], start, out)
        except WeightwireError:
            raise
        except Exception as error:
            raise SourceError(f"tensor number {tensor} could not be read: {error!r}", phase="stage") from error

    def _send(self, bucket: Bucket, data: torch.Tensor | None) -> None:
        first, *others = self._senders
        for sender in others:
            sender.buffer(bucket).copy_(data)  # type: ignore[arg-type]
            sender.send(bucket)
        first.send(bucket)

    def _finish(self) -> None:
        for sender in self._senders:
            sender.finish()
        for stage in self._stages:
            self._wait(stage.done, "every rank to have every bucket")
            stage.result()
        self._close_senders()

    def _close_senders(self) -> None:
        while self._senders:
            self._senders.pop().close()

    def _seal(self, scans: Sequence[Scan], behind: Mapping[str, Sequence[Scan]]) -> None:
        def seal(engine: Engine) -> None:
            digests = [scan.digest.hex() for scan in behind.get(engine.name, scans)]
            engine.seal(self._id(engine), digests, timeout=self._left())

        self._each("seal", seal)

    def _commit(self, manifest: Manifest, pause: Pause, keep_cache: bool) -> dict[str, EngineReceipt]:
        def commit(engine: Engine) -> EngineReceipt:
            return engine.commit(self._id(engine), pause=pause, keep_cache=keep_cache, timeout=self._left())

        outcomes = self._outcomes("commit", commit)
        errors = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, WeightwireError)}
        if not errors:
            return outcomes  # type: ignore[return-value]
        if manifest.kind == "adapter" and self._undo([e for e in self._engines if e.name not in errors]):
            raise next(iter(errors.values()))
        if len(errors) == len(outcomes) == 1:
            raise next(iter(errors.values()))
        raise PublishError(
            f"{len(errors)} of {len(outcomes)} engines did not commit: {'; '.join(map(str, errors.values()))}",
            phase="commit",
            next_step="Publish the next version to bring all engines together again.",
            outcomes=outcomes,
        ) from next(iter(errors.values()))

    def _undo(self, engines: Sequence[Engine]) -> bool:
        """Have engines that committed an adapter go back to the revision before it; whether all of them did."""

        def undo(engine: Engine) -> None:
            engine.abort(self._id(engine), timeout=_ABORT_SECONDS)

        jobs = [self._pool.submit(undo, engine) for engine in engines]
        return not any(job.exception() for job in jobs)

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _id(self, engine: Engine) -> str:
        return self._begun[engine.name].id

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise DeadlineError("the publish ran out of time", next_step="Raise `deadline`, or look at the engine.")
        return left

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        pause = 0.0001
        while not ready():
            for stage in self._stages:
                if stage.done():
                    stage.result()
            if time.monotonic() > self._deadline:
                slow = ", ".join(engine.name for engine in self._engines)
                raise DeadlineError(f"waited in vain for {what}", engine=slow, phase="stage")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.0005)

    def _outcomes(self, phase: str, work: Callable[[Engine], T]) -> dict[str, T | WeightwireError]:
        def guarded(engine: Engine) -> T | WeightwireError:
            try:
                return work(engine)
            except WeightwireError as error:
                return error.at(engine=engine.name, phase=phase)
            except Exception as error:
                logger.exception("weightwire: %s: %s", engine.name, phase)
                return EngineError(f"unexpected {error!r}", engine=engine.name, phase=phase)

        jobs = {engine.name: self._pool.submit(guarded, engine) for engine in self._engines}
        return {name: job.result() for name, job in jobs.items()}

    def _each(self, phase: str, work: Callable[[Engine], T]) -> dict[str, T]:
        """The same on every engine at once; the first error, once all have answered."""
        outcomes = self._outcomes(phase, work)
        for outcome in outcomes.values():
            if isinstance(outcome, WeightwireError):
                raise outcome
        return outcomes  # type: ignore[return-value]

    def _everywhere(self, work: Callable[[], T]) -> T:
        """Work that every rank does for itself; an error on any is an error on all."""
        result, error = None, None
        try:
            result = work()
        except WeightwireError as failed:
            error = failed
        except Exception as unexpected:
            error = WeightwireError(f"unexpected {unexpected!r}").with_traceback(unexpected.__traceback__)
        if self._ranks is not None:
            self._ranks.agree(error)
        elif error is not None:
            raise error
        return result  # type: ignore[return-value]

    def _on_leader(self, work: Callable[[], T]) -> T | None:
        """Work that only rank 0 does; an error there is an error on all."""
        return self._everywhere(lambda: work() if self._publisher._leads else None)

    def _from_leader(self, work: Callable[[], T], type: Any) -> T:
        """Work that only rank 0 does, whose result all ranks get, as JSON."""
        result = self._on_leader(work)
        if self._ranks is None:
            return result  # type: ignore[return-value]
        data = self._ranks.share(None if result is None else msgspec.json.encode(result))
        return msgspec.json.decode(data, type=type)  # type: ignore[no-any-return]
