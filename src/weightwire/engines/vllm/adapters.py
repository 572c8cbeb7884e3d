"""LoRA adapters in a vLLM worker: a store of revisions in memory, and the one place where vLLM loads adapters.

vLLM knows an adapter by its path and reads it again whenever it was evicted. A path of our own scheme is answered from
the store, by the same steps as a file: PEFT's config through vLLM's helper, tensors through its model class.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from weightwire.engines.adapter_delta import AdapterDelta
from weightwire.engines.staged_adapter import StagedAdapter
from weightwire.engines.vllm.adapter_memory import AdapterMemory, SpareMemory, is_a
from weightwire.engines.vllm.adapter_template import AdapterTemplate
from weightwire.engines.vllm.compat import rename_mapper, supports
from weightwire.errors import (
    EngineError,
    ManifestError,
    NonFinite,
    ShapeMismatch,
    UnknownTensor,
    UnsupportedError,
    VerificationError,
)
from weightwire.revisions import Revision
from weightwire.updates.adapter import check_adapter
from weightwire.updates.alike import alike
from weightwire.updates.buckets import Bucket
from weightwire.updates.digest import Joined, Scan, all_finite, settle
from weightwire.updates.manifest import Manifest, dtype_name
from weightwire.updates.packing import spread
from weightwire.updates.receipt import Proof

if TYPE_CHECKING:
    from weightwire.engines.vllm.batched_copy import BatchedCopy

__all__ = ["AdapterStore", "path_of"]

logger = logging.getLogger("vllm.weightwire.adapters")

_SCHEME = "weightwire:"
_LOAD_SECONDS = 60.0
_ANSWER_SECONDS = 0.003  # in which the commit is answered: hundreds of tensors keep the interpreter from that


def path_of(revision: Revision) -> str:
    """The path by which vLLM asks for a revision.

    >>> path_of(Revision("policy", 7, 1048576))
    'weightwire:policy@7'
    """
    return f"{_SCHEME}{revision.label}"


class AdapterStore:
    """The revisions that one worker holds, by id: their tensors in host memory, in the dtype vLLM casts them to. On
    their way in, of an engine on a GPU, they are there."""

    def __init__(self, worker: Any, enter_thread: Callable[[], None] = lambda: None) -> None:
        self._worker = worker
        self._sent: dict[int, Future[tuple[dict[str, torch.Tensor], Any]]] = {}
        self._built: dict[int, Any] = {}
        self._memory: dict[int, AdapterMemory] = {}
        self.spare = SpareMemory()
        self._manager: Any = None
        self._binding: tuple[object, _Binding] | None = None
        # What an adapter needs before its first byte is made here, while the trainer reads that; and what can be done
        # beside the engine's own thread.
        self.beside = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="weightwire-adapter", initializer=enter_thread
        )
        self.loads: dict[str, int] = {}
        """How often vLLM has asked for each path."""
        if self.dtype is not None and torch.device(worker.device).type == "cpu":
            # Compiled before the engine's own thread wants it.
            self.beside.submit(Joined([torch.zeros(1)]).fill, [torch.zeros(1)])

    @property
    def dtype(self) -> str | None:
        """The dtype that vLLM casts them to; None where it takes none."""
        config = self._worker.vllm_config.lora_config
        return None if config is None else dtype_name(config.lora_dtype)

    def prepare(self, manifest: Manifest, revision: Revision) -> _Staged:
        """Check that the adapter fits this engine, and lay it out."""
        manager = self._find_manager()
        assert manifest.adapter is not None
        key = (manifest.tensors, manifest.adapter.config)
        if self._binding is None or self._binding[0] != key:
            ranks = check_adapter(manifest.tensors, manifest.adapter.config)
            binding = _Binding(manager, _peft_helper(manifest.adapter.config, max(ranks.values()), manager.lora_config))
            binding.check(manifest)
            self._binding = (key, binding)
        return _Staged(self, self._binding[1], manifest, revision)

    def prepare_delta(self, manifest: Manifest, revision: Revision, base: Revision) -> AdapterDelta:
        """The same for what has changed since `base`; what was sent of that is read once it is on the host."""
        sent = self._sent_of(base.id, base.label)
        return AdapterDelta(manifest, self.prepare(manifest.whole(), revision), base, lambda: sent()[0])

    def drop(self, revision: Revision) -> None:
        self._sent.pop(revision.id, None)
        self._built.pop(revision.id, None)
        self.loads.pop(path_of(revision), None)
        if self._manager is not None and revision.id in self._manager.list_adapters():
            self._manager.remove_adapter(revision.id)
        if (memory := self._memory.pop(revision.id, None)) is not None:
            self.spare.keep(memory)

    def enter(
        self,
        revision: Revision,
        binding: _Binding,
        built: Any,
        memory: AdapterMemory,
    ) -> tuple[dict[str, Proof], str]:
        """Have vLLM load and activate a revision, and read it back (`_Binding.fill`). `memory`: what its tensors are
        parts of."""
        from vllm.lora.request import LoRARequest

        self._built[revision.id] = built
        if memory.device.type == "cpu":  # of a GPU's, only copies on the host are left after the commit
            self._memory[revision.id] = memory
        with binding.noting() as given:
            self._manager.add_adapter(LoRARequest(revision.label, revision.id, path_of(revision)))
        slots: list[int | None] = self._manager._adapter_manager.lora_index_to_id
        return binding.fill(slots.index(revision.id), given)

    def keep(self, revision: Revision, sent: Callable[[], tuple[dict[str, torch.Tensor], Any]]) -> None:
        """Hold a revision that has entered, for when vLLM asks for it again: what was sent, and PEFT's helper of it,
        found out beside the engine's own thread."""
        self._sent[revision.id] = job = self.beside.submit(sent)
        job.add_done_callback(functools.partial(_log_failure, revision.label))

    def let_go(self) -> None:
        """Keep no memory for the next revision."""
        self.beside.submit(self.spare.clear).result(_LOAD_SECONDS)

    def _find_manager(self) -> Any:
        if self._manager is None:
            manager = getattr(self._worker.model_runner, "lora_manager", None)
            if manager is None:
                raise UnsupportedError(
                    "this engine was started without LoRA",
                    next_step="Start it with --enable-lora --max-lora-rank R (LLM: enable_lora=True, max_lora_rank=R).",
                )
            # On this one object: the loader that every request, eviction and base update comes to.
            manager._load_adapter = functools.partial(self._load, manager, manager._load_adapter)
            self._manager = manager
        return self._manager

    def _load(self, manager: Any, load_file: Callable[[Any], Any], request: Any) -> Any:
        if not request.lora_path.startswith(_SCHEME):
            return load_file(request)
        self.loads[request.lora_path] = self.loads.get(request.lora_path, 0) + 1
        built = self._built.pop(request.lora_int_id, None)
        if built is not None:
            return built
        tensors, helper = self._sent_of(request.lora_int_id, request.lora_path)()
        # vLLM scales each B in place, and what was sent may be asked for again.
        own = {name: tensor if is_a(name) else tensor.clone() for name, tensor in tensors.items()}
        return build(manager, request.lora_int_id, own, helper)

    def _sent_of(self, id: int, called: str) -> Callable[[], tuple[dict[str, torch.Tensor], Any]]:
        """Gives what was sent of a revision, and PEFT's helper of it, as soon as that is on the host."""
        job = self._sent.get(id)

        def wait() -> tuple[dict[str, torch.Tensor], Any]:
            if job is None:
                raise EngineError(f"{called} is held no more")
            try:
                return job.result(_LOAD_SECONDS)
            except Exception as error:
                raise EngineError(f"{called} did not reach this rank's host memory: {error!r}") from error

        return wait


