"""A Transformers model in this process as an engine: everything that needs no vLLM, in one file.

Its weights are plain tensors, so an update is proven by reading all of them back. A commit falls between two calls of
the model; a `generate` in flight finishes first, whatever `pause` asks for, since its cache could not be made anew.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import psutil
import torch

from weightwire import transports
from weightwire.engines.base import KeepCache, Pause
from weightwire.engines.local import LocalEngine, in_thread
from weightwire.engines.staged_delta import StagedDelta, refuse_split_ties
from weightwire.engines.transformers_adapters import ModuleAdapters
from weightwire.errors import (
    AdapterNotFound,
    EngineLost,
    MissingTensor,
    NonFinite,
    PoisonedError,
    ShapeMismatch,
    UnknownTensor,
    UsageError,
    VerificationError,
)
from weightwire.receiver import Receiver
from weightwire.revisions import Revision
from weightwire.target import AdapterStaging
from weightwire.transports.cuda_driver import gpu_of
from weightwire.updates.digest import Scan, scan
from weightwire.updates.manifest import Manifest
from weightwire.updates.receipt import Proof

__all__ = ["ModuleTarget", "TransformersEngine"]


class ModuleTarget:
    """The `Target` port for a module whose state is plain CPU or GPU tensors under checkpoint names."""

    adapter_dtype = None

    def __init__(self, adapters: ModuleAdapters) -> None:
        self._adapters = adapters

    def prepare(self, manifest: Manifest) -> _Staged:
        return _Staged(manifest, check(manifest, self._adapters.state()))

    def prepare_delta(self, manifest: Manifest) -> StagedDelta:
        return StagedDelta(manifest, check(manifest, self._adapters.state()))

    def prepare_adapter(self, manifest: Manifest, revision: Revision) -> AdapterStaging:
        return self._adapters.prepare(manifest, revision)

    def prepare_adapter_delta(self, manifest: Manifest, revision: Revision, base: Revision) -> AdapterStaging:
        return self._adapters.prepare_delta(manifest, revision, base)

    def drop(self, revision: Revision) -> None:
        self._adapters.drop(revision)

    def room(self) -> int:
        return int(psutil.virtual_memory().available)


def check(manifest: Manifest, live: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The live tensors, by name, that take each tensor of a manifest: one, and each alias that is kept apart here.

    Raises when one is unknown, missing, or of a shape or dtype that does not fit; floating-point ones are cast.
    """
    unknown = [spec.name for spec in manifest.tensors if spec.name not in live]
    if unknown:
        raise UnknownTensor(
            f"the model has no {', '.join(unknown[:5])} ({len(unknown)} unknown names)",
            next_step="Publish a model of the same architecture.",
        )
    places = {spec.name: {spec.name: live[spec.name]} for spec in manifest.tensors}
    for alias, name in manifest.aliases.items():
        if alias in live and live[alias].data_ptr() != live[name].data_ptr():
            places[name][alias] = live[alias]
    for spec in manifest.tensors:
        for name, tensor in places[spec.name].items():
            if tuple(tensor.shape) != spec.shape or not _castable(getattr(torch, spec.dtype), tensor.dtype):
                here = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
                raise ShapeMismatch(f"{name} is {here} here, {spec.dtype} {spec.shape} was announced")
    reached = {tensor.data_ptr() for taking in places.values() for tensor in taking.values()}
    missing = [name for name, tensor in live.items() if tensor.numel() and tensor.data_ptr() not in reached]
    if missing and not manifest.partial:
        raise MissingTensor(
            f"nothing was sent for {', '.join(missing[:5])} ({len(missing)} parameters)",
            next_step="Send every parameter, or publish with partial=True.",
        )
    return list(places.values())


def _castable(announced: torch.dtype, live: torch.dtype) -> bool:
    return announced == live or (announced.is_floating_point and live.is_floating_point)


class _Staged:
    takes = None

    def __init__(self, manifest: Manifest, places: list[dict[str, torch.Tensor]]) -> None:
        self._places = places
        self._live = {name: tensor for taking in places for name, tensor in taking.items()}
        self._finite = manifest.finite
        self._staged: dict[str, torch.Tensor] = {}
        self._scans: dict[str, Scan] = {}
        self.nbytes = sum(tensor.nbytes for tensor in self._live.values())

    def write(self, tensor: int, start: int, data: torch.Tensor) -> None:
        for name, live in self._places[tensor].items():
            if name not in self._staged:
                self._staged[name] = torch.empty(live.shape, dtype=live.dtype)
            self._staged[name].view(-1)[start : start + data.numel()].copy_(data)

    def lend(self, tensor: int, data: torch.Tensor) -> None:
        self.write(tensor, 0, data.reshape(-1))

    def seal(self, scans: Sequence[Scan]) -> None:
        self._scans = {name: scan(tensor) for name, tensor in self._staged.items()}
        bad = [name for name, scanned in self._scans.items() if scanned.nonfinite]
        if bad and self._finite:
            raise NonFinite(
                f"{', '.join(bad[:5])} overflowed in the cast to the engine's dtype",
                next_step="Nothing was changed. Publish in that dtype, or with finite=False.",
            )
        refuse_split_ties((_place(self._live[name]), name, scanned) for name, scanned in self._scans.items())

    def check(self, seconds: float) -> bool:
        return True

    def commit(self) -> None:
        with torch.no_grad():
            for name, staged in self._staged.items():
                self._live[name].copy_(staged)

    def proof(self) -> dict[str, Proof]:
        for name, scanned in self._scans.items():
            if scan(self._live[name].detach().cpu()) != scanned:
                raise VerificationError(f"{name} was read back from the live model and is not what was sent")
        return dict.fromkeys(self._live, "read back")

    def discard(self) -> None:
        self._staged.clear()


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


