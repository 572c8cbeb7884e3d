"""The receiver: one worker's side of an update, as a state machine.

    idle --begin--> staging --seal--> sealed --commit--> idle
      ^                |                 |        |
      +----- abort, or the lease ends ---+        +--> poisoned --a complete update--> idle

A LoRA adapter takes the same way, only that its commit poisons nothing: it makes a revision known that is in the engine
already, beside those that are being served, and can be undone.

It knows no engine and no wire. A `Target` lays the update out, holds the staged copy and makes it live; a `fetch`
function brings buckets from an address. Calls come from one thread, the engine's own, between two model steps; what
takes long (fetching, verifying, packing, reading back) runs on one thread of the receiver, and `poll` asks after it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar, cast

import msgspec
import numpy as np
import torch

from weightwire.errors import (
    BusyError,
    EngineError,
    ManifestError,
    NonFinite,
    PoisonedError,
    RoomError,
    StateError,
    TransportError,
    UnsupportedError,
    UpdateNotFound,
    UsageError,
    VerificationError,
    VersionError,
    WeightwireError,
)
from weightwire.interpreter import collecting_later, taking_turns
from weightwire.landing import Landed, Landing, room_for
from weightwire.pull import pull
from weightwire.revisions import Revision, Revisions
from weightwire.target import (
    AdapterStaging,
    DeltaStaging,
    Encoded,
    HasPlaces,
    Queues,
    Staging,
    TakesBuckets,
    Target,
    computed_by,
)
from weightwire.updates.boxes import Box
from weightwire.updates.buckets import Bucket, Piece, cut
from weightwire.updates.digest import (
    NO_DIGEST,
    Pending,
    Scan,
    Scans,
    scan_pieces_any,
    scan_runs,
    scan_runs_any,
    scan_tensors_any,
    settle,
)
from weightwire.updates.manifest import Manifest, TensorSpec, decode_manifest

__all__ = ["Arrivals", "Arrived", "Fetch", "Lent", "Receiver", "decode_reply", "encode_call"]

logger = logging.getLogger("vllm.weightwire.receiver")

_NOTHING = Scan(NO_DIGEST, 0)
_MAX_LINGER = 0.05
_MAX_CLIENTS = 1024
_PROOF_SECONDS = 5.0  # of an adapter, which was proven before
_CHECK_SECONDS = 0.005  # at most, between two model steps
_TOGETHER_BYTES = 1 << 30  # that are scanned by one launch, which takes a GPU some 0.3 ms
_TOGETHER_SECONDS = 0.5  # after which what has arrived is taken, and the lease renewed, however little it is


def _nowhere(bucket: Bucket) -> Sequence[None]:
    return [None] * len(bucket.pieces)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """What a fetch function is given: which update, which buckets, for which rank, and when to give up."""

    update: str
    rank: int
    tensors: Sequence[TensorSpec]
    buckets: Sequence[Bucket]
    lease: float
    """Seconds of silence after which the sender counts as gone."""
    cancelled: threading.Event
    places: Callable[[Bucket], Sequence[torch.Tensor | None]] = _nowhere
    """As `target.HasPlaces`."""

    def landing(self) -> Landing:
        """Where they arrive on the current GPU."""
        return Landing(self.buckets, self.places, torch.device("cuda", torch.cuda.current_device()))


@dataclass(frozen=True)
class Lent:
    """Every tensor of an update, contiguous, in memory of the trainer's; `here`: on the device where the update is
    staged."""

    tensors: Sequence[torch.Tensor]
    here: bool = True

    @cached_property
    def flat(self) -> Sequence[torch.Tensor]:
        """The same, 1-D."""
        return [tensor.detach().reshape(-1) for tensor in self.tensors]


T = TypeVar("T")
Arrived = tuple[int, "torch.Tensor | Landed"]
"""A bucket: its number, and its memory (uint8, 1-D) or where its pieces are."""
Fetch = Callable[[str, Arrivals], Iterator[Arrived]]
"""Gives each bucket in turn. What does not stay where it is (`landing.Landed`) is lent until the next is asked for."""
Open = Callable[[str, Arrivals], "Lent | None"]


class _Opened(NamedTuple):
    """What is lent at an address, if anything is; and scans of it, on their way, where that is on this GPU."""

    lent: Lent | None
    scans: Sequence[Scan | Pending] | None


@dataclass(slots=True, kw_only=True)
class _Update:
    id: str
    manifest: Manifest
    holder: str
    expires: float
    staging: Staging
    revision: Revision | None
    adapter: AdapterStaging | None
    delta: DeltaStaging | None
    arrivals: Arrivals
    ahead: Future[_Opened] | None
    scans: list[Scan | Pending]
    known: Scans
    received: set[int] = field(default_factory=set)
    overwrites: bool = False
    began: float = field(default_factory=time.perf_counter)
    jobs: list[Future[None]] = field(default_factory=list)
    error: WeightwireError | None = None
    address: str | None = None
    fetching: Future[None] | None = None
    ready: bool = False
    sealed: bool = False
    committed: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    followed: threading.Event = field(default_factory=threading.Event)
    """Set once nobody is waited for any more that might send another."""

    @property
    def lease(self) -> float:
        return self.arrivals.lease

    @property
    def buckets(self) -> Sequence[Bucket]:
        return self.arrivals.buckets

    @property
    def cancelled(self) -> threading.Event:
        return self.arrivals.cancelled


class Receiver:
    """One worker's update state. `keep` older revisions of an adapter can be pinned by requests. `clock` is a Unix
    clock in seconds; `background=False` runs long work inside the call and leaves leases to be noticed by the next
    call, which is what a model checker wants."""

    def __init__(
        self,
        target: Target,
        fetch: Fetch,
        *,
        open: Open = lambda address, arrivals: None,
        enter_thread: Callable[[], None] = lambda: None,
        probe: Callable[[str], str | None] = lambda offer: None,
        sweep: Callable[[str], None] = lambda update: None,
        rank: int = 0,
        gpu: str | None = None,
        keep: int = 2,
        clock: Callable[[], float] = time.time,
        background: bool = True,
    ) -> None:
        self._target = target
        self._fetch = fetch
        self._open = open
        self._probe = probe
        self._sweep = sweep
        self._rank, self._gpu = rank, gpu
        self._clock = clock
        self._background = background
        self._pool = (
            ThreadPoolExecutor(max_workers=1, thread_name_prefix="weightwire", initializer=enter_thread)
            if background
            else None
        )
        if self._pool is not None:
            # Compiled before the first update wants it.
            self._pool.submit(scan_runs, torch.zeros(4, dtype=torch.uint8), [(0, 1, 0, torch.float32)])
        self._lock = threading.RLock()
        self._closed = False
        self._update: _Update | None = None
        self._followed = threading.Event()
        self._ended: dict[str, str] = {}
        self._proofs: tuple[str, Future[dict[str, Any]]] | None = None
        self._revisions = Revisions(keep)
        self._last: tuple[str, Revision] | None = None
        self._undo: tuple[str, DeltaStaging, int | None] | None = None
        self._intact: str | None = None  # the update whose commit failed here and was undone
        self._dropped: list[Revision] = []
        self._version: int | None = None
        self._poisoned: str | None = None
        self._receipt: dict[str, Any] | None = None
        self._ops: dict[str, Callable[..., Any]] = {
            "status": self.status,
            "begin": self.begin,
            "stage": self._polled(self.stage),
            "put": self._polled(self.put),
            "poll": self.poll,
            "seal": self._seal_and_keep,
            "commit": self.commit,
            "proof": self.proof,
            "abort": self.abort,
            "try_offers": self.try_offers,
            "poison": self.poison,
            "take_back": self.take_back,
            "record": self.record,
            "adapters": self.adapters,
            "unload": self.unload,
        }

    # -- the calls, in the order of an update ----------------------------------------------------------------------

    def begin(
        self,
        id: str,
        manifest: Manifest | dict[str, Any] | bytes,
        holder: str,
        lease: float,
        address: str | None = None,
    ) -> Sequence[Sequence[Box]] | None:
        """Take the engine for one update, for `lease` seconds from the trainer's last sign of life. Gives what this
        rank takes of each tensor (`Staging.takes`): what no rank takes must not be sent. With an `address`, `stage` it
        too."""
        with self._lock:
            self._expire()
            manifest = manifest if isinstance(manifest, Manifest) else decode_manifest(manifest)
            if self._closed:
                raise StateError("the engine was closed", next_step="Connect to it again.")
            if id in self._ended or (self._update is not None and self._update.id == id):
                known = self._ended.get(id, "it is under way")
                raise UsageError(f"there is an update {id} already: {known}", next_step="Choose a new id.")
            if (held := self._update) is not None:
                raise BusyError(
                    f"held by {held.holder}, which is sending version {held.manifest.version},"
                    f" until {_utc(held.expires)}",
                    next_step="Wait for it to finish or for its lease to end, then publish again.",
                    details={"holder": held.holder, "until": held.expires},
                )
            self._forget()
            started = time.perf_counter()
            revision = self._revision(id, manifest)
            buckets, nothing = cut(manifest), [_NOTHING] * len(manifest.tensors)
            arrivals = Arrivals(
                update=id,
                rank=self._rank,
                tensors=manifest.wire,
                buckets=buckets,
                lease=lease,
                cancelled=threading.Event(),
            )
            # What is lent on this GPU is scanned while all else is made ready.
            ahead = None if address is None else self._submit(lambda: self._open_and_scan(address, arrivals, manifest))
            try:
                adapter = revision and self._prepare_adapter(manifest, revision)
                delta = self._target.prepare_delta(manifest) if manifest.kind == "delta" else None
                staging = adapter or delta or self._target.prepare(manifest)
                self._refuse_without_room(staging)
            except BaseException:
                arrivals.cancelled.set()
                if ahead is not None:
                    self._submit(lambda: self._sweep(id))
                raise
            self._followed.set()
            self._followed = threading.Event()
            self._update = _Update(
                id=id,
                manifest=manifest,
                holder=holder,
                expires=self._clock() + lease,
                staging=staging,
                revision=revision,
                adapter=adapter,
                delta=delta,
                arrivals=arrivals,
                ahead=ahead,
                scans=[*nothing],
                known=Scans.of([] if buckets else nothing),
                seconds={"begin": time.perf_counter() - started, "stage": 0.0, "seal": 0.0},
                followed=self._followed,
            )
            if self._background:
                threading.Thread(target=self._watch, args=(self._update,), name="weightwire-lease", daemon=True).start()
            if address is not None:
                self.stage(id, address)
            return staging.takes

    def _refuse_without_room(self, staging: Staging) -> None:
        if staging.nbytes and staging.nbytes > (room := self._target.room()):
            staging.discard()
            raise RoomError(
                f"the staged copy needs {staging.nbytes} bytes on rank {self._rank}, {room} may be used",
                next_step="Free memory on the engine's machine, or raise WEIGHTWIRE_STAGING_LIMIT if it is set.",
            )

    def _revision(self, id: str, manifest: Manifest) -> Revision | None:
        """The revision that this update is to become; None for a whole model. Raises when it cannot be one now."""
        if manifest.adapter is None:
            self._check_version(manifest)
        words = {"dense": None, "delta": "delta", "adapter": "LoRA adapter"}
        partly = "partial update" if manifest.partial else words[manifest.kind]
        if self._poisoned and partly:
            raise PoisonedError(
                f"poisoned ({self._poisoned}), and a {partly} cannot heal it",
                next_step="Publish a complete update.",
            )
        if manifest.adapter is None:
            return None
        if manifest.adapter.cast not in (None, here := self._target.adapter_dtype):
            raise UnsupportedError(
                f"the adapter was cast to {manifest.adapter.cast}, and this engine holds adapters in {here or 'any'}",
                next_step="Publish again: the trainer then asks for that anew.",
            )
        return self._revisions.open(manifest.adapter.name, manifest.version, id)

    def _prepare_adapter(self, manifest: Manifest, revision: Revision) -> AdapterStaging:
        if manifest.base_version is None:
            return self._target.prepare_adapter(manifest, revision)
        base = self._revisions.find(revision.name, manifest.base_version)
        return self._target.prepare_adapter_delta(manifest, revision, base)

    def _check_version(self, manifest: Manifest) -> None:
        # Poisoned, this rank may hold the version that another failed to take; it may be sent again.
        oldest = self._version if self._poisoned else None if self._version is None else self._version + 1
        if oldest is not None and manifest.version < oldest:
            raise VersionError(
                f"version {manifest.version} is not newer than {self._version}, which is being served",
                next_step=f"Publish version {oldest} or higher.",
            )
        if manifest.kind == "delta" and manifest.base_version != self._version and not self._poisoned:
            raise VersionError(
                f"the delta starts from version {manifest.base_version}, here is {self._version}",
                next_step="Publish the whole model, or the delta from what is here.",
            )

    def stage(self, id: str, address: str) -> None:
        """Start to fetch every bucket from `address`, where that has not been started."""
        with self._lock:
            if (update := self._held(id)).address == address:
                return
            update = self._staging(id)
            update.address = address
            update.fetching = self._start(update, "stage", lambda: self._fetch_all(update, address))

    def put(self, id: str, index: int, body: bytes) -> None:
        """Take one bucket's bytes. Sent again, the same bucket is taken once."""
        with self._lock:
            update = self._staging(id)
            if not 0 <= index < len(update.buckets):
                raise UpdateNotFound(f"bucket {index} of an update that has {len(update.buckets)}")
            if len(body) != (expected := update.buckets[index].nbytes):
                raise VerificationError(f"bucket {index} has {len(body)} bytes, {expected} were announced")
            data = torch.frombuffer(bytearray(body), dtype=torch.uint8)
            self._start(update, "stage", lambda: self._take(update, [(index, data)]))

    def poll(self, id: str, hold: float = 0.0, linger: float = 0.0) -> dict[str, Any]:
        """How far the long work of this update is; raises what ended it. No sign of life: it does not renew, but the
        lease lasts for another `hold` seconds at least. While there is work it answers up to `linger` seconds later,
        four times that once all has come, for callers that know that the engine has nothing to generate meanwhile. It
        also does the engine's own thread's part of the work, a little at each call."""
        with self._lock:
            update = self._held(id)
            jobs = update.jobs
        end = time.monotonic() + min(4 * linger, _MAX_LINGER)
        left = wait(jobs, timeout=min(linger, _MAX_LINGER)).not_done
        if left and update.known:
            # All has come, and what is left is short: another question would take longer.
            wait(left, timeout=end - time.monotonic())
        with self._lock:
            update = self._held(id)
            update.expires = max(update.expires, self._clock() + hold)
            if update.error is None and not update.sealed:
                self._check(update, max(linger, _CHECK_SECONDS))
            if update.error is not None:
                raise update.error
            return {
                "busy": any(not job.done() for job in update.jobs) or update.ready != update.sealed,
                "received": len(update.received),
                "buckets": len(update.buckets),
                "state": self.state,
                "kind": update.manifest.kind,
            }

    def _polled(self, start: Callable[..., None]) -> Callable[..., dict[str, Any]]:
        """A call that starts work, and asks after it at once: a question less where the work is short."""

        def call(id: str, hold: float = 0.0, linger: float = 0.0, **arguments: Any) -> dict[str, Any]:
            start(id, **arguments)
            return self.poll(id, hold, linger)

        return call

    def seal(self, id: str, digests: Sequence[str]) -> None:
        """Compare what arrived with what was sent, one digest a tensor in manifest order, and make ready to commit;
        what is being fetched is waited for."""
        with self._lock:
            update = self._staging(id)
            specs = update.manifest.tensors
            if len(digests) != len(specs):
                raise ManifestError(f"{len(digests)} digests for {len(specs)} tensors")
            running = [job for job in update.jobs if not job.done()]
            if any(job is not update.fetching for job in running):
                raise _not_arrived(update)
            if not running:
                self._verify(update, digests)
            self._start(update, "seal", lambda: self._make_ready(update, digests if running else None))
            while not self._background and update.ready and not update.sealed and update.error is None:
                self._check(update, _CHECK_SECONDS)

    def _seal_and_keep(
        self,
        id: str,
        digests: Sequence[str],
        hold: float = 0.0,
        linger: float = 0.0,
        client: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """`seal`, as a call that starts work. With `client`, an adapter is committed too if it is sealed by then, as it
        can be where this rank is the only one: `committed` is what `commit` gives."""
        found = self._polled(self.seal)(id, hold, linger, digests=digests)
        try:
            ready = client is not None and found["state"] == "sealed" and found["kind"] == "adapter"
            return {**found, "committed": self.commit(id, client) if ready else None}
        except WeightwireError as error:
            raise error.at(phase="commit") from error

    def commit(self, id: str, client: dict[str, Any] | None = None) -> dict[str, Any]:
        """Make a sealed update live, and give this rank's part of the receipt. A failure in here poisons this rank,
        unless it was a delta that could be undone.
        `client`, for an adapter: the arguments of `adapters`, whose answer then is part of it."""
        with self._lock:
            update = self._held(id)
            if not update.sealed:
                raise StateError("this update is not sealed", next_step="Seal it first.")
            if self._poisoned and (update.manifest.partial or update.delta):
                raise PoisonedError(
                    f"poisoned since this update was begun ({self._poisoned}), and it cannot heal that",
                    next_step="Publish a complete update.",
                )
            if client is not None:
                _check_client(**client)
            update.cancelled.set()  # the lease no longer counts
            started = time.perf_counter()
            try:
                update.staging.commit()
            except BaseException as error:
                raise self._failed(update, error) from error
            update.committed = time.perf_counter()
            self._undo = (id, update.delta, self._version) if update.delta else None
            if update.revision is None:
                self._version = update.manifest.version
                self._poisoned = None
            else:
                self._revisions.commit(update.revision)
                self._last = (id, update.revision)
            self._update = None
            self._remember(id, "it was committed")
            self._proofs = (id, self._submit(lambda: self._prove(update)))
            staged, names = update.staging, [spec.name for spec in update.manifest.tensors]
            encoded = [digest.hex() for digest in staged.after] if isinstance(staged, Encoded) else None
            return {
                "adapters": self._listed(**client) if client is not None else None,
                "proof": self._proofs[1].result(_PROOF_SECONDS) if update.adapter else None,
                "version": update.manifest.version,
                "kind": update.manifest.kind,
                "stood": time.perf_counter() - update.began if update.manifest.staging == "none" else 0.0,
                "transport": (update.address or "http:").partition(":")[0],
                "tensors": len(update.manifest.tensors),
                "nbytes": update.manifest.nbytes,
                "seconds": {**update.seconds, "commit": update.committed - started},
                "digests": dict(zip(names, encoded or update.known.hexes(), strict=True)),
                "adapter": update.revision and update.revision.label,
            }

    def _failed(self, update: _Update, error: BaseException) -> WeightwireError:
        if update.revision is not None:
            self._end(update, "its commit failed")
            return EngineError(f"{update.revision.label} could not be kept on rank {self._rank}: {error!r}")
        if update.delta is not None and self._undone(update.delta):
            self._end(update, "its commit failed, and was undone")
            self._intact = update.id
            return EngineError(
                f"the commit failed on rank {self._rank}, which has its old weights back: {error!r}",
                next_step="Publish again.",
            )
        self.poison(f"commit of version {update.manifest.version} failed: {error!r}")
        self._end(update, "its commit failed")
        return PoisonedError(
            f"the commit failed on rank {self._rank}: {error!r}",
            next_step="The engine refuses to generate. Publish a complete update to heal it.",
        )

    def _undone(self, delta: DeltaStaging) -> bool:
        try:
            delta.undo()
        except Exception:
            logger.exception("weightwire: a delta could not be undone")
            return False
        return True

    def take_back(self, id: str, reason: str) -> None:
        """The commit of this update failed on some rank. Here it is undone, where it is a delta's, or was not reached;
        else this rank is poisoned."""
        if self._proofs is not None and self._proofs[0] == id:
            wait([self._proofs[1]])  # it reads what is about to change
        with self._lock:
            if self._undo is not None and self._undo[0] == id:
                _, delta, version = self._undo
                if not self._poisoned and self._undone(delta):
                    self._version = version
                    self._remember(id, reason)
                    self._forget()
                    return
            elif self._intact == id or (self._update is not None and self._update.id == id and self._update.delta):
                return
            self.poison(reason)

    def _forget(self) -> None:
        if self._undo is not None:
            self._undo[1].discard()
            self._undo = None

    def proof(self, id: str, linger: float = 0.0) -> dict[str, Any] | None:
        """`proven`: how each live parameter was, of an adapter each module that it is bound to; `held`, of an adapter;
        and `late`, by how many seconds it was live after `commit` had returned. None while that is still being found
        out, which is said up to `linger` seconds later."""
        if self._proofs is None or self._proofs[0] != id:
            raise UpdateNotFound(f"update {id} is not the last one committed")
        job = self._proofs[1]
        wait([job], timeout=min(linger, _MAX_LINGER))
        return job.result() if job.done() else None

    def abort(self, id: str, reason: str = "it was aborted") -> str | None:
        """Forget an update; aborting one that is no more is no error. An adapter's is undone if it was the last to be
        committed, as when another rank or engine failed to: "reverted". "stopped", if the engine stands still for it
        (`staging="none"`) and somebody must let it go on, or refuse."""
        with self._lock:
            if self._update is not None and self._update.id == id:
                stopped = self._update.manifest.staging == "none"
                self._end(self._update, reason)
                return "stopped" if stopped else None
            if self._last is not None and self._last[0] == id:
                self._remember(id, reason)
                return "reverted" if self._revisions.revert(self._last[1]) else None
            return None

    # -- adapters --------------------------------------------------------------------------------------------------

    def adapters(self, client: int = 0, clients: int = 1, in_use: Sequence[int] = ()) -> list[Revision]:
        """Name, version and id of each revision that new requests can have, the newest of each name last. Takes what
        this client has in use (`Revisions.report`), and frees what nobody has."""
        with self._lock:
            listed = self._listed(client, clients, in_use)
            self._drop()
            return listed

    def _listed(self, client: int = 0, clients: int = 1, in_use: Sequence[int] = ()) -> list[Revision]:
        _check_client(client, clients, in_use)
        self._revisions.report(client, clients, in_use)
        self._dropped += self._revisions.free()
        return self._revisions.listed()

    def unload(self, name: str) -> None:
        """Serve an adapter no more; requests in flight finish."""
        with self._lock:
            self._revisions.unload(name)

    def _drop(self) -> None:
        while self._dropped:
            self._target.drop(self._dropped.pop())

    def poison(self, reason: str) -> None:
        """Refuse to generate until a complete update has been committed."""
        with self._lock:
            self._poisoned = self._poisoned or reason
            logger.error("weightwire: poisoned: %s", reason)

    def record(self, id: str, receipt: dict[str, Any]) -> None:
        """Keep the receipt of the last update, for `status`: it is over on every rank."""
        with self._lock:
            if self._proofs is not None and self._proofs[0] == id:
                self._receipt = receipt
                self._forget()

    def try_offers(self, offers: Sequence[str]) -> dict[str, str | None]:
        """For each transport offered, None if this rank can use it, else why not."""
        return {offer: self._probe(offer) for offer in offers}

    def status(self) -> dict[str, Any]:
        with self._lock:
            self._expire()
            update = self._update
            return {
                "version": self._version,
                "state": self.state,
                "poisoned": self._poisoned,
                "update": update
                and {
                    "id": update.id,
                    "version": update.manifest.version,
                    "holder": update.holder,
                    "until": update.expires,
                    "received": len(update.received),
                    "buckets": len(update.buckets),
                },
                "adapters": self._revisions.status(),
                "spent": self._revisions.spent(),
                "adapter_dtype": self._target.adapter_dtype,
                "gpu": self._gpu,
                "receipt": self._receipt,
            }

    @property
    def state(self) -> str:
        if self._update is not None:
            return "sealed" if self._update.sealed else "staging"
        return "poisoned" if self._poisoned else "idle"

    def handle(self, op: str, arguments: bytes, body: bytes | None = None) -> bytes:
        """A call from `encode_call`, answered for `decode_reply`. Nothing it is given makes it raise."""
        try:
            call = self._ops.get(op)
            if call is None:
                raise StateError(f"unknown operation {op!r}", next_step="Install the same weightwire on both sides.")
            values = msgspec.msgpack.decode(arguments, type=dict[str, Any])
            self._drop()  # this is the engine's own thread, where a lease's end is not
            with collecting_later(), taking_turns():
                reply = {"ok": call(**values) if body is None else call(**values, body=body)}
        except WeightwireError as error:
            reply = {"error": error.to_wire()}
        except Exception as error:
            logger.exception("weightwire: %s failed", op)
            reply = {"error": EngineError(f"{op} failed on rank {self._rank}: {error!r}").to_wire()}
        return msgspec.msgpack.encode(reply)

    def close(self) -> None:
        """Abort what is held and end the thread."""
        with self._lock:
            if self._update is not None:
                self._end(self._update, "the engine was closed")
            self._closed = True
            self._followed.set()
        if self._pool is not None:
            # What waits there sees that its update is over, and lets go of its memory.
            self._pool.shutdown(wait=True)

    # -- what runs on the receiver's own thread --------------------------------------------------------------------

    def _fetch_all(self, update: _Update, address: str) -> None:
        staging = cast(HasPlaces, update.staging)  # asked only where it is one

        def places(bucket: Bucket) -> Sequence[torch.Tensor | None]:
            self._poison_what_is_overwritten(update)
            return staging.places(bucket)

        arrivals = update.arrivals
        if isinstance(update.staging, HasPlaces):
            arrivals = replace(arrivals, places=places)
        # What holds the trainer's memory is not to outlast this.
        ahead, update.ahead = update.ahead, None
        opened = ahead.result() if ahead else self._open_and_scan(address, arrivals, update.manifest)
        if opened.lent is not None:
            self._take_lent(update, arrivals, opened.lent, opened.scans)
            return
        self._take_all(update, self._fetch(address, arrivals))

    def _open_and_scan(self, address: str, arrivals: Arrivals, manifest: Manifest) -> _Opened:
        with taking_turns():
            lent = None if arrivals.cancelled.is_set() else self._open(address, arrivals)
            stays = lent is not None and lent.here and manifest.staging != "none"
            return _Opened(lent, _scan_lent(lent.tensors) if lent is not None and stays else None)

    def _take_lent(
        self, update: _Update, arrivals: Arrivals, lent: Lent, scans: Sequence[Scan | Pending] | None
    ) -> None:
        if (not lent.here or update.manifest.staging == "none") and self._copies(update):
            self._take_all(update, pull(lent.flat, update.buckets, arrivals.landing()))
            return
        # From here, also where the trainer's GPU is another one.
        scans = _scan_lent(lent.tensors) if scans is None else scans
        for number, data in enumerate(lent.tensors):
            update.staging.lend(number, data)
        self._arrived(update, range(len(update.buckets)), scans)

    def _copies(self, update: _Update) -> bool:
        room = self._target.room() - room_for(update.buckets)
        return isinstance(update.staging, TakesBuckets) and update.staging.copy_all(room)

    def _take_all(self, update: _Update, arriving: Iterable[Arrived]) -> None:
        """Take what stays where it is by many buckets at a time: a launch for each keeps the interpreter from the
        engine for longer than it saves."""
        held: list[Arrived] = []
        nbytes, since, most = 0, time.monotonic(), min(_TOGETHER_SECONDS, update.lease / 4)
        try:
            for index, data in arriving:
                if update.cancelled.is_set():
                    return
                held.append((index, data))
                nbytes += update.buckets[index].nbytes
                stays = isinstance(data, Landed) and data.stays
                # By bytes, so that mostly the same are taken together as at the last update, and are known then.
                if not stays or nbytes >= _TOGETHER_BYTES or time.monotonic() - since > most:
                    self._take(update, held)
                    held, nbytes, since = [], 0, time.monotonic()
            self._take(update, held)
        finally:
            # At once: what is still on its way must not come to memory that others have by then. An error that is kept
            # would keep this frame, and with it what it fetches by.
            if isinstance(arriving, Generator):
                arriving.close()

    def _take(self, update: _Update, arrived: Sequence[Arrived]) -> None:
        new = [(update.buckets[index], data) for index, data in arrived if index not in update.received]
        if not new:
            return
        self._poison_what_is_overwritten(update)
        for pieces, scans in _written(update, new):
            for piece, scanned in zip(pieces, scans, strict=True):
                before = update.scans[piece.tensor]
                update.scans[piece.tensor] = scanned if before is _NOTHING else scanned + before
        self._arrived(update, [bucket.index for bucket, _ in new], update.scans)

    def _poison_what_is_overwritten(self, update: _Update) -> None:
        if update.manifest.staging != "none" or update.overwrites:
            return
        with self._lock:
            # One that was aborted meanwhile has let the engine go on.
            if update.cancelled.is_set():
                raise TransportError("the update was aborted before anything was written")
            # Until its commit there is no version that this rank holds.
            update.overwrites = True
            self.poison(f"version {update.manifest.version} is being written over the one that was served")

    def _arrived(self, update: _Update, buckets: Iterable[int], scans: Sequence[Scan | Pending]) -> None:
        complete = len(update.received.union(buckets)) == len(update.buckets)
        known = settle(scans) if complete else update.known
        with self._lock:
            update.received.update(buckets)
            update.expires = self._clock() + update.lease
            update.known = known

    def _verify(self, update: _Update, digests: Sequence[str]) -> None:
        if update.error is not None:
            raise update.error
        if len(update.received) < len(update.buckets):
            raise _not_arrived(update)
        _refuse_other_digests(update, digests, self._rank)
        if update.manifest.finite:
            _refuse_nonfinite(update)

    def _make_ready(self, update: _Update, digests: Sequence[str] | None) -> None:
        if digests is not None:
            self._verify(update, digests)
        update.staging.seal(update.known)
        with self._lock:
            update.ready = True

    def _check(self, update: _Update, seconds: float) -> None:
        # Asked before: what is made ready while the check runs may not have been in it.
        ready = update.ready
        with _noting_errors(update, self._rank, "seal"):
            started = time.perf_counter()
            nothing_left = update.staging.check(seconds)
            update.seconds["seal"] += time.perf_counter() - started
            update.sealed = ready and nothing_left

    def _prove(self, update: _Update) -> dict[str, Any]:
        try:
            late = 0.0
            if isinstance(update.staging, Queues) and update.staging.finish():
                late = time.perf_counter() - update.committed
            held = update.adapter and update.adapter.held()
            proven = update.staging.proof()
            return {"proven": proven, "held": held, "computed": [*computed_by(update.staging)], "late": late}
        except WeightwireError as error:
            self.poison(str(error))
            raise
        except Exception as error:
            self.poison(f"version {update.manifest.version} could not be verified after its commit: {error!r}")
            raise
        finally:
            if update.delta is None:  # which can still be undone
                update.staging.discard()

    def _start(self, update: _Update, phase: str, work: Callable[[], None]) -> Future[None]:
        update.expires = self._clock() + update.lease

        def run() -> None:
            if update.cancelled.is_set() or update.error is not None:
                return
            # To fetch may take minutes, in which the engine's own garbage would stay.
            hurry = collecting_later() if phase == "seal" else contextlib.nullcontext()
            with _noting_errors(update, self._rank, phase), taking_turns(), hurry:
                started = time.perf_counter()
                work()
                update.seconds[phase] += time.perf_counter() - started

        update.jobs = [job for job in update.jobs if not job.done()]
        update.jobs.append(self._submit(run))
        return update.jobs[-1]

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        if self._pool is not None:
            return self._pool.submit(work)
        done: Future[T] = Future()
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)
        return done

    # -- leases ----------------------------------------------------------------------------------------------------

    def _watch(self, update: _Update) -> None:
        while not update.cancelled.wait(max(update.expires - self._clock(), 0.01)):
            with self._lock:
                self._expire()
        # A trainer that is as silent after its commit may be gone as well, and what it left here with it.
        if not update.followed.wait(update.lease):
            with self._lock:
                if self._update is None and not self._closed:
                    self._submit(lambda: self._sweep(update.id))

    def _expire(self) -> None:
        update = self._update
        if update is not None and not update.cancelled.is_set() and self._clock() >= update.expires:
            self._end(update, f"its lease ended: nothing was heard of {update.holder} for {update.lease:g} s")

    def _held(self, id: str) -> _Update:
        self._expire()
        if self._update is None or self._update.id != id:
            raise UpdateNotFound(
                f"no update {id}: {self._ended.get(id, 'it was never begun here')}", next_step="Begin a new update."
            )
        return self._update

    def _staging(self, id: str) -> _Update:
        update = self._held(id)
        if update.error is not None:
            raise update.error
        if update.sealed:
            raise StateError("this update is sealed", next_step="Commit or abort it.")
        return update

    def _end(self, update: _Update, reason: str) -> None:
        update.cancelled.set()
        update.followed.set()
        self._update = update.ahead = None
        self._remember(update.id, reason)
        if update.revision is not None:
            self._dropped.append(update.revision)
        # Behind whatever the thread is doing, so that memory is not taken from under it.
        self._submit(update.staging.discard)
        self._submit(lambda: self._sweep(update.id))

    def _remember(self, id: str, reason: str) -> None:
        self._ended[id] = reason
        while len(self._ended) > 64:
            del self._ended[next(iter(self._ended))]