def _log_failure(label: str, job: Future[Any]) -> None:
    if not job.cancelled() and (error := job.exception()) is not None:
        logger.error("weightwire: %s is served, and cannot be loaded again once evicted: %r", label, error)


def build(manager: Any, id: int, tensors: dict[str, torch.Tensor], helper: Any) -> Any:
    """vLLM's own model of an adapter, as from a file."""
    model = manager._adapter_manager.model
    return manager._lora_model_cls.from_lora_tensors(
        lora_model_id=id,
        tensors=tensors,
        peft_helper=helper,
        device=str(next(iter(tensors.values())).device),
        dtype=manager.lora_config.lora_dtype,
        model_vocab_size=manager.vocab_size,
        weights_mapper=rename_mapper(model),
        skip_prefixes=getattr(model, "lora_skip_prefixes", None),
    )


def _peft_helper(config: dict[str, Any], rank: int, lora_config: Any) -> Any:
    from vllm.lora.peft_helper import PEFTHelper

    if rank > lora_config.max_lora_rank:
        raise UnsupportedError(
            f"rank {rank}, and the engine takes at most {lora_config.max_lora_rank}",
            next_step=f"Start it with --max-lora-rank {rank} or more.",
        )
    if (config.get("rank_pattern") or config.get("alpha_pattern")) and not supports(PEFTHelper, "get_rank_and_scaling"):
        raise UnsupportedError("this vLLM reads rank_pattern and alpha_pattern without applying them")
    try:
        helper = PEFTHelper.from_dict(config)
        helper.validate_legal(lora_config)
    except (ValueError, TypeError) as error:
        raise UnsupportedError(f"vLLM does not take this adapter: {error}") from error
    return helper


