"""LoRA adapters in a vLLM worker: a store of revisions in memory, and the one place where vLLM loads adapters.

vLLM knows an adapter by its path and reads it again whenever it was evicted. A path of our own scheme is answered from
the store, by the same steps as a file: PEFT's config through vLLM's helper, tensors through its model class.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from weightwire.engines.staged_adapter import StagedAdapter
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
from weightwire.updates.digest import Scan, all_finite, scan_joined_any, settle
from weightwire.updates.manifest import Manifest
from weightwire.updates.receipt import Proof

__all__ = ["AdapterStore", "path_of"]

_SCHEME = "weightwire:"
K = TypeVar("K")


def path_of(revision: Revision) -> str:
    """The path by which vLLM asks for a revision.

    >>> path_of(Revision("policy", 7, 1048576))
    'weightwire:policy@7'
    """
    return f"{_SCHEME}{revision.label}"


class AdapterStore:
    """The revisions that one worker holds, by id: their tensors in host memory, in the dtype vLLM casts them to. On
    their way in, of an engine on a GPU, they are there."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._sent: dict[int, tuple[dict[str, torch.Tensor], Any]] = {}
        self._built: dict[int, Any] = {}
        self._manager: Any = None
        self._binding: tuple[object, _Binding] | None = None
        # What an adapter needs before its first byte is made here, while the trainer reads that.
        self.early = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weightwire-adapter")
        self.loads: dict[str, int] = {}
        """How often vLLM has asked for each path."""

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

    def drop(self, revision: Revision) -> None:
        self._sent.pop(revision.id, None)
        self._built.pop(revision.id, None)
        self.loads.pop(path_of(revision), None)
        if self._manager is not None and revision.id in self._manager.list_adapters():
            self._manager.remove_adapter(revision.id)

    def enter(self, revision: Revision, tensors: dict[str, torch.Tensor], helper: Any, built: Any) -> int:
        """Have vLLM load and activate a revision; the slot that it is in."""
        from vllm.lora.request import LoRARequest

        self._sent[revision.id] = (tensors, helper)
        self._built[revision.id] = built
        self._manager.add_adapter(LoRARequest(revision.label, revision.id, path_of(revision)))
        slots: list[int | None] = self._manager._adapter_manager.lora_index_to_id
        return slots.index(revision.id)

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
        if request.lora_int_id not in self._sent:
            raise EngineError(f"{request.lora_path} is held no more")
        tensors, helper = self._sent[request.lora_int_id]
        # vLLM scales each B in place, and what was sent may be asked for again.
        own = {name: tensor if _is_a(name) else tensor.clone() for name, tensor in tensors.items()}
        return build(manager, request.lora_int_id, own, helper)


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


