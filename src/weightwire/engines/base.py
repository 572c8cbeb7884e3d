"""The two ports: `Engine`, which a publisher drives, and `Target`, which a worker implements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import msgspec

from weightwire.target import Staging, Target
from weightwire.updates.manifest import Manifest
from weightwire.updates.receipt import EngineReceipt

__all__ = ["Begun", "Engine", "EngineStatus", "KeepCache", "Pause", "Staging", "Target"]

Pause = Literal["keep", "wait", "abort"]
"""What happens to requests in flight: they go on under the new weights, are waited for, or are aborted."""

KeepCache = bool | Literal["running"]
"""Whose cached keys and values of the old weights are kept: nobody's (False), so that requests in flight compute theirs
again; those of requests in flight, for themselves alone ("running"); or all, for anybody (True)."""


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine says of itself. `version` is None until a first update; `offers` answers each transport offered
    (None: it can be used; else why not); `update` is who holds the engine, and until when. `spent` is the newest
    version that each adapter's name ever had here: later ones must be higher, also after it was unloaded.
    `adapter_dtype`: what it casts adapters to (None: nothing). `gpus`: the UUID of each rank's (None: a CPU).
    `one_server`: whether one process takes all calls, so that a commit that is asked for while the update is being
    begun waits for that."""

    engine: str
    model: str
    ranks: int
    version: int | None
    state: Literal["idle", "staging", "sealed", "poisoned"]
    poisoned: str | None = None
    update: dict[str, Any] | None = None
    offers: dict[str, str | None] = {}
    adapters: list[dict[str, Any]] = []
    spent: dict[str, int] = {}
    adapter_dtype: str | None = None
    gpus: tuple[str | None, ...] = ()
    one_server: bool = False
    receipt: EngineReceipt | None = None

    def serves(self, adapter: str | None) -> int | None:
        """The version of the whole model, or the newest of an adapter; None if there is none."""
        if adapter is None:
            return self.version
        return next((int(each["version"]) for each in self.adapters if each["name"] == adapter), None)

    def next_version(self, adapter: str) -> int:
        """One more than this adapter ever had here; 1 for a new one."""
        return self.spent.get(adapter, 0) + 1


class Begun(msgspec.Struct, frozen=True, kw_only=True):
    """An update that an engine has accepted: its id there, and how many ranks will fetch buckets."""

    id: str
    ranks: int


class Engine(Protocol):
    """A running engine. Every call ends by `timeout` seconds, with a `WeightwireError` that names the engine."""

    name: str
    host: str
    """Where it runs: a host name or address, empty for this machine."""
    over_http: bool
    """Whether it is spoken to over HTTP, so that buckets can travel that way too."""

    def status(self, offers: Sequence[str] = (), *, timeout: float = 30.0) -> EngineStatus:
        """The engine's state. `offers` are addresses of transports to be tried (`transports.resolve`)."""

    def begin(
        self,
        manifest: Manifest,
        *,
        holder: str,
        lease: float,
        address: str | None = None,
        id: str | None = None,
        timeout: float,
    ) -> Begun:
        """Check a manifest on every rank and take the engine for this update. With an `address`, every rank goes on to
        fetch from it at once, as `stage` would have it do. `id`: 32 hexadecimal digits, new, or the engine makes one.
        """

    def stage(self, id: str, address: str, *, timeout: float) -> None:
        """Have every rank fetch every bucket from `address`, if it does not do so yet; returns when all have."""

    def put(self, id: str, index: int, body: memoryview, *, timeout: float) -> None:
        """Hand one bucket's bytes to every rank."""

    def seal(self, id: str, digests: Sequence[str], *, timeout: float) -> None:
        """Verify on every rank what has arrived, or once what is being fetched has, and make ready to commit."""

    def commit(
        self, id: str, *, digests: Sequence[str] | None = None, pause: Pause, keep_cache: KeepCache, timeout: float
    ) -> EngineReceipt:
        """Make it live on every rank, between two model steps. With `digests`, `seal` it first: of one engine alone,
        for which nobody else is waited for. A failure that was in that has another phase than `commit`."""

    def abort(self, id: str, *, timeout: float) -> None:
        """Forget the update; the old version serves on."""

    def unload(self, name: str, *, timeout: float) -> None:
        """Serve a LoRA adapter no more. Raises `AdapterNotFound` when it is not loaded."""

    def check_caller(self) -> None:
        """Raise `UsageError` on a thread that the engine needs itself, where a publish would wait for ever."""

    def close(self) -> None:
        """Let go of what this handle holds; the engine itself runs on."""
