"""One publish: begin, stage, seal, commit, for all engines and on all ranks of the trainer."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace

import msgspec
import torch

from weightwire import transports
from weightwire.engines.base import Begun, Engine, EngineStatus, KeepCache, Pause
from weightwire.errors import (
    DeadlineError,
    EngineError,
    EngineLost,
    PublishError,
    SourceError,
    TransportError,
    UpdateNotFound,
    UsageError,
    WeightwireError,
)
from weightwire.fleet import Fleet, Started, results
from weightwire.reading import Reading, Weights
from weightwire.route import Kept, Route, find_route
from weightwire.sources.base import Source
from weightwire.sources.together import Together
from weightwire.transports import Choice, Lender, Link, Pushes, Sender, SendsParts, Transport
from weightwire.transports.cuda_driver import gpu_of
from weightwire.updates.adapter import check_name
from weightwire.updates.boxes import Part
from weightwire.updates.buckets import Bucket, Piece, cut, fill_bucket
from weightwire.updates.delta import Delta, scans_of
from weightwire.updates.digest import NO_DIGEST, Pending, Scan, Scans, scan_tensors_any, settle
from weightwire.updates.manifest import Adapter, Manifest, Staging, TensorSpec
from weightwire.updates.receipt import EngineReceipt, Receipt

__all__ = ["Means", "Run"]

_PHASES = ("begin", "stage", "seal", "commit")
_ABORT_SECONDS = 5.0
_PATIENCE_SECONDS = 0.2
_HEAD_START_SECONDS = 0.001
_PUSH_SECONDS = 0.0002
_WHY_SECONDS = 2.0  # how long engines are heard about why sending has failed; that a worker died is seen in half a one
_LENT_BUCKET_BYTES = 256 << 20  # where an engine copies what another GPU lends


@dataclass(slots=True, kw_only=True)
class Means:
    """What a publisher has, from one publish to the next."""

    source: Source
    engines: Sequence[Engine]
    adapter: str | None
    transports: Mapping[str, Transport | Lender]
    wanted: str | None
    bucket_bytes: int | None
    lease: float
    kept: Kept | None
    choices: dict[str, Choice] = field(default_factory=dict)

    def choose(self, engine: Engine, timeout: float) -> Choice:
        """The transport to an engine; looked for once, until a publish fails."""
        if engine.name not in self.choices:
            answers: list[EngineStatus] = []

            def ask(offers: Sequence[str]) -> Mapping[str, str | None]:
                answers.append(engine.status(offers, timeout=timeout))
                return answers[0].offers

            try:
                choice = transports.resolve(
                    self.transports, ask, host=engine.host, wanted=self.wanted, over_http=engine.over_http
                )
            except WeightwireError as error:
                raise error.at(engine=engine.name, phase="resolve") from None
            found = answers[0]
            self.choices[engine.name] = replace(
                choice,
                ranks=found.ranks,
                adapter_dtype=found.adapter_dtype,
                gpus=found.gpus,
                one_server=found.one_server,
            )
        return self.choices[engine.name]


class Run:
    """One publish. On rank 0 it drives the engines; on the others it only reads weights along. `deadline` is a time of
    `time.monotonic`. `why` is why everything is sent, where a delta was refused."""

    def __init__(self, means: Means, deadline: float, kind: str, why: str = "") -> None:
        self._means = means
        self._kind = kind
        self._baseline = None if means.kept is None else means.kept.baseline
        self._source = means.source
        self._ranks = means.source.ranks
        self._together = Together(self._ranks)
        self._fleet = Fleet(means.engines, deadline)
        self._ids = {engine.name: secrets.token_hex(16) for engine in means.engines}
        self._beginning: Started[Begun] = {}
        self._senders: list[Sender] = []
        self._lent = contextlib.ExitStack()
        self._ahead: list[torch.Tensor] = []
        self._ahead_scans: Sequence[Scan | Pending] = ()
        self._told: dict[str, str | None] = {}
        self._unasked: list[Callable[[], None]] = []
        self._stages: list[Future[None]] = []
        self._commits: Started[EngineReceipt] = {}
        self._route = Route(why=why)
        self.committing = False
        self._done = False

    @property
    def of_deltas(self) -> bool:
        """Whether deltas were sent, or were to be."""
        return self._route.deltas is not None

    def publish(
        self, version: int, partial: bool, finite: bool, staging: Staging, pause: Pause, keep_cache: KeepCache
    ) -> Receipt:
        """As `Publisher.publish`."""
        marks = [time.perf_counter()]
        baseline, kept, together = self._baseline, self._means.kept, self._together
        specs = tuple(together.everywhere(self._source.metadata))
        if not specs:
            raise SourceError("there are no tensors to publish", phase="begin", next_step="Is this the right source?")
        config = getattr(self._source, "lora", None)
        if config is not None and (partial or keep_cache):
            raise UsageError("`partial` and `keep_cache` are for whole models, and this is a LoRA adapter")
        cast = None if config is None else self._cast_to()
        self._reading = reading = Reading(self._source, specs, parts=baseline is not None, dtype=cast)
        self._decide(whole=not partial and staging == "copy", finite=finite)
        encoded = time.perf_counter()
        draft = Manifest(
            version=version,
            kind="adapter" if config is not None else "delta" if self.of_deltas else "dense",
            base_version=self._route.base,
            encoded=tuple(delta.nbytes for delta in self._route.deltas or ()),
            adapter=None
            if config is None
            else Adapter(name=check_name(str(self._means.adapter)), config=dict(config), cast=cast),
            tensors=reading.specs,
            aliases=dict(self._source.aliases),
            partial=partial,
            finite=finite,
            staging=staging,
            keep=baseline is not None and not self.of_deltas and not partial and staging == "copy",
        )
        manifest = together.from_leader(lambda: self._begin(draft.check()), Manifest)
        if baseline is not None and not self.of_deltas:
            together.everywhere(lambda: baseline.start(reading.specs, reading.mine))
        marks.append(time.perf_counter())
        scans = own = self._stage(manifest, self._route.deltas)
        if not cut(manifest):
            # Where nothing is sent, to seal could be quicker than to stage.
            together.on_leader(self._end_stages)
        if baseline is not None and not self.of_deltas and self._ranks is not None:
            own = together.everywhere(lambda: baseline.take_own(reading.read_own))
        behind = self._stage_behind(manifest)
        alone = self._ranks is None and len(self._fleet.engines) == 1  # then it waits for nobody, and is asked once
        if not (alone and self._fetches_by_itself):
            together.on_leader(self._finish)
        if not (alone and self._waits_itself(manifest)):
            together.on_leader(self._push_until_begun)
        marks.append(time.perf_counter())
        digests = {e.name: behind.get(e.name, scans).hexes() for e in self._fleet.engines}
        if not alone:
            together.on_leader(lambda: self._seal(digests))
        marks.append(time.perf_counter())
        # From here on engines may differ, and aborting could not make them alike again.
        self.committing = True
        before = None if kept is None else (kept.apart, kept.unsure)
        if kept is not None:
            kept.committing(version, self._route.own)
        sealing = digests if alone else {}
        try:
            receipts = together.from_leader(
                lambda: self._commit(manifest, pause, keep_cache, sealing), dict[str, EngineReceipt]
            )
        except WeightwireError as error:
            # What failed to seal it serves what it did.
            self.committing = not alone or error.phase not in _PHASES[:-1]
            if kept is not None and before is not None and not self.committing:
                kept.apart, kept.unsure = before
            raise
        marks.append(time.perf_counter())
        for receipt in receipts.values() if alone else ():
            marks[-2] = min(marks[-2] + receipt.seconds["seal"], marks[-1])
        seconds = {phase: b - a for phase, (a, b) in zip(_PHASES, itertools.pairwise(marks), strict=True)}
        if self.of_deltas:
            seconds = {"encode": encoded - marks[0], **seconds, "begin": marks[1] - encoded}
        self._done = True
        if baseline is not None:
            if self.of_deltas:
                together.everywhere(lambda: baseline.advance(version, self._route.own))
            else:
                together.everywhere(lambda: baseline.finish(version, own))
        if kept is not None:
            kept.committed()
        return Receipt(
            version=version,
            kind=manifest.kind,
            tensors=len(specs),
            nbytes=max(receipt.nbytes for receipt in receipts.values()),
            seconds=seconds,
            engines=receipts,
            why=self._why_so(),
        )

    def start_from(self, base: Source, version: int) -> None:
        """As `Publisher.start_from`."""
        baseline = self._baseline
        assert baseline is not None
        held = tuple(self._together.everywhere(base.metadata))
        specs = tuple(self._together.everywhere(self._source.metadata))
        config, its = (getattr(source, "lora", None) for source in (self._source, base))
        if (config is None) != (its is None):
            raise UsageError("of the base and what is published, one is a LoRA adapter and the other a whole model")
        if self._ranks is not None:
            self._together.everywhere(lambda: _check_base(specs, held))
        cast = None if config is None else self._cast_to()
        there = Reading(base, held, parts=False, dtype=cast)
        if self._ranks is None:
            specs = _in_order_of(held, specs)
        reading = Reading(self._source, specs, parts=True, dtype=cast)
        numbers = {spec.name: number for number, spec in enumerate(there.specs)}

        def read(tensor: int, start: int, out: torch.Tensor) -> Scan:
            spec = reading.specs[tensor]
            runs = (reading.mine[tensor] if reading.mine else Part.whole(spec.shape)).runs()
            scans = settle([there.read(numbers[spec.name], at, out[own : own + n]) for own, at, n in runs])
            return sum(scans, Scan(NO_DIGEST, 0))

        self._together.everywhere(lambda: baseline.start(reading.specs, reading.mine))
        own = self._together.everywhere(lambda: baseline.take(read))
        self._together.everywhere(lambda: baseline.finish(version, own))
        base.release()
        self._done = True

    def close(self) -> None:
        """Free everything, and abort what was not committed."""
        self._close_senders()
        self._lent.close()
        if not self._done:
            # What was found out about the transports may no longer be so.
            self._means.choices.clear()
        if not self._done and not self.committing:
            wait(self._beginning.values(), _ABORT_SECONDS)
            refused = {n for n, job in self._beginning.items() if job.done() and not isinstance(job.result(), Begun)}
            taken = [e for e in self._fleet.engines if e.name in self._beginning.keys() - refused]
            wait([self._fleet.submit(functools.partial(self._abort, engine)) for engine in taken])
        self._fleet.close()
        self._source.release()
        # These lead back here: with them all that was sent would stay until the garbage collector comes by.
        self._unasked.clear()
        self._stages.clear()
        self._beginning, self._commits = {}, {}
        self._ahead, self._ahead_scans = [], ()

    def _decide(self, *, whole: bool, finite: bool) -> None:
        """Find out whether deltas are sent."""

        def refusal() -> str | None:
            if not whole:
                return "a delta is of a whole model, and is staged"
            if any(isinstance(way, Lender) for way in self._ways.values()):
                return "the engine reads the weights in the trainer's own memory"
            return self._held_otherwise()

        if self._means.kept is not None and self._kind != "dense":
            self._route = find_route(
                self._means.kept,
                self._reading,
                self._ranks,
                always=self._kind == "delta",
                finite=finite,
                refusal=refusal,
                ask_versions=lambda: self._fleet.each(
                    "resolve", lambda engine: engine.status(timeout=self._fleet.left()).serves(self._means.adapter)
                ),
            )
        elif self._kind == "delta":
            self._route = Route(why="no baseline is kept; make the Publisher with baseline='host'")
        if self._kind == "delta" and not self.of_deltas:
            raise UsageError(
                f"no delta can be sent: {self._route.why}", next_step="Publish with kind='auto' or 'dense'."
            )

    @functools.cached_property
    def _choices(self) -> dict[str, Choice]:
        if self._means.choices.keys() >= self._ids.keys():
            return {name: self._means.choices[name] for name in self._ids}
        return self._fleet.each("resolve", lambda engine: self._means.choose(engine, self._fleet.left()))

    @property
    def _ways(self) -> dict[str, Transport | Lender]:
        return {choice.name: self._means.transports[choice.name] for choice in self._choices.values()}

    def _cast_to(self) -> str | None:
        """The dtype to which every engine would cast an adapter: the trainer sends it so, rather than twice the bytes.
        Not where nothing travels anyway."""
        if self._ranks is not None or any(isinstance(way, Lender) for way in self._ways.values()):
            return None
        dtypes = {choice.adapter_dtype for choice in self._choices.values()}
        return dtypes.pop() if len(dtypes) == 1 else None

    def _held_otherwise(self) -> str | None:
        """Of an adapter, why engines do not hold the version before as it was sent: they have cast it."""
        sent = {spec.dtype for spec in self._reading.specs}
        for name, choice in self._choices.items() if self._means.adapter is not None else ():
            if choice.adapter_dtype is not None and sent != {choice.adapter_dtype}:
                return f"{name} holds adapters in {choice.adapter_dtype}, and this is sent as {', '.join(sorted(sent))}"
        return None

    def _why_so(self) -> str:
        """Of an adapter it also says which of the two it was: its kind does not."""
        why = self._route.why
        return why if self._means.adapter is None or not why else f"{'delta' if self.of_deltas else 'whole'}: {why}"

    # -- the steps, on rank 0 --------------------------------------------------------------------------------------

    def _begin(self, draft: Manifest) -> Manifest:
        lent: dict[str, str] = {}
        for name, way in self._ways.items():
            if isinstance(way, Lender):
                lent[name] = self._lent.enter_context(way.lend(self._reading.whole))
        senders = {name: way for name, way in self._ways.items() if not isinstance(way, Lender)}
        limits = [limit for way in senders.values() if (limit := way.bucket_limit(draft.nbytes)) is not None]
        wanted = self._means.bucket_bytes or min((w.bucket_bytes for w in senders.values()), default=_LENT_BUCKET_BYTES)
        manifest = msgspec.structs.replace(draft, bucket_bytes=max(4096, min([wanted, *limits])))
        holder = f"{socket.gethostname()}:{os.getpid()}"
        behind = {name: each.of(manifest) for each in self._route.behind for name in each.engines}

        def begin(engine: Engine) -> Begun:
            lends = self._choices[engine.name].name not in senders and not manifest.adapter
            # Where the weights are on the engine's own GPU, it need not stand still while they come.
            stays = lends and (manifest.staging == "copy" or self._is_here(engine))
            own = msgspec.structs.replace(manifest, staging="lent") if stays else manifest
            return engine.begin(
                behind.get(engine.name, own),
                holder=holder,
                lease=self._means.lease,
                address=self._told[engine.name],
                id=self._ids[engine.name],
                timeout=self._fleet.left(),
            )

        # Engines are told where to look as they begin; of those that are behind, the turn comes after the others'.
        ahead = [engine for engine in self._fleet.engines if engine.name not in behind]
        self._told = {engine.name: None for engine in self._fleet.engines}
        self._told |= {engine.name: lent.get(self._choices[engine.name].name) for engine in ahead}
        self._offer(manifest, ahead)
        self._beginning = self._fleet.start("begin", begin)
        self._scan_ahead()
        # The first buckets can be filled while engines begin, if all know where to look for them. Not where a baseline
        # takes them along, which is to stay as it is if an engine refuses.
        taken_along = self._baseline is not None and not self.of_deltas
        if self._ranks is not None or taken_along or any(self._told[engine.name] is None for engine in ahead):
            self._await_begun()
        else:
            # Whoever asks them has the interpreter until it has asked: filling buckets would keep it from that for
            # longer than to fill them takes.
            wait(self._beginning.values(), _HEAD_START_SECONDS)
        return manifest

    def _is_here(self, engine: Engine) -> bool:
        """Whether all of its ranks are on the GPU that the weights are on, or it does not say where they are."""
        return not {*self._choices[engine.name].gpus} - {gpu_of(Weights(self._source).device)}

    def _waits_itself(self, manifest: Manifest) -> bool:
        """Whether an engine alone may be asked to commit while it begins: nothing travels, and it sees to the order.
        Not where it stands still from the beginning on, which is several steps, and nothing would be gained."""
        ordered = all(self._choices[engine.name].one_server for engine in self._fleet.engines)
        return ordered and self._fetches_by_itself and not self._senders and manifest.staging == "copy"

    def _push_until_begun(self) -> None:
        """Readers come while engines still begin; what is ready for them goes out meanwhile."""
        pushing = [sender for sender in self._senders if isinstance(sender, Pushes)]
        while pushing and not all(job.done() for job in self._beginning.values()):
            with self._sending():
                pushing = [sender for sender in pushing if not sender.push()]
            wait(self._beginning.values(), _PUSH_SECONDS)
        self._await_begun()

    def _await_begun(self) -> None:
        for name, begun in results(self._beginning).items():
            expected = (self._ids[name], self._choices[name].ranks)
            if (begun.id, begun.ranks) != expected:
                raise EngineError(
                    f"began {begun.id} on {begun.ranks} ranks, expected was {expected[0]} on {expected[1]}",
                    engine=name,
                    phase="begin",
                    next_step="Publish again.",
                )

    def _offer(self, manifest: Manifest, engines: Sequence[Engine]) -> None:
        for name, way in self._ways.items():
            taking = [e for e in engines if self._choices[e.name].name == name]
            if taking and not isinstance(way, Lender):
                self._open(way, taking, cut(manifest))

    def _scan_ahead(self) -> None:
        """While engines begin, have a GPU scan what it has whole, by one launch for all, which is much cheaper than one
        for each piece. What is sent waits for it, and it is over before engines are there: beside, it would keep the
        link from the memory."""
        reads_along = self._baseline is not None and self._baseline.reads_along
        plain = self._ranks is None and not self.of_deltas and not reads_along
        if plain and Weights(self._source).device.type == "cuda":
            self._ahead = self._reading.whole
            self._ahead_scans = scan_tensors_any(self._ahead) if self._ahead else ()

    def _open(self, transport: Transport, engines: Sequence[Engine], buckets: Sequence[Bucket]) -> None:
        links = [self._link(engine) for engine in engines]
        sender = transport.sender(links, buckets, self._wait, self._means.lease)
        self._senders.append(sender)
        for engine, address in zip(engines, sender.addresses, strict=True):
            if address is not None and buckets:  # nobody comes for nothing
                self._unasked.append(functools.partial(self._fetch, engine, address))
                if not self._beginning:
                    self._told[engine.name] = address
        if self._beginning:
            self._ask()

    def _link(self, engine: Engine) -> Link:
        id = self._id(engine)

        def put(index: int, body: memoryview) -> None:
            try:
                engine.put(id, index, body, timeout=self._fleet.left())
            except WeightwireError as error:
                raise error.at(engine=engine.name, phase="stage") from None

        return Link(engine=engine.name, update=id, ranks=self._choices[engine.name].ranks, put=put)

    def _ask(self) -> None:
        """Have engines fetch, and say how it ended. Those that do so since they began are not asked until something has
        to be waited for: each question takes time from what is asked about."""
        while self._unasked and all(job.done() for job in self._beginning.values()):
            self._stages.append(self._fleet.submit(self._unasked.pop()))

    def _fetch(self, engine: Engine, address: str) -> None:
        try:
            engine.stage(self._id(engine), address, timeout=self._fleet.left())
        except WeightwireError as error:
            raise error.at(engine=engine.name, phase="stage") from None

    def _stage(self, manifest: Manifest, deltas: Sequence[Delta] | None) -> Scans:
        """Read every bucket, on all ranks together, or take it from `deltas`, and send it from rank 0."""
        if self._ranks is None and not self._senders:
            # Nothing travels: the weights are scanned where they are, while engines do the same.
            whole = self._ahead or self._reading.whole
            scanning = self._ahead_scans or scan_tensors_any(whole)
            if self._baseline is not None:
                for number, tensor in enumerate(whole):
                    self._baseline.write(number, 0, tensor)
            return settle(scanning)
        scans: list[Scan | Pending] = [Scan(NO_DIGEST, 0)] * len(manifest.tensors)
        ahead: Sequence[Scan | Pending] = self._ahead_scans
        if deltas:  # which only rank 0 has
            assert self._baseline is not None
            self._baseline.wait()
            ahead = scans_of(deltas)
        if deltas is None and getattr(self._source, "gathers", False):
            return self._gather(manifest)
        for bucket in cut(manifest):
            lies_there = deltas is None and self._ahead and bucket.apart
            if lies_there and all(isinstance(sender, SendsParts) for sender in self._senders):
                self._send_parts(bucket)
                continue
            data = self._together.on_leader(lambda bucket=bucket: self._buffer(bucket))  # type: ignore[misc]
            if deltas is None:
                self._fill(bucket, data, scans)
            elif data is not None:
                fill_bucket(bucket, data, [delta.data for delta in deltas])
            self._together.on_leader(lambda bucket=bucket, data=data: self._send(bucket, data))  # type: ignore[misc]
        known = settle(ahead or scans)
        return known if self._ranks is None else self._ranks.total(known)

    def _gather(self, manifest: Manifest) -> Scans:
        """`_stage` of a source that is spread over GPUs. What rank 0 does between two buckets is part of what the ranks
        agree on before the second, so that they do so once a bucket."""
        filled: list[tuple[Bucket, torch.Tensor | None]] = []

        def send() -> None:
            while filled:
                self._send(*filled.pop())

        def runs(bucket: Bucket) -> list[tuple[int, int, torch.Tensor]]:
            data = None
            if self._together.leads:
                send()
                data = self._buffer(bucket)
                filled.append((bucket, data))
            return [(piece.tensor, piece.start, self._place(piece, data)) for piece in bucket.pieces]

        scans = self._together.everywhere(self._reading.scan_own)
        for bucket in cut(manifest):
            self._reading.gather(functools.partial(runs, bucket))
        self._together.on_leader(send)
        return self._ranks.total(settle(scans))  # type: ignore[union-attr]

    def _stage_behind(self, manifest: Manifest) -> dict[str, Scans]:
        """The same, from memory, for engines that are behind; what each is sent, by its name."""
        found: dict[str, Scans] = {}
        for each in self._route.behind:
            self._together.on_leader(self._end_stages)  # of those before: a sender is for one manifest
            own = each.of(manifest)
            self._offer(own, [engine for engine in self._fleet.engines if engine.name in each.engines])
            found |= dict.fromkeys(each.engines, self._stage(own, each.deltas))
        return found

    def _fill(self, bucket: Bucket, data: torch.Tensor | None, scans: list[Scan | Pending]) -> None:
        if self._ahead:
            for piece, part in zip(bucket.pieces, self._parts(bucket), strict=True):
                self._place(piece, data).copy_(part)
            return
        packed = None if data is None else self._reading.pack(bucket.pieces, data)
        found: Sequence[Scan | Pending] = packed or [
            self._reading.read(piece.tensor, piece.start, self._place(piece, data)) for piece in bucket.pieces
        ]
        for piece, scan in zip(bucket.pieces, found, strict=True):
            scans[piece.tensor] = scan + scans[piece.tensor]
        if self._baseline is not None and self._ranks is None:
            for piece in bucket.pieces:
                self._baseline.write(piece.tensor, piece.start, self._place(piece, data))

    def _place(self, piece: Piece, data: torch.Tensor | None) -> torch.Tensor:
        """Where in a bucket's memory its elements go. Only rank 0 has a bucket to fill; the others say by an empty
        shell what they read along."""
        return torch.empty(piece.count, dtype=piece.dtype, device="meta") if data is None else piece.within(data)

    def _buffer(self, bucket: Bucket) -> torch.Tensor:
        with self._sending():
            return self._senders[0].buffer(bucket)

    def _send(self, bucket: Bucket, data: torch.Tensor | None) -> None:
        first, *others = self._senders
        with self._sending():
            for sender in others:
                sender.buffer(bucket).copy_(data)  # type: ignore[arg-type]
                sender.send(bucket)
            first.send(bucket)

    def _send_parts(self, bucket: Bucket) -> None:
        """Send it from where the weights are."""
        parts = self._parts(bucket)
        with self._sending():
            for sender in self._senders:
                sender.send_parts(bucket, parts)  # type: ignore[attr-defined]

    def _parts(self, bucket: Bucket) -> list[torch.Tensor]:
        return [piece.of(self._ahead[piece.tensor].reshape(-1)) for piece in bucket.pieces]

    def _finish(self) -> None:
        with self._sending():
            for sender in self._senders:
                sender.finish()

    @contextlib.contextmanager
    def _sending(self) -> Iterator[None]:
        """A sender sees only that it failed; which engine it was, and why, is for the engines to say."""
        try:
            yield
        except TransportError as error:
            if error.engine is not None:
                raise
            everyone = ", ".join(engine.name for engine in self._fleet.engines)
            raise self._why(error.at(engine=everyone, phase="stage"), _WHY_SECONDS) from error

    def _why(self, error: WeightwireError, seconds: float) -> WeightwireError:
        """What an engine says of a failure while it staged, if it says so by then; first of all one that was lost,
        which may be why others failed."""
        began = [job.result() for job in wait(self._beginning.values(), seconds).done]
        self._ask()
        found = [*began, *(stage.exception() for stage in wait(self._stages, seconds).done)]
        errors = [each for each in found if isinstance(each, WeightwireError) and not isinstance(each, UpdateNotFound)]
        lost = [each for each in errors if isinstance(each, EngineLost)]
        return next(iter([*lost, *errors, error]))

    def _raise_failed(self) -> None:
        if any(job.done() and isinstance(job.result(), WeightwireError) for job in self._beginning.values()):
            self._await_begun()
        for stage in self._stages:
            error = stage.exception() if stage.done() else None
            if error is not None:
                raise self._why(error, _WHY_SECONDS) if isinstance(error, TransportError) else error

    @property
    def _fetches_by_itself(self) -> bool:
        """Whether the engines fetch since they began, and so need no more than to be asked to seal what has come."""
        return all(address is not None for address in self._told.values())

    def _end_stages(self) -> None:
        self._finish()
        self._unasked.clear()  # what was sent to the end has been taken
        for stage in self._stages:
            self._wait(stage.done, "every rank to have every bucket")
        self._raise_failed()
        self._stages.clear()
        self._close_senders()

    def _close_senders(self) -> None:
        while self._senders:
            self._senders.pop().close()

    def _seal(self, digests: Mapping[str, Sequence[str]]) -> None:
        def seal(engine: Engine) -> None:
            engine.seal(self._id(engine), digests[engine.name], timeout=self._fleet.left())

        try:
            self._fleet.each("seal", seal)
        except UpdateNotFound as gone:
            # An engine that ended the update while it staged says why in its answer to that.
            raise self._why(gone, _ABORT_SECONDS) from None
        self._end_stages()

    def _commit(
        self, manifest: Manifest, pause: Pause, keep_cache: KeepCache, digests: Mapping[str, Sequence[str]]
    ) -> dict[str, EngineReceipt]:
        """`digests`: of engines that are to seal it first."""

        def ask(engine: Engine) -> EngineReceipt:
            return engine.commit(
                self._id(engine),
                digests=digests.get(engine.name),
                pause=pause,
                keep_cache=keep_cache,
                timeout=self._fleet.left(),
            )

        def commit(engine: Engine) -> EngineReceipt:
            beginning = self._beginning[engine.name]
            begun = beginning.done()
            try:
                return ask(engine)
            except UpdateNotFound:
                # Asked for while the update was being begun, it may have come there first.
                wait((beginning,), self._fleet.left())
                if not beginning.done():
                    raise DeadlineError("no answer", engine=engine.name, phase="begin") from None
                if begun or not isinstance(beginning.result(), Begun):
                    raise
                return ask(engine)

        self._commits = self._fleet.start("commit", commit)
        if digests:
            # While it takes what is left and makes ready, what it has taken is cleared away.
            with contextlib.suppress(WeightwireError):
                self._finish()
                self._close_senders()
        outcomes = {name: job.result() for name, job in self._commits.items()}
        errors = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, WeightwireError)}
        if not errors:
            return outcomes  # type: ignore[return-value]
        results(self._beginning)  # one that was not waited for and failed is why there was nothing to commit
        if len(errors) == len(outcomes) == 1:
            error = next(iter(errors.values()))
            ended = isinstance(error, UpdateNotFound) and error.phase == "seal"
            raise self._why(error, _ABORT_SECONDS) if ended else error
        if manifest.kind == "adapter" and self._undo([e for e in self._fleet.engines if e.name not in errors]):
            raise next(iter(errors.values()))
        raise PublishError(
            f"{len(errors)} of {len(outcomes)} engines did not commit: {'; '.join(map(str, errors.values()))}",
            phase="commit",
            next_step="Publish the next version to bring all engines together again.",
            outcomes=outcomes,
        ) from next(iter(errors.values()))

    def _undo(self, engines: Sequence[Engine]) -> bool:
        """Have engines that committed an adapter go back to the revision before it; whether all of them did."""
        jobs = [self._fleet.submit(functools.partial(self._abort, engine)) for engine in engines]
        return not any(job.exception() for job in jobs)

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _id(self, engine: Engine) -> str:
        return self._ids[engine.name]

    def _abort(self, engine: Engine) -> None:
        engine.abort(self._id(engine), timeout=_ABORT_SECONDS)

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        pause, since = 0.00005, time.monotonic()
        while not ready() and not any(job.done() for job in self._commits.values()):
            if time.monotonic() - since > _PATIENCE_SECONDS:
                self._ask()
            self._raise_failed()
            if time.monotonic() > self._fleet.deadline:
                self._await_begun()
                slow = ", ".join(engine.name for engine in self._fleet.engines)
                raise DeadlineError(f"waited in vain for {what}", engine=slow, phase="stage")
            time.sleep(pause)
            pause = min(pause * 1.2, 0.0005)


def _in_order_of(base: Sequence[TensorSpec], specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """What a base has, in the order in which it is published."""
    places = {spec.name: number for number, spec in enumerate(specs)}
    return tuple(sorted(base, key=lambda spec: places.get(spec.name, len(places))))


def _check_base(specs: Sequence[TensorSpec], base: Sequence[TensorSpec]) -> None:
    known = set(base)
    odd = next((spec for spec in specs if spec not in known), None)
    if odd is not None:
        raise UsageError(f"the base has no {odd.dtype} tensor {odd.name!r} of shape {odd.shape}")
