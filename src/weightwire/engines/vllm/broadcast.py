"""Issue 5723's loop, and the worker interface of OpenRLHF's that it was taken from: one call for each parameter.

What arrives is held in spare memory, checked and scanned as it comes. When the last call says so (`empty_cache=True`)
or nothing is missing any more, it goes the way of every update, on all ranks in step: begin, stage, seal, commit.

A trainer calls and then waits in its broadcast. So what is to be refused is received first and refused then, and
neither side waits for the other. Only what cannot be received closes the group.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from weightwire.engines.control import Control, refuse_left_over
from weightwire.engines.vllm import ipc_handles, update_group
from weightwire.engines.vllm.places import Places, alone
from weightwire.engines.vllm.ranks import AllRanks, Ranks
from weightwire.engines.vllm.update_group import Group, Place
from weightwire.errors import (
    ManifestError,
    NonFinite,
    RoomError,
    StateError,
    TransportError,
    UnsupportedError,
    WeightwireError,
)
from weightwire.receiver import Lent
from weightwire.updates.boxes import Box
from weightwire.updates.digest import scan_any, settle
from weightwire.updates.manifest import Manifest, TensorSpec, decode_manifest, dtype_name

if TYPE_CHECKING:
    from weightwire.engines.vllm.ends import Ends

__all__ = ["SCHEME", "Broadcasts"]

logger = logging.getLogger("vllm.weightwire.broadcast")

SCHEME = "broadcast"
HOLDER = "a trainer's update_weight"
_SILENCE_SECONDS = 600.0  # after which a trainer that has sent a part of its parameters counts as gone
_LEASE = 600.0
_WORK_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class _Held:
    spec: TensorSpec
    data: torch.Tensor
    digest: str


class Broadcasts:
    """One worker's half. Every method is an RPC that all workers of the engine answer at the same time."""

    def __init__(self, worker: Any, ends: Ends) -> None:
        self._worker, self._ends = worker, ends
        self._device = torch.device(worker.device)
        self._ranks = Ranks()
        self._control = Control(AllRanks(self._ranks, ends, worker))
        self._places = Places(worker.vllm_config)
        self._group: Group | None = None
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._heard = 0.0
        self._offered: dict[str, list[_Held]] = {}

    def join(self, host: Any, port: Any, rank_offset: Any, world: Any, name: Any, backend: Any, use_ray: bool) -> None:
        """Join the trainer's group; an earlier one, and what came by it, is given up."""

        def work() -> None:
            self._leave()
            if use_ray:
                raise UnsupportedError("a group of ray.util.collective", next_step="Leave use_ray (sync_with_ray) off.")
            rank = rank_offset + self._ranks.rank if isinstance(rank_offset, int) else rank_offset
            self._group = update_group.join(Place(host, port, rank, world, name), backend, self._device)

        self._everywhere(lambda: self._ranks.together(work))

    def update_weight(self, name: Any, dtype: Any, shape: Any, last: Any) -> None:
        self._everywhere(lambda: self._take(name, dtype, shape, bool(last), self._receive))

    def update_weight_cuda_ipc(self, name: Any, dtype: Any, shape: Any, handles: Any, last: Any) -> None:
        self._everywhere(lambda: self._take(name, dtype, shape, bool(last), lambda spec: self._open(spec, handles)))

    def open(self, address: str) -> Lent:
        """What is held, for the receiver."""
        if (held := self._offered.get(address)) is None:
            raise TransportError("nothing is held under this address")
        return Lent([each.data for each in held])

    # -- one parameter ---------------------------------------------------------------------------------------------

    def _everywhere(self, work: Callable[[], Any]) -> None:
        """After an error nothing is held. It is known to all ranks, and only the last one raises it: vLLM stops reading
        answers at the first exception, and would take one left unread for the answer to its next question."""
        try:
            work()
        except Exception as error:
            self._forget()
            logger.error("weightwire: %s", error, exc_info=not isinstance(error, WeightwireError))
            if self._ranks.last:
                raise

    def _take(
        self, name: Any, dtype: Any, shape: Any, last: bool, receive: Callable[[TensorSpec], torch.Tensor]
    ) -> None:
        ranks = self._ranks.together(lambda: self._arrive(name, dtype, shape, receive))
        spec = msgspec.convert(ranks[0]["spec"], TensorSpec)
        refuse_left_over(alone(spec), [[rank["takes"]] for rank in ranks])
        if len({rank["held"] for rank in ranks}) > 1:
            raise StateError("the ranks do not hold the same parameters", next_step="Send all parameters again.")
        if last or all(rank["complete"] for rank in ranks):
            self._go_live()

    def _arrive(
        self, name: Any, dtype: Any, shape: Any, receive: Callable[[TensorSpec], torch.Tensor]
    ) -> dict[str, Any]:
        try:
            spec = _spec(name, dtype, shape)
            if spec.nbytes > (room := self._ends.target.room()):
                raise RoomError(
                    f"{name} needs {spec.nbytes} bytes, {room} may be used",
                    next_step="Lower gpu_memory_utilization: all is held until all has come. Then join again.",
                )
        except WeightwireError:
            self._leave()  # no way to receive it, and the trainer waits
            raise
        if name in self._held:
            self._forget()  # the trainer began again
        refusal: WeightwireError | None = None
        takes: list[Box] = []
        try:
            self._ends.sleep.refuse_update()
            takes = self._places.of(spec)
        except WeightwireError as error:
            refusal = error
        data = receive(spec)
        if refusal is not None:
            raise refusal
        (scanned,) = settle([scan_any(data)])
        if scanned.nonfinite:
            raise NonFinite(
                f"NaN or Inf in {name} ({scanned.nonfinite} of {spec.numel})",
                next_step="Nothing was changed. Look at the training step, and send all parameters again.",
            )
        self._hold(_Held(spec, data, scanned.digest.hex()))
        specs = [held.spec for held in self._held.values()]
        return {
            "spec": msgspec.to_builtins(spec),
            "takes": takes,
            "held": len(specs),
            "complete": not self._places.missing(specs),
        }

    def _receive(self, spec: TensorSpec) -> torch.Tensor:
        if self._group is None:
            raise StateError("this worker is in no group", next_step="Call init_process_group first, on both sides.")
        data = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=self._device)
        try:
            self._group.broadcast(data)
        except WeightwireError:
            self._leave()
            raise
        return data

    def _open(self, spec: TensorSpec, handles: Any) -> torch.Tensor:
        if self._device.type != "cuda":
            raise UnsupportedError(f"CUDA IPC, and this worker is on {self._device.type}")
        uuid = str(torch.cuda.get_device_properties(self._device).uuid)
        return ipc_handles.read(spec, ipc_handles.for_device(handles, uuid)).copy(self._device)

    # -- what is held ----------------------------------------------------------------------------------------------

    def _hold(self, held: _Held) -> None:
        with self._lock:
            first = not self._held
            self._held[held.spec.name] = held
            self._heard = time.monotonic()
            if first:
                threading.Thread(
                    target=self._watch, args=(self._held,), name="weightwire-broadcasts", daemon=True
                ).start()

    def _watch(self, held: dict[str, _Held]) -> None:
        """Let go of what a trainer that fell silent has left."""
        while True:
            with self._lock:
                left = self._heard + _SILENCE_SECONDS - time.monotonic()
                if self._held is not held:
                    return
                if left <= 0:
                    self._held = {}
                    logger.warning(
                        "weightwire: no parameter came for %g s; what had come was dropped", _SILENCE_SECONDS
                    )
                    return
            time.sleep(min(left, 5.0))

    def _forget(self) -> dict[str, _Held]:
        with self._lock:
            held, self._held = self._held, {}
            return held

    def _leave(self) -> None:
        group, self._group = self._group, None
        self._forget()
        if group is not None:
            group.close()

    # -- all of them -----------------------------------------------------------------------------------------------

    def _go_live(self) -> None:
        held = list(self._forget().values())
        served = self._ranks.together(lambda: self._ends.receiver.status()["version"])
        manifest = Manifest(
            version=1 + max((version for version in served if version is not None), default=0),
            tensors=tuple(each.spec for each in held),
            # OpenRLHF leaves out the frozen vision tower of a multimodal model, on purpose.
            staging="copy" if self._device.type == "cpu" else "lent",
            partial=bool(
                self._worker.model_config.is_multimodal_model and self._places.missing([h.spec for h in held])
            ),
        )
        digests = [each.digest for each in held]
        address = f"{SCHEME}:{secrets.token_hex(16)}"
        self._offered[address] = held
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(self._publish(manifest, address, digests))
        finally:
            self._offered.clear()
            loop.close()

    async def _publish(self, manifest: Manifest, address: str, digests: Sequence[str]) -> None:
        begun = await self._control.begin(manifest, HOLDER, _LEASE, _WORK_SECONDS)
        try:
            await self._control.stage(begun.id, address, _WORK_SECONDS)
            await self._control.seal(begun.id, digests, _WORK_SECONDS)
            await self._control.commit(begun.id, "keep", True, _WORK_SECONDS)
        except WeightwireError:
            with contextlib.suppress(WeightwireError):
                await self._control.abort(begun.id, _WORK_SECONDS)
            raise


def _spec(name: Any, dtype: Any, shape: Any) -> TensorSpec:
    """One parameter as it was announced. `dtype`: torch's, or its name, with or without `torch.`."""
    if not isinstance(shape, (list, tuple)):
        raise ManifestError(f"shape {shape!r:.80} of {name!r:.80} is not a list of numbers")
    plain = {"name": name, "dtype": dtype_name(dtype), "shape": list(shape)}
    return decode_manifest({"version": 0, "tensors": [plain], "partial": True}).tensors[0]