class _Host:
    """The `Host` port for one module: one rank, its receiver, and a lock around each use of the model."""

    def __init__(self, name: str, module: torch.nn.Module, lock: threading.RLock) -> None:
        self.name = name
        self.model = type(module).__name__
        self.alone = True
        self.idle = self.in_order = False  # its receiver is asked from a thread, beside the model
        self.adapters = ModuleAdapters(module, lock)
        target = ModuleTarget(self.adapters)
        self.receiver = Receiver(
            target,
            transports.fetch,
            open=transports.open_lent,
            probe=transports.probe,
            sweep=transports.sweep,
            gpu=gpu_of(next((p.device for p in module.parameters()), torch.device("cpu"))),
        )
        self.names: dict[str, Revision] = {}
        self.refusal: str | None = None
        self._lock = lock
        self._release = threading.Event()

    async def call(self, op: str, arguments: bytes, body: bytes | None, timeout: float) -> list[bytes]:
        return [await in_thread(lambda: self.receiver.handle(op, arguments, body))]

    async def before_pause(self) -> None:
        pass

    async def pause(self, mode: Pause, keep_cache: KeepCache) -> None:
        # A lock belongs to the thread that takes it; this one holds it until `resume`.
        taken, release = threading.Event(), threading.Event()

        def hold() -> None:
            with self._lock:
                taken.set()
                release.wait()

        self._release = release
        threading.Thread(target=hold, name="weightwire-pause", daemon=True).start()
        try:
            while not await in_thread(lambda: taken.wait(0.05)):
                pass
        except BaseException:
            release.set()
            raise

    async def resume(self) -> None:
        self.refusal = None
        self._release.set()

    async def refuse(self, reason: str) -> None:
        self.refusal = reason
        self._release.set()

    async def label(self, version: int) -> None:
        pass

    async def in_use(self) -> dict[str, Any]:
        # What is listed here needs no mention: a name is looked up with the lock held, under which revisions go.
        return {"in_use": self.adapters.in_use()}

    async def list(self, revisions: Sequence[Revision]) -> None:
        self.names = {name: revision for revision in revisions for name in (revision.name, revision.label)}


class TransformersEngine(LocalEngine):
    """A model from Transformers (or any module that generates) in this process.

    While the engine is connected, the model's own `generate` and forward pass wait for a commit under way, and raise
    `PoisonedError` after one that failed. `close()` takes that away again, and every adapter.
    """

    def __init__(self, model: torch.nn.Module, *, name: str | None = None) -> None:
        self.model = model
        self._lock = threading.RLock()
        self._host = _Host(name or f"transformers:{type(model).__name__}@{id(model):x}", model, self._lock)
        super().__init__(self._host)
        self._hooks = [
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._leave, always_call=True),
        ]
        self._generate: Callable[..., Any] | None = getattr(model, "generate", None)
        if self._generate is not None:
            model.generate = _guarded(weakref.ref(self), self._generate)  # type: ignore[assignment]

    @property
    def receiver(self) -> Receiver:
        return self._host.receiver

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._generate is not None:
            self.model.__dict__.pop("generate", None)
        self._host.receiver.close()
        self._host.adapters.clear()

    @contextlib.contextmanager
    def adapter(self, name: str) -> Iterator[str]:
        """Inside, the model computes with an adapter that was loaded: `policy` is its newest revision now, `policy@7`
        that one. Gives the revision's label (`policy@7`). Raises `AdapterNotFound`.

        Other threads wait for the model until the block ends, and so do updates; blocks may be nested.
        """
        with self._lock:
            revision = self._host.names.get(name)
            if revision is None or not self._host.adapters.holds(revision):
                raise AdapterNotFound(
                    f"no adapter {name!r} is loaded",
                    engine=self.name,
                    next_step=f"Loaded are: {', '.join(sorted(self._host.names)) or 'none'}.",
                )
            with self._host.adapters.serving(revision):
                yield revision.label

    def check_caller(self) -> None:
        super().check_caller()
        if self._host.adapters.inside == threading.get_ident():
            raise UsageError(
                "called inside `with engine.adapter(...)`, for the end of which an update waits",
                engine=self.name,
                next_step="Leave the block first.",
            )

    def _enter(self, *_: object) -> None:
        # Released in `_leave`, which torch calls also when this raises.
        self._lock.acquire()
        self.check()

    def _leave(self, *_: object) -> None:
        self._lock.release()

    def check(self) -> None:
        """Raise `PoisonedError` if this engine refuses to generate."""
        if (reason := self._host.refusal) is not None:
            raise PoisonedError(reason, engine=self.name, next_step="Publish a complete update to heal it.")


def _guarded(engine: weakref.ref[TransformersEngine], generate: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(*args: Any, **kwargs: Any) -> Any:
        owner = engine()
        if owner is None:
            raise EngineLost("the engine around this model is gone")
        with owner._lock:
            owner.check()
            return generate(*args, **kwargs)

    return guarded