class _Binding:
    """Which live modules an adapter's tensors go to."""

    def __init__(self, manager: Any, helper: Any) -> None:
        self.manager = manager
        self.helper = helper
        self._live: dict[str, Any] = manager._adapter_manager.modules
        # Where q, k and v are one live module, it is known by the names of its parts.
        self._parts = {
            part: (whole, index)
            for whole, parts in manager._adapter_manager.packed_modules.items()
            for index, part in enumerate(parts)
        }
        self.modules: dict[str, Any] = {}
        self._slots: dict[int, _Slot] = {}
        self.template: AdapterTemplate | None = None
        """Of vLLM's model of such an adapter, once there was one."""

    def check(self, manifest: Manifest) -> None:
        """Find the live module of each tensor, and compare the shapes. vLLM itself passes over a module that it does
        not find, and puts a smaller matrix into the corner of a larger one."""
        from vllm.lora.utils import parse_fine_tuned_lora_name

        mapper = rename_mapper(self.manager._adapter_manager.model)
        missing: list[str] = []
        for spec in manifest.tensors:
            try:
                name, is_a = parse_fine_tuned_lora_name(spec.name, mapper)
            except ValueError as error:
                raise UnknownTensor(f"vLLM does not know {spec.name!r} as part of an adapter") from error
            whole, index = self._parts.get(name, (name, 0))
            if whole not in self._live:
                missing.append(name)
                continue
            self.modules[whole] = self._live[whole]
            sizes = _sizes(self._live[whole], index)
            if sizes is not None and spec.shape[1 if is_a else 0] != sizes[0 if is_a else 1]:
                raise ShapeMismatch(
                    f"{spec.name} is {spec.shape}, and the module {name} goes from {sizes[0]} to {sizes[1]}",
                    next_step="Load an adapter of a model of the same architecture.",
                )
        if missing:
            raise UnknownTensor(
                f"the engine has no module {', '.join(sorted(set(missing))[:5])} that takes LoRA"
                f" ({len(set(missing))} of the adapter's)",
                next_step="Load an adapter of a model of the same architecture; see also --lora-target-modules.",
            )
        if not self.modules:
            raise ManifestError("the adapter binds to no module of this engine")

    @contextlib.contextmanager
    def noting(self) -> Iterator[dict[str, list[torch.Tensor | None]]]:
        """While this lasts, what vLLM sets of these modules is noted, by the module's name, for `fill` to put all of it
        into the slot at once: one by one, hundreds of small matrices take longer than their bytes."""
        plain = _plain_setters()
        given: dict[str, list[torch.Tensor | None]] = {}

        def note(name: str, module: Any, index: int, a: Any, b: Any) -> None:
            given[name] = _on_this_rank(module, a, b)

        noting = {name: module for name, module in self.modules.items() if type(module).set_lora in plain}
        for name, module in noting.items():
            module.__dict__["set_lora"] = functools.partial(note, name, module)
        try:
            yield given
        finally:
            for module in noting.values():
                module.__dict__.pop("set_lora", None)

    def _slot(self, number: int) -> _Slot:
        slot = self._slots.get(number)
        if slot is None or not slot.is_there(self.modules):
            slot = self._slots[number] = _Slot(self.modules, number)
        return slot

    def fill(self, slot: int, given: Mapping[str, Sequence[torch.Tensor | None]]) -> tuple[dict[str, Proof], str]:
        """Put into `slot` what was noted. How each live module was shown to hold what it was given, and one digest of
        what they all hold."""
        of_slot = self._slot(slot)
        proof: dict[str, Proof] = {name: "read back" if name in given else "staged" for name in of_slot.places}
        parts = [part for name in of_slot.places for part in given.get(name, ()) if part is not None]
        whole = of_slot.fits(parts)
        if whole and of_slot.joined.can_be_filled:
            same, scan = of_slot.joined.fill(parts)
        elif whole and parts[0].is_cuda and not of_slot.joined.of_copies:
            same, scan = of_slot.fill(parts)
        else:
            filled = [(places, given[name]) for name, places in of_slot.places.items() if name in given]
            _copy_into([pair for places, own in filled for pair in zip(places, own, strict=True)])
            same, scan = self._read_back(of_slot, given)
        if not same:
            unlike = (name for name, parts in given.items() if not _holds(of_slot.places[name], parts))
            wrong = next(unlike, "one of its modules")
            raise VerificationError(f"{wrong} was read back and does not hold the adapter that was sent")
        return proof, scan.digest.hex()

    def _read_back(self, of_slot: _Slot, given: Mapping[str, Sequence[torch.Tensor | None]]) -> tuple[bool, Scan]:
        """Whether the slot holds what it was given, and a scan of that, which is what it holds if it does: without what
        fills a slot up, and with what could not be compared. Of hundreds of small matrices, for which a call for each
        would cost more."""
        held: list[torch.Tensor] = []
        places: list[torch.Tensor] = []
        expected: list[torch.Tensor] = []
        for name, found in of_slot.places.items():
            parts = given.get(name)
            held += found if parts is None else [part for part in parts if part is not None]
            if parts is not None:
                places += found
                expected += [_filled_up(part, place) for part, place in zip(parts, found, strict=True)]
        whole = len(held) == len(places) == of_slot.matrices and _numel(held) == of_slot.numel
        if whole and held[0].is_cuda:
            return of_slot.is_as(expected)
        return alike(places, expected), settle([Joined(held).scan()])[0]