def _check_client(client: int = 0, clients: int = 1, in_use: Sequence[int] = ()) -> None:
    if not 0 <= client < clients <= _MAX_CLIENTS:
        raise StateError(f"client {client} of {clients}")


def _scan_lent(tensors: Sequence[torch.Tensor]) -> Sequence[Scan | Pending]:
    device = torch.device("cuda", torch.cuda.current_device()) if tensors[0].is_cuda else None
    return scan_tensors_any(tensors, device)


def _written(
    update: _Update, arrived: Sequence[tuple[Bucket, torch.Tensor | Landed]]
) -> Iterator[tuple[Sequence[Piece], Sequence[Scan | Pending]]]:
    """Have what buckets hold staged; pieces, and a scan of each."""
    apart: list[tuple[Piece, torch.Tensor]] = []
    for bucket, data in arrived:
        if isinstance(data, torch.Tensor):
            yield bucket.pieces, _write(update, bucket, data)
        elif data.whole is not None:
            yield bucket.pieces, _write(update, bucket, data.whole)
        else:
            cast(HasPlaces, update.staging).write_parts(bucket, data.parts)  # none but such has parts lie apart
            apart += zip(bucket.pieces, data.parts, strict=True)
    if apart:
        yield [piece for piece, _ in apart], scan_pieces_any([(part, piece.start) for piece, part in apart])


