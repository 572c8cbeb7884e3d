"""The `Target` port over a vLLM worker: a staged copy in the shapes the live model loads, and its way in."""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import psutil
import torch

from weightwire.engines.vllm import layout, recording, skeleton
from weightwire.engines.vllm.adapters import AdapterStore
from weightwire.engines.vllm.computed import Ingredients, bytes_of
from weightwire.engines.vllm.copy_plan import Plan
from weightwire.engines.vllm.layout import Slot
from weightwire.engines.vllm.rebuilt import HostCopy, Keeping, Rebuilt
from weightwire.engines.vllm.spare import Spare
from weightwire.errors import EngineError, RoomError, UnsupportedError, UsageError, VersionError
from weightwire.revisions import Revision
from weightwire.target import AdapterStaging, DeltaStaging, Staging
from weightwire.updates.digest import Scan, scan_and_copy
from weightwire.updates.manifest import Manifest
from weightwire.updates.receipt import Proof, weakest

__all__ = ["VllmTarget"]

logger = logging.getLogger("vllm.weightwire.target")

_AHEAD = 1  # modules complete and not yet packed


class VllmTarget:
    """One rank's model. The twin and the slots are made at the first update; a plan is kept while manifests agree."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._twin: torch.nn.Module | None = None
        self._slots: list[Slot] = []
        self._plan: tuple[object, Plan] | None = None
        # One thread for as long as the target lives: malloc then hands each update the memory that the packings of
        # the one before gave back, where a new thread would have it from the system, page by page.
        self._packer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weightwire-pack")
        self._tables: Any = None
        self._held: Any = None
        self._lives: tuple[object, dict[str, list[torch.Tensor]]] | None = None  # where it was found, and what
        self._host: HostCopy | None = None
        self._spare = Spare()
        device = torch.device(worker.device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.adapters = AdapterStore(worker, self._enter_stream)

    def _enter_stream(self) -> None:
        """What this thread does on a GPU runs beside what the engine does there, in memory that the engine's own
        kernels, queued and not yet run, have never had."""
        if self._stream is not None:
            torch.cuda.set_device(self._stream.device)
            torch.cuda.set_stream(self._stream)

    def enter_thread(self) -> None:
        """Called once on the thread that receives."""
        device = torch.device(self._worker.device)
        self._enter_stream()
        if device.type == "cuda":
            from weightwire.engines.vllm import device as gpu

            try:
                gpu.warm_up(device)
            except Exception:
                # The update that needs them will say so again.
                logger.exception("weightwire: the kernels could not be compiled")

    def prepare(self, manifest: Manifest) -> Staging:
        self._refuse_unsupported()
        if self._twin is None:
            twin = skeleton.build(self._worker.vllm_config)
            self._slots = layout.find_slots(self._worker.get_model(), twin)
            self._twin = twin
        key = _plan_key(manifest)
        if self._plan is None or self._plan[0] != key:
            self._plan = (key, recording.record(self._twin, manifest))
        if self._worker.device.type != "cpu":
            return self._on_device(manifest, self._plan[1])
        if manifest.staging != "copy":
            raise UnsupportedError(f"staging={manifest.staging!r} is for engines on a GPU")
        slots = [slot.fresh() for slot in self._slots]
        staged = _Staged(manifest, self._plan[1], self._twin, slots, self._packer, self._spare)
        if self._host is not None:
            self._host.whole = False  # until the next commit that is kept
        if not manifest.keep:
            return staged
        if self._host is None or self._host.specs != manifest.tensors:
            self._host = HostCopy(manifest.tensors)
        return Keeping(staged, self._host)

    def _on_device(self, manifest: Manifest, plan: Plan) -> Staging:
        from weightwire.engines.vllm.device import DeviceStaging, Held, Tables  # needs Triton

        # What parameters are computed from is kept on the host, whole on each rank.
        needed = bytes_of(plan.computed, manifest.tensors)
        if needed and needed > (room := self._host_room()):
            raise RoomError(
                f"what parameters are computed from takes {needed} bytes on the host, {room} may be used",
                next_step="Free memory on the engine's machine.",
            )
        self._tables, self._held = self._tables or Tables(), self._held or Held()
        return DeviceStaging(
            manifest,
            plan,
            self._live(),
            self._worker.device,
            self._tables,
            self._held,
            twin=self._twin,
            queues=_in_one_thread(self._worker.vllm_config),
        )

    def _live(self) -> dict[str, list[torch.Tensor]]:
        # vLLM's parameters have a torch function of their own, which makes each call on one five times as long.
        with torch._C.DisableTorchFunctionSubclass():
            now = [getattr(slot.module, own) for slot in self._slots for own in slot.parameters]
            where = [(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in now]
            if self._lives is None or self._lives[0] != where:
                live: dict[str, dict[int, torch.Tensor]] = {}
                names = [name for slot in self._slots for name in slot.parameters.values()]
                for name, tensor in zip(names, now, strict=True):
                    live.setdefault(name, {})[tensor.data_ptr()] = tensor.detach()
                self._lives = (where, {name: list(tensors.values()) for name, tensors in live.items()})
        return self._lives[1]

    def prepare_delta(self, manifest: Manifest) -> DeltaStaging:
        self._refuse_unsupported()
        if self._worker.device.type != "cpu":
            return self._delta_on_device(manifest)
        host, plan, twin = self._host, self._plan, self._twin
        kept = host is not None and host.whole and host.specs == manifest.tensors
        if not kept or host is None or twin is None or plan is None or plan[0] != _plan_key(manifest):
            raise _nothing_to_start_from()
        slots = [slot.fresh() for slot in self._slots]
        return Rebuilt(
            manifest, _Staged(manifest.whole(), plan[1], twin, slots, self._packer, self._spare), slots, host
        )

    def _delta_on_device(self, manifest: Manifest) -> DeltaStaging:
        from weightwire.engines.vllm.device_delta import DeviceDelta  # needs Triton

        plan, held = self._plan, self._held
        if plan is None or held is None or plan[0] != _plan_key(manifest) or held.plan is not plan[1]:
            raise _nothing_to_start_from()
        return DeviceDelta(manifest, plan[1], self._live(), self._worker.device, held)

    @property
    def adapter_dtype(self) -> str | None:
        return self.adapters.dtype

    def prepare_adapter(self, manifest: Manifest, revision: Revision) -> AdapterStaging:
        self._refuse_replicas()
        return self.adapters.prepare(manifest, revision)

    def prepare_adapter_delta(self, manifest: Manifest, revision: Revision, base: Revision) -> AdapterStaging:
        self._refuse_replicas()
        return self.adapters.prepare_delta(manifest, revision, base)

    def drop(self, revision: Revision) -> None:
        self.adapters.drop(revision)

    def room(self) -> int:
        device = torch.device(self._worker.device)
        if device.type == "cuda":
            # What torch has and does not use can be had again. Each of torch's own questions asks for all of this.
            known = torch.cuda.memory_stats_as_nested_dict(device)
            idle: int = known["reserved_bytes"]["all"]["current"] - known["allocated_bytes"]["all"]["current"]
            room = torch.cuda.mem_get_info(device)[0] + idle
        else:
            room = self._host_room() + self._spare.nbytes
        limit = os.environ.get("WEIGHTWIRE_STAGING_LIMIT")
        if limit is None:
            return room
        if not limit.isdigit():
            raise UsageError(f"WEIGHTWIRE_STAGING_LIMIT={limit!r}", next_step="Give a number of bytes.")
        return min(room, int(limit))

    def _host_room(self) -> int:
        # Tensor-parallel ranks stage at the same time, and share the machine.
        return int(psutil.virtual_memory().available) // int(self._worker.parallel_config.tensor_parallel_size)

    def _refuse_replicas(self) -> None:
        # Of data-parallel replicas only one would be asked, of pipeline stages each has a part of the model.
        for degree in ("data_parallel_size", "pipeline_parallel_size"):
            if (size := getattr(self._worker.vllm_config.parallel_config, degree)) > 1:
                raise UnsupportedError(
                    f"{degree}={size}",
                    next_step="Run one server for each replica, without pipeline stages, and connect to the list.",
                )

    def _refuse_unsupported(self) -> None:
        self._refuse_replicas()
        config = self._worker.vllm_config
        device = torch.device(self._worker.device)
        if device.type not in ("cpu", "cuda"):
            raise UnsupportedError(f"engines on a CPU or an Nvidia GPU can be updated, this one is on {device.type}")
        if device.type == "cpu" and int(config.compilation_config.mode or 0) != 0:
            raise UnsupportedError(
                "on a CPU, compiled code keeps the kernels' old weights",
                next_step="Start the engine with --enforce-eager.",
            )


def _nothing_to_start_from() -> VersionError:
    return VersionError(
        "this worker has no copy of the weights that a delta could start from",
        next_step="Publish everything first, from a Publisher with a baseline.",
    )


def _in_one_thread(vllm_config: Any) -> bool:
    """Whether the worker answers our calls in the thread that runs model steps, and so on its stream: not so in Ray.
    Workers of several processes do, but a queued commit was not yet seen on two GPUs."""
    return bool(vllm_config.parallel_config.distributed_executor_backend == "uni")


def _plan_key(manifest: Manifest) -> object:
    return manifest.tensors, manifest.aliases, manifest.partial


def _proofs(left: deque[Slot]) -> Iterator[dict[str, Proof]]:
    """Of slots that two threads take from the same queue."""
    while True:
        try:
            slot = left.popleft()
        except IndexError:
            return
        yield slot.proof()


class _Staged:
    """The staged copy of one rank. A module is made ready, on a thread of its own, as soon as all of its parameters
    have arrived: its part of the staged copy becomes a packing while the next buckets are still on their way."""

    def __init__(
        self,
        manifest: Manifest,
        plan: Plan,
        twin: torch.nn.Module,
        slots: list[Slot],
        packer: ThreadPoolExecutor,
        spare: Spare,
    ) -> None:
        self._manifest = manifest
        self._plan = plan
        self._twin = plan.parameters
        self._ingredients = Ingredients(twin, manifest, plan.computed)
        self.computed = self._ingredients.parameters
        self._slots = [s for s in slots if any(plan.covered.get(name) for name in s.parameters.values())]
        self._staged: dict[str, torch.Tensor] = {}
        self._spare = spare
        self.takes = plan.takes_of(manifest.tensors)
        self._users = Counter(name for slot in self._slots for name in set(slot.parameters.values()))
        self.nbytes = sum(self._twin[name].nbytes for name in self._users)
        self.nbytes += sum(self._twin[s.parameters["weight"]].nbytes for s in self._slots if s.packs_beside)
        self.nbytes += self._ingredients.nbytes
        self._awaited = Counter[str](self.computed)
        self._cast = set(self.computed)  # or more than that
        for spec, copies in zip(manifest.tensors, plan.copies, strict=True):
            for copy in copies:
                self._awaited[copy.parameter] += math.prod(copy.source.shape)
                if getattr(torch, spec.dtype) != self._twin[copy.parameter].dtype:
                    self._cast.add(copy.parameter)
        self._waiting = list(self._slots)
        self._packer = packer
        self._ready: list[Future[None]] = []
        self._unasked = deque[Slot]()
        if manifest.partial:
            self._keep_what_is_not_sent()

    def write(self, tensor: int, start: int, data: torch.Tensor) -> Scan | None:
        spec, copies = self._manifest.tensors[tensor], self._plan.copies[tensor]
        made = self._ingredients.write(tensor, start, data, self._allocate)
        for copy in copies:
            if copy.parameter not in self._staged:
                self._allocate(copy.parameter)
        scanned: Scan | None = None
        if len(copies) == 1 and copies[0].is_run(spec.shape) and copies[0].parameter not in self._cast:
            staged, at = self._staged[copies[0].parameter], copies[0].offset + start
            scanned = scan_and_copy(data, start, staged.view(-1)[at : at + data.numel()])
            written = {copies[0].parameter: data.numel()}
        else:
            written = self._plan.write(spec, tensor, start, data, self._staged)
        written |= dict.fromkeys(made, 1)
        self._awaited.subtract(written)
        if not all(self._awaited[name] for name in written):
            self._make_ready_what_is_complete()
        return scanned

    def lend(self, tensor: int, data: torch.Tensor) -> None:
        self.write(tensor, 0, data.reshape(-1))

    def seal(self, scans: Sequence[Scan]) -> None:
        self._make_ready_what_is_complete()
        if self._waiting:
            raise EngineError(f"{len(self._waiting)} modules did not get all of their parameters")
        for ready in self._ready:
            ready.result()
        expected = {
            name: [(run.offset, run.numel, scans[run.tensor]) for run in runs] for name, runs in self._plan.runs.items()
        }
        for slot in self._slots:
            slot.expect(expected)

    def _make_ready_what_is_complete(self) -> None:
        complete = [s for s in self._waiting if not any(self._awaited[name] for name in s.parameters.values())]
        for slot in complete:
            self._waiting.remove(slot)
            if slot.packs or any(name not in self._plan.runs for name in slot.parameters.values()):
                self._ready.append(self._packer.submit(self._make_ready, slot))
            else:
                self._make_ready(slot)  # which takes no time
        # What is complete and not yet packed is the memory that goes beyond one staged copy: little of it at a time.
        if len(self._ready) > _AHEAD:
            wait([self._ready[-1 - _AHEAD]])

    def _make_ready(self, slot: Slot) -> None:
        names = set(slot.parameters.values())
        for name in names & self._cast if self._manifest.finite else ():
            # What arrived is checked as it arrives; what it became in the engine's dtype may not be finite.
            layout.refuse_infinite(name, self._staged[name])
        finite = self._manifest.finite and not self._manifest.partial
        slot.prepare(self._staged, finite=finite, expected=self._plan.runs.keys())
        self._unasked.append(slot)
        # A packed weight is needed no more once its last module has it, so that there is one staged copy, not two.
        for name in names:
            self._users[name] -= 1
            if not self._users[name] and name in self._staged:
                self._spare.keep(self._staged.pop(name))

    def check(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while self._unasked and time.monotonic() < end:
            self._unasked.popleft().ask()
        return not self._unasked

    def commit(self) -> None:
        for slot in self._slots:
            slot.commit()

    def proof(self) -> dict[str, Proof]:
        # One thread does not reach what memory gives, and the one that packs has nothing to do.
        left = deque(self._slots)
        others = self._packer.submit(lambda: weakest(_proofs(left)))
        try:
            own = weakest(_proofs(left))
        finally:
            wait([others])
        return weakest([own, others.result()])

    def discard(self) -> None:
        for ready in self._ready:
            ready.cancel()
        wait(self._ready)
        self._ingredients.discard()
        for name in list(self._staged):
            self._spare.keep(self._staged.pop(name))
        for slot in self._slots:
            for tensor in slot.release():
                self._spare.keep(tensor)
        self._unasked.clear()
        self._slots.clear()

    def _allocate(self, name: str) -> torch.Tensor:
        parameter = self._twin[name]
        staged = self._spare.take(parameter)
        for fill in self._plan.fills.get(name, ()):
            staged.as_strided(fill.shape, fill.strides, fill.offset).fill_(fill.value)
        self._staged[name] = staged
        return staged

    def _keep_what_is_not_sent(self) -> None:
        # A parameter may be sent in part, and a module is packed from all of its parameters.
        for slot in self._slots:
            for own, name in slot.parameters.items():
                shape = self._twin[name].shape
                if self._plan.covered.get(name, 0) < shape.numel() and name not in self._staged:
                    self._allocate(name).copy_(slot.current(own, tuple(shape)))