def _plain_setters() -> tuple[Any, ...]:
    """The ways to set a module that do no more than copy what it takes of each matrix into its slot."""
    from vllm.lora.layers import MergedColumnParallelLinearWithLoRA, ReplicatedLinearWithLoRA

    return ReplicatedLinearWithLoRA.set_lora, MergedColumnParallelLinearWithLoRA.set_lora


def _sizes(module: Any, part: int) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer over all ranks, of one part where it is made of several; None for others."""
    layer = module.base_layer
    if hasattr(layer, "total_num_kv_heads"):
        size = (getattr(layer, "v_head_size", None) if part == 2 else None) or layer.head_size
        return layer.hidden_size, size * (layer.total_num_kv_heads if part else layer.total_num_heads)
    if hasattr(layer, "output_sizes") and len(layer.output_sizes) > part:
        return layer.input_size, layer.output_sizes[part]
    return (layer.input_size, layer.output_size) if hasattr(layer, "output_size") else None


class _Staged(StagedAdapter):
    """One revision on its way in. vLLM's model of it is made beside the engine, and given to it in `check`."""

    def __init__(self, store: AdapterStore, binding: _Binding, manifest: Manifest, revision: Revision) -> None:
        dtype: torch.dtype = binding.manager.lora_config.lora_dtype
        super().__init__(manifest.tensors)
        self._dtype = dtype
        self._store = store
        self._binding = binding
        self._revision = revision
        self._finite = manifest.finite
        self._built: Any = None
        self._proof: dict[str, Proof] = {}
        self._lent: dict[int, torch.Tensor] = {}
        self._on_host = _OnHost([])
        self._loras: dict[str, Any] = {}
        where = (manifest.tensors, dtype, torch.device(binding.manager.device))
        # Each is held here, and by vLLM besides; but not where an adapter before has left the room for it.
        numel = 0 if store.spare.fits(*where) else sum(spec.numel for spec in manifest.tensors)
        self.nbytes = 2 * numel * dtype.itemsize
        stream = torch.cuda.current_stream(where[2]) if where[2].type == "cuda" else None

        def take() -> AdapterMemory:
            memory = store.spare.take(*where)
            # vLLM may have it copy into a slot still what lay there before, though nobody refers to that any more.
            memory.free_after(stream)
            return memory

        self._early = store.beside.submit(take)
        self._building: Future[Any] | None = None

    def _begin_building(self) -> Future[Any]:
        """When the first bytes are here, and not before: it is all Python, which keeps from the interpreter whoever is
        about to fetch them."""
        if self._building is None:
            self._building = self._store.beside.submit(lambda: self._build(self._early.result()))
        return self._building

    def _build(self, memory: AdapterMemory) -> Any:
        """vLLM's model of matrices that are still to be filled."""
        binding, id = self._binding, self._revision.id
        if (ready := memory.take_model(binding.template)) is not None:
            ready.id = id
            return ready
        # Of tensors of its own, so that it is seen for how long vLLM keeps them (`AdapterMemory.fits`).
        own = {name: tensor.detach() for name, tensor in memory.given.items()}
        if binding.template is not None:
            return binding.template.build(id, own)
        built = build(binding.manager, id, own, binding.helper)
        binding.template = AdapterTemplate.of(built, own)
        return built

    def write(self, tensor: int, start: int, data: torch.Tensor) -> None:
        self._put([(tensor, start, data)])

    def write_bucket(self, bucket: Bucket, data: torch.Tensor) -> Sequence[Scan] | None:
        memory = self._early.result()
        on_cpu = memory.device.type == data.device.type == "cpu"
        if on_cpu and all(piece.dtype == memory.dtype for piece in bucket.pieces):
            self._begin_building()
            return spread(bucket.pieces, data, memory.rows)
        self._put([(piece.tensor, piece.start, piece.within(data)) for piece in bucket.pieces])
        return None

    def _put(self, runs: Sequence[tuple[int, int, torch.Tensor]]) -> None:
        """Have what arrived, each from an element of its tensor on, where it belongs."""
        if runs:
            rows = self._early.result().rows
            places = [_run(rows[number], start, data.numel()) for number, start, data in runs]
            self._begin_building()
            self._copy(places, [data for _, _, data in runs])

    def _copy(self, places: list[torch.Tensor], data: list[torch.Tensor]) -> None:
        self._early.result().wait_until_free()
        torch._foreach_copy_(places, data)

    def copy_all(self, room: int) -> bool:
        return False  # it is copied anyway, and small

    def lend(self, tensor: int, data: torch.Tensor) -> None:
        self._lent[tensor] = data

    def seal(self, scans: Sequence[Scan]) -> None:
        building, memory = self._begin_building(), self._early.result()
        if self._lent:
            self._copy([memory.sent[self._specs[number].name] for number in self._lent], [*self._lent.values()])
            self._lent.clear()
        built = building.result()
        # What arrived is checked as it arrives; what it became here may not be finite.
        cast = any(getattr(torch, spec.dtype) != self._dtype for spec in self._specs)
        if self._finite and cast and not all(all_finite(flat) for flat, _ in memory.flat):
            raise NonFinite(
                f"the adapter is not finite in the engine's {self._dtype}",
                next_step="Nothing was changed. Serve it in a wider dtype: --lora-dtype.",
            )
        for flat, own in memory.flat:
            if own is not flat:
                own.copy_(flat)
        if self._binding.template is None and not _is_made_of(built, memory.given):
            built = self._build(memory)
        for name, lora in built.loras.items():
            # As vLLM does when it takes it, on the thread that generates; 0.26 would scale those of experts once more.
            if ".experts" not in name:
                lora.optimize()
        self._on_host = _OnHost([each for both in memory.flat for each in both])
        self._built = built  # last: from here on `check`, on the engine's thread, may take it

    def check(self, seconds: float) -> bool:
        if self._built is None:
            return True
        built, self._built = self._built, None
        memory = self._early.result()
        self._on_host.wait_for_device()
        self._proof, self._held = self._store.enter(self._revision, self._binding, built, memory)
        self._loras = built.loras
        return True

    def commit(self) -> None:
        # It is in its slot. Its way to the host may take longer than all before, and nobody need wait for that.
        memory, helper, spare = self._early.result(), self._binding.helper, self._store.spare
        on_host, loras, self._on_host = self._on_host, self._loras, _OnHost([])
        on_host.start()
        template, beside = self._binding.template, self._store.beside

        def move() -> tuple[dict[str, torch.Tensor], Any]:
            time.sleep(_ANSWER_SECONDS)
            on_host.wait()
            sent = {name: on_host.of(tensor) for name, tensor in memory.sent.items()}
            for lora in loras.values():  # what vLLM caches is for host memory, too
                for which in ("lora_a", "lora_b"):
                    setattr(lora, which, on_host.of_all(getattr(lora, which)))
            if memory.device.type != "cpu":
                spare.keep(memory)
                if template is not None:  # for the next, and if that fails it is made when it is needed
                    beside.submit(memory.prepare, template, lambda own: template.build(0, own))
            return sent, helper

        self._store.keep(self._revision, move)

    def proof(self) -> dict[str, Proof]:
        return self._proof

    def discard(self) -> None:
        super().discard()
        self._on_host, self._loras = _OnHost([]), {}
        self._lent.clear()
        self._built = None
        self._early.cancel()
        if self._building is not None:
            self._building.cancel()
        self._early = self._building = Future()  # whoever comes after this finds them cancelled too
        self._early.cancel()