def _write(update: _Update, bucket: Bucket, data: torch.Tensor) -> Sequence[Scan | Pending]:
    """Have what a bucket holds staged; a scan of each piece."""
    pieces = bucket.pieces
    found: list[Scan | None] = [None] * len(pieces)
    if isinstance(update.staging, TakesBuckets):
        found = [*(update.staging.write_bucket(bucket, data) or found)]
    else:
        found = [update.staging.write(piece.tensor, piece.start, piece.within(data)) for piece in pieces]
    left = [(p.offset, p.count, p.start, p.dtype) for p, scan in zip(pieces, found, strict=True) if scan is None]
    scans: Iterator[Scan | Pending] = iter(scan_runs_any(data, left))
    return [next(scans) if scanned is None else scanned for scanned in found]


@contextlib.contextmanager
def _noting_errors(update: _Update, rank: int, phase: str) -> Iterator[None]:
    """What ends an update's work is kept, and raised by the next call that asks after it."""
    try:
        yield
    except WeightwireError as error:
        update.error = error.at(phase=phase)
    except (MemoryError, torch.OutOfMemoryError):
        update.error = RoomError("the engine ran out of memory while staging", phase=phase)
    except Exception as error:
        logger.exception("weightwire: update %s", update.id)
        update.error = EngineError(f"rank {rank} failed while staging: {error!r}", phase=phase)