def _is_a(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_embedding_A"))


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

    def read_back(self, slot: int, loras: dict[str, Any]) -> tuple[dict[str, Proof], str]:
        """How each live module was shown to hold in `slot` what it should, and one digest of what they all hold. By two
        calls: to compare hundreds of small matrices one by one takes longer than to read them."""
        proof: dict[str, Proof] = {}
        places: list[torch.Tensor] = []
        filled: list[torch.Tensor] = []
        held: list[torch.Tensor] = []
        for name, module in self.modules.items():
            found, parts = _in_slot(module, slot), _expected(module, loras[name])
            proof[name] = "staged" if parts is None else "read back"
            held += found if parts is None else [part for part in parts if part is not None]
            if parts is not None:
                places += found
                filled += [_filled_up(part, place) for part, place in zip(parts, found, strict=True)]
        digest, expected = settle([scan_joined_any(places), scan_joined_any(filled)])
        if digest != expected:
            raise VerificationError(
                f"{self._differing(slot, loras)} was read back and does not hold the adapter that was sent"
            )
        # Without what fills a slot up, and with what could not be compared.
        alike = len(held) == len(places) and _numel(places) == _numel(held)
        return proof, (digest if alike else settle([scan_joined_any(held)])[0]).digest.hex()

    def _differing(self, slot: int, loras: dict[str, Any]) -> str:
        for name, module in self.modules.items():
            for part, place in zip(_expected(module, loras[name]) or (), _in_slot(module, slot), strict=False):
                if not torch.equal(place[0], _filled_up(part, place)):
                    return name
        return "the adapter"


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
    """One revision on its way in. vLLM's model of it is made beside the engine, and given to it in `check`.

    All A lie in one piece of memory and all B in another, so that what is done to every matrix is one operation on few
    pieces, not one on each of hundreds of small ones.
    """

    def __init__(self, store: AdapterStore, binding: _Binding, manifest: Manifest, revision: Revision) -> None:
        dtype: torch.dtype = binding.manager.lora_config.lora_dtype
        super().__init__(manifest.tensors, dtype)
        self._store = store
        self._binding = binding
        self._revision = revision
        self._finite = manifest.finite
        self._built: Any = None
        self._device = torch.device(binding.manager.device)
        self._flat: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._kept: dict[str, torch.Tensor] = {}
        self._proof: dict[str, Proof] = {}
        # Each is held here, and by vLLM besides.
        self.nbytes = 2 * sum(spec.numel for spec in manifest.tensors) * dtype.itemsize
        self._early = store.early.submit(self._lay_out)

    def _lay_out(self) -> tuple[dict[str, torch.Tensor], Any]:
        """Make room for each tensor, which `write` fills, and vLLM's model of them; gives what that was made of too."""
        given: dict[str, torch.Tensor] = {}
        for a in (True, False):
            specs = [spec for spec in self._specs if _is_a(spec.name) is a]
            sizes = [spec.numel for spec in specs]
            flat = torch.empty(sum(sizes), dtype=self._dtype, device=self._device)
            # vLLM scales each B in place, and what was sent may be asked for again: so its model has its own.
            own = flat if a else torch.empty_like(flat)
            for spec, part, owned in zip(specs, torch.split(flat, sizes), torch.split(own, sizes), strict=True):
                self._tensors[spec.name], given[spec.name] = part.view(spec.shape), owned.view(spec.shape)
            self._flat.append((flat, own))
        return given, self._build(given)

    def _build(self, given: dict[str, torch.Tensor]) -> Any:
        return build(self._binding.manager, self._revision.id, given, self._binding.helper)

    def write(self, tensor: int, start: int, data: torch.Tensor) -> None:
        self._early.result()
        super().write(tensor, start, data)

    def seal(self, scans: Sequence[Scan]) -> None:
        given, built = self._early.result()
        # What arrived is checked as it arrives; what it became here may not be finite.
        cast = any(getattr(torch, spec.dtype) != self._dtype for spec in self._specs)
        if self._finite and cast and not all(all_finite(flat) for flat, _ in self._flat):
            raise NonFinite(
                f"the adapter is not finite in the engine's {self._dtype}",
                next_step="Nothing was changed. Serve it in a wider dtype: --lora-dtype.",
            )
        for flat, own in self._flat:
            if own is not flat:
                own.copy_(flat)
        self._kept = _on_host(self._tensors, [flat for flat, _ in self._flat])
        self._built = built if _is_made_of(built, given) else self._build(given)

    def check(self, seconds: float) -> bool:
        if self._built is None:
            return True
        slot = self._store.enter(self._revision, self._kept, self._binding.helper, self._built)
        loras = self._built.loras
        # What vLLM caches is for host memory, too. It has scaled what it was given in place.
        of_host = _on_host(_matrices(loras), [own for _, own in self._flat])
        self._proof, self._held = self._binding.read_back(slot, loras)
        _replace(loras, of_host)
        self._built = None
        return True

    def proof(self) -> dict[str, Proof]:
        return self._proof

    def discard(self) -> None:
        super().discard()
        self._kept = {}
        self._flat.clear()
        self._built = None
        self._early.cancel()
        self._early = Future()  # whoever comes after this finds it cancelled too
        self._early.cancel()


def _in_slot(module: Any, slot: int) -> list[torch.Tensor]:
    """What a live module holds for the revision in `slot`: every A, then every B."""
    stacks = (module.lora_a_stacked, module.lora_b_stacked)
    return [stack[slot] for each in stacks for stack in (each if isinstance(each, tuple) else (each,))]


def _expected(module: Any, lora: Any) -> list[torch.Tensor | None] | None:
    """What it should hold on this rank, by vLLM's own slicing; None for a kind of module that we do not know."""
    if not hasattr(module, "n_slices"):
        return None
    a, b = lora.lora_a, lora.lora_b
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


def _filled_up(part: torch.Tensor | None, place: torch.Tensor) -> torch.Tensor:
    """A whole place of a slot as it must look: `part` in its corner, and nothing beside it."""
    if part is not None and part.shape == place.shape[1:]:
        return part
    whole = torch.zeros(place.shape[1:], dtype=place.dtype, device=place.device)
    if part is not None:
        whole[: part.shape[0], : part.shape[1]] = part
    return whole


def _numel(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _on_host(tensors: dict[K, torch.Tensor], flat: Sequence[torch.Tensor]) -> dict[K, torch.Tensor]:
    """The same tensors, most of them parts of `flat`, in pinned host memory; themselves where they are there."""
    if all(tensor.device.type == "cpu" for tensor in tensors.values()):
        return dict(tensors)
    copies = {}
    for each in flat:
        copied = torch.empty_like(each, device="cpu", pin_memory=True)
        copies[each.untyped_storage().data_ptr()] = copied.copy_(each, non_blocking=True)

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        whole = copies.get(tensor.untyped_storage().data_ptr())
        return (
            tensor.cpu() if whole is None else whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        )

    found = {name: copy(tensor) for name, tensor in tensors.items()}
    torch.cuda.current_stream(flat[0].device).synchronize()
    return found


def _matrices(loras: dict[str, Any]) -> dict[tuple[str, str, int], torch.Tensor]:
    """Those of vLLM's model: by module, `lora_a` or `lora_b`, and number where a module has several."""
    return {
        (name, which, number): matrix
        for name, lora in loras.items()
        for which in ("lora_a", "lora_b")
        for number, matrix in enumerate(_listed(getattr(lora, which)))
        if matrix is not None
    }


def _replace(loras: dict[str, Any], matrices: dict[tuple[str, str, int], torch.Tensor]) -> None:
    for (name, which, number), matrix in matrices.items():
        if isinstance(listed := getattr(loras[name], which), list):
            listed[number] = matrix
        else:
            setattr(loras[name], which, matrix)


def _listed(matrices: Any) -> list[Any]:
    return matrices if isinstance(matrices, list) else [matrices]