class _OnHost:
    """Copies of tensors in pinned host memory, on their way from `start` until `wait` returns; of tensors that are in
    host memory themselves, none. `flat`: each one whole piece of memory, of which others are parts."""

    def __init__(self, flat: Sequence[torch.Tensor]) -> None:
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._there: torch.cuda.Event | None = None
        self._here: torch.cuda.Event | None = None
        if not flat or flat[0].device.type == "cpu":
            return
        self._there = torch.cuda.current_stream(flat[0].device).record_event()
        for each in flat:
            if each.untyped_storage().data_ptr() not in self._copies:
                copy = torch.empty_like(each, device="cpu", pin_memory=True)
                self._copies[each.untyped_storage().data_ptr()] = (each, copy)

    def start(self) -> None:
        """Not before the engine has read back what it holds: these few numbers would wait for all of the copies."""
        if self._there is None:
            return
        device = next(iter(self._copies.values()))[0].device
        stream = _beside(device)  # so that the next update waits for nothing
        stream.wait_event(self._there)
        with torch.cuda.stream(stream):
            for each, copy in self._copies.values():
                copy.copy_(each, non_blocking=True)
        self._here = stream.record_event()

    def wait_for_device(self) -> None:
        """Have the current stream wait for what is done to the tensors before they are copied."""
        if self._there is not None:
            torch.cuda.current_stream().wait_event(self._there)

    def wait(self) -> None:
        """Wait until the copies are complete."""
        if self._here is not None:
            self._here.synchronize()

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same part of the copy; what is part of none is copied now. Always a tensor of its own."""
        if tensor.device.type == "cpu":
            return tensor.detach()
        if (found := self._copies.get(tensor.untyped_storage().data_ptr())) is None:
            return tensor.cpu()
        return found[1].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def of_all(self, matrices: Any) -> Any:
        """Of one matrix, or of a list in which some may be None."""
        if isinstance(matrices, list):
            return [None if each is None else self.of(each) for each in matrices]
        return None if matrices is None else self.of(matrices)


@functools.cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    """One for all adapters: of those that torch hands out, it is in turn one that others have."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class _Slot:
    """Where live modules hold the revision of one slot, by their names: every A, then every B."""

    def __init__(self, modules: Mapping[str, Any], number: int) -> None:
        self.places = {
            name: [matrices[0] if len(matrices := stack[number]) == 1 else matrices for stack in _stacks_of(module)]
            for name, module in modules.items()
        }
        self._addresses = _addresses(modules)
        self._every = every = [place for places in self.places.values() for place in places]
        self.matrices, self.numel, self.joined = len(every), _numel(every), Joined(every)
        self._fitting: list[int] = []
        self._expected: tuple[list[int], Joined] | None = None
        self._filling: tuple[list[int], BatchedCopy] | None = None

    def fits(self, parts: Sequence[torch.Tensor]) -> bool:
        """Whether these are one for each matrix, of its shape. They mostly are where those before were, which did: of
        adapters that are alike, vLLM makes what lies at an address in the same way each time."""
        if len(parts) != self.matrices:
            return False
        addresses = [part.data_ptr() for part in parts]
        if addresses != self._fitting:
            self._fitting = addresses if all(map(_fits, self._every, parts)) else []
        return addresses == self._fitting

    def is_as(self, expected: Sequence[torch.Tensor]) -> tuple[bool, Scan]:
        """Whether all of it, on a GPU, is as these together, and a scan of it. They mostly are where those before
        were."""
        addresses = [each.data_ptr() for each in expected]
        if self._expected is None or self._expected[0] != addresses:
            joined = Joined(expected, hold=False)  # who wants the memory next sees whether others hold it
            self._expected = None if joined.of_copies else (addresses, joined)
        else:
            joined = self._expected[1]
        here, there = settle([self.joined.scan(), joined.scan()])
        return here == there, here

    def fill(self, parts: Sequence[torch.Tensor]) -> tuple[bool, Scan]:
        """Copy into all of it, on a GPU, as many that fit; and `is_as`. What is copied is mostly where that before
        was."""
        from weightwire.engines.vllm.batched_copy import BatchedCopy, Move  # needs Triton

        addresses = [part.data_ptr() for part in parts]
        if self._filling is None or self._filling[0] != addresses:
            pairs = zip(addresses, self._every, parts, strict=True)
            moves = [Move(address, place.data_ptr(), 1, part.nbytes, 0, 0) for address, place, part in pairs]
            self._filling = (addresses, BatchedCopy(moves, parts[0].device))
        self._filling[1].run()
        return self.is_as(parts)

    def is_there(self, modules: Mapping[str, Any]) -> bool:
        """Whether the modules hold it still where they did."""
        return self._addresses == _addresses(modules)