def _not_arrived(update: _Update) -> StateError:
    return StateError(
        f"{len(update.buckets) - len(update.received)} of {len(update.buckets)} buckets have not arrived",
        next_step="Stage every bucket before sealing.",
    )


def _refuse_other_digests(update: _Update, digests: Sequence[str], rank: int) -> None:
    specs, found = update.manifest.tensors, update.known.hexes()
    # Of hundreds, almost always all are equal.
    if found != [*digests]:
        wrong = [spec.name for spec, here, sent in zip(specs, found, digests, strict=True) if here != sent]
        raise VerificationError(
            f"{len(wrong)} of {len(specs)} tensors arrived with another digest on rank {rank}: {_some(wrong)}",
            next_step=_with_what_changed(update, "Publish again; if it repeats, try another transport."),
        )


def _refuse_nonfinite(update: _Update) -> None:
    counts, specs = update.known.nonfinite, update.manifest.tensors
    bad = [f"{specs[n].name} ({counts[n]} of {specs[n].numel})" for n in np.flatnonzero(counts).tolist()]
    if bad:
        raise NonFinite(
            f"NaN or Inf in {_some(bad)}",
            next_step=_with_what_changed(update, "Look at the training step, or publish with finite=False."),
        )


def _with_what_changed(update: _Update, next_step: str) -> str:
    return f"{'Live weights were written over' if update.overwrites else 'Nothing was changed'}. {next_step}"


def encode_call(**arguments: Any) -> bytes:
    """Arguments of one receiver call as msgpack."""
    return msgspec.msgpack.encode(arguments)


def decode_reply(reply: bytes) -> Any:
    """What the receiver's call returned, or the error it raised, raised again."""
    answer: Mapping[str, Any] = msgspec.msgpack.decode(reply)
    if "error" in answer:
        raise WeightwireError.from_wire(answer["error"])
    return answer["ok"]


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _utc(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))