def _addresses(modules: Mapping[str, Any]) -> list[int]:
    return [stack.data_ptr() for module in modules.values() for stack in _stacks_of(module)]


def _stacks_of(module: Any) -> list[torch.Tensor]:
    """The memory of a live module's slots, one after the other in each: every A, then every B."""
    if isinstance(module.lora_a_stacked, list):  # of experts, one for each of them and each slot
        names = ("w13_lora_a_stacked", "w2_lora_a_stacked", "w13_lora_b_stacked", "w2_lora_b_stacked")
        return [stack for name in names for stack in getattr(module, name, ())]
    stacks = (module.lora_a_stacked, module.lora_b_stacked)
    return [stack for each in stacks for stack in (each if isinstance(each, tuple) else (each,))]


def _on_this_rank(module: Any, a: Any, b: Any) -> list[torch.Tensor | None]:
    """What a module takes of a matrix A and a matrix B, or of several, by vLLM's own slicing."""
    if isinstance(b, list) and len(b) != module.n_slices:
        a, b = module.expand_packed_lora(a, b)
    if module.tp_size > 1:
        a, b = module.slice_lora_a(a), module.slice_lora_b(b)
    return [*_listed(a), *_listed(b)]


def _is_made_of(built: Any, given: dict[str, torch.Tensor]) -> bool:
    """Whether vLLM's model has these very matrices, which were empty when it was made, and no copies of them."""
    if built is None:
        return False
    own = {tensor.data_ptr() for tensor in given.values()}
    return all({lora.lora_a.data_ptr(), lora.lora_b.data_ptr()} <= own for lora in built.loras.values())


def _fits(place: torch.Tensor, part: torch.Tensor) -> bool:
    return (part.shape, part.dtype) == (place.shape, place.dtype) and part.is_contiguous()


def _copy_into(pairs: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> None:
    """Into each place what is to be there."""
    to, parts = [], []
    for place, part in pairs:
        smaller = part is None or part.shape != place.shape
        if smaller:
            place.zero_()  # of what the adapter before has left beside a smaller one
        if part is not None:
            to.append(place[: part.shape[0], : part.shape[1]] if smaller else place)
            parts.append(part)
    if to:
        torch._foreach_copy_(to, parts)


def _filled_up(part: torch.Tensor | None, place: torch.Tensor) -> torch.Tensor:
    """A whole place of a slot as it must look: `part` in its corner, and nothing beside it."""
    if part is not None and part.shape == place.shape:
        return part
    whole = torch.zeros_like(place)
    if part is not None:
        whole[: part.shape[0], : part.shape[1]] = part
    return whole


def _run(row: torch.Tensor, start: int, count: int) -> torch.Tensor:
    return row if count == row.numel() else row[start : start + count]


def _numel(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _holds(places: Sequence[torch.Tensor], parts: Sequence[torch.Tensor | None]) -> bool:
    return alike(places, [_filled_up(part, place) for part, place in zip(parts, places, strict=True)])


def _listed(matrices: Any) -> list[Any]:
    return matrices if isinstance(matrices, list) else [matrices]
