"""LoRA adapters in a Transformers model of this process, through PEFT.

Each revision is an adapter of its own in PEFT's layers, of which none is active but inside `serving`: for everybody
else the model computes what it did before. A layer that holds no adapter any more gives way to what it wrapped.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from weightwire.engines.adapter_delta import AdapterDelta
from weightwire.engines.staged_adapter import StagedAdapter
from weightwire.errors import ShapeMismatch, UnknownTensor, UnsupportedError, VerificationError, VersionError
from weightwire.revisions import Revision
from weightwire.updates.adapter import PREFIX, check_adapter
from weightwire.updates.digest import NO_DIGEST, Digest, Scan, scan
from weightwire.updates.manifest import Manifest
from weightwire.updates.receipt import Proof

__all__ = ["ModuleAdapters"]

_CLEAR_SECONDS = 5.0


class ModuleAdapters:
    """The adapters of one module. `lock` is held by whoever runs it: revisions come and go only between two runs."""

    def __init__(self, module: torch.nn.Module, lock: threading.RLock) -> None:
        self.module = module
        self.lock = lock
        self.inside: int | None = None
        """The thread that is in `serving`, which has the lock."""
        self._structure = threading.RLock()  # held briefly, by whoever changes or walks the tree of modules
        self._layers: dict[str, Any] = {}
        self._modules: dict[Revision, Sequence[str]] = {}
        self._dropped: set[Revision] = set()
        self._serving: list[Revision] = []

    def prepare(self, manifest: Manifest, revision: Revision) -> _Staged:
        """Check that the adapter fits the module, and lay it out."""
        assert manifest.adapter is not None
        config = manifest.adapter.config
        ranks = check_adapter(manifest.tensors, config)
        _need_peft()
        modules = self._plain_modules()
        if missing := [name for name in ranks if not isinstance(modules.get(name), _ADAPTED)]:
            raise UnknownTensor(
                f"the model has no Linear or Embedding {', '.join(missing[:5])} ({len(missing)} of the adapter's)",
                next_step="Load an adapter of a model of the same architecture.",
            )
        shapes = {
            f"{PREFIX}{name}.{part}": shape
            for name, rank in ranks.items()
            for part, shape in _shapes(modules[name], rank).items()
        }
        for spec in manifest.tensors:
            if spec.shape != (fitting := shapes.get(spec.name)):
                raise ShapeMismatch(
                    f"{spec.name} is {spec.shape}, and the model's module takes {fitting or 'no such tensor'}",
                    next_step="Load an adapter of a model of the same architecture.",
                )
        return _Staged(self, manifest, revision, list(ranks))

    def prepare_delta(self, manifest: Manifest, revision: Revision, base: Revision) -> AdapterDelta:
        """The same for what has changed since `base`, which is read back from the layers."""
        dtypes = {spec.name: getattr(torch, spec.dtype) for spec in manifest.tensors}
        return AdapterDelta(manifest, self.prepare(manifest.whole(), revision), base, lambda: self._sent(base, dtypes))

    def drop(self, revision: Revision) -> None:
        """Forget a revision, as soon as nobody runs the module."""
        self._dropped.add(revision)
        self._tidy()

    def clear(self) -> None:
        """Give the module back as it was."""
        self._dropped.update(self._modules)
        self._tidy(_CLEAR_SECONDS)

    def holds(self, revision: Revision) -> bool:
        return revision in self._modules and revision not in self._dropped

    def in_use(self) -> list[int]:
        return [revision.id for revision in self._serving]

    @contextlib.contextmanager
    def serving(self, revision: Revision) -> Iterator[None]:
        """Inside, with the lock held, the module computes with this adapter; afterwards as it did before."""
        outside, self.inside = self.inside, threading.get_ident()
        self._serving.append(revision)
        try:
            self._activate()
            yield
        finally:
            self._serving.pop()
            self._activate()
            self.inside = outside
            self._tidy()

    def state(self) -> dict[str, torch.Tensor]:
        """The module's own tensors, by the names they have without adapters."""
        own = {}
        with self._structure:
            for name, tensor in self.module.state_dict(keep_vars=True).items():
                wrapped, _, inner = name.rpartition(".base_layer.")
                if wrapped in self._layers:
                    own[f"{wrapped}.{inner}"] = tensor
                elif name.partition(".lora_")[0] not in self._layers and isinstance(tensor, torch.Tensor):
                    own[name] = tensor
        return own

    def enter(
        self, revision: Revision, modules: Sequence[str], config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> Digest:
        """With the lock held: put a revision into the layers of `modules`, beside the others, and read it back. The
        digest of what is there. Raises with everything as it was before."""
        self._tidy()
        with self._structure, _unchanged(self.module):
            self._modules[revision] = modules
            try:
                _inject(self.module, _slot(revision), modules, config)
                self._find_layers(modules)
                return _fill(dict(self._parameters(revision)), tensors)
            except BaseException:
                self._find_layers(modules)
                self._remove(revision)
                raise
            finally:
                self._activate()

    def _find_layers(self, modules: Sequence[str]) -> None:
        from peft.tuners.lora import LoraLayer

        for name in modules:
            layer = self.module.get_submodule(name)
            if isinstance(layer, LoraLayer) and name not in self._layers:
                self._layers[name] = layer.train(layer.get_base_layer().training)

    def _parameters(self, revision: Revision) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name in self._modules[revision]:
            for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
                held = getattr(self._layers[name], part)
                if _slot(revision) in held:
                    tensor = held[_slot(revision)]
                    whole = isinstance(tensor, torch.nn.Parameter)
                    yield f"{PREFIX}{name}.{part}{'' if whole else '.weight'}", tensor if whole else tensor.weight

    def _sent(self, revision: Revision, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
        """What was sent of a revision, if it was sent in these dtypes: layers hold it widened. In others it is not the
        same, as its digest will tell."""
        with self._structure:
            if not self.holds(revision):
                raise VersionError(f"{revision.label} is held no more", next_step="Publish the whole adapter.")
            live = {name: parameter.detach() for name, parameter in self._parameters(revision)}
            return {name: held.to("cpu", dtypes.get(name, held.dtype)) for name, held in live.items()}

    def _activate(self) -> None:
        active = [_slot(self._serving[-1])] if self._serving else []
        for layer in self._layers.values():
            layer.set_adapter(active)
            for name, parameter in layer.named_parameters():
                if not name.startswith("base_layer."):
                    parameter.requires_grad_(False)

    def _tidy(self, seconds: float = 0.0) -> None:
        """Remove what was dropped, unless the module is being run: then the next who can does it."""
        if not self._dropped or not self.lock.acquire(timeout=seconds):
            return
        try:
            with self._structure:
                for revision in list(self._dropped):
                    if revision not in self._serving:
                        self._remove(revision)
        finally:
            self.lock.release()

    def _remove(self, revision: Revision) -> None:
        self._dropped.discard(revision)
        for name in self._modules.pop(revision, ()):
            if (layer := self._layers.get(name)) is None:
                continue
            if layer.active_adapters == [_slot(revision)]:
                layer.set_adapter([])
            layer.delete_adapter(_slot(revision))
            if not layer.scaling:
                parent, _, child = name.rpartition(".")
                setattr(self.module.get_submodule(parent), child, layer.get_base_layer())
                del self._layers[name]

    def _plain_modules(self) -> dict[str, torch.nn.Module]:
        """The module's own modules. Raises when it has adapters besides ours, which are not to be switched off."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        with self._structure:
            modules = dict(self.module.named_modules())
            modules.update((name, layer.get_base_layer()) for name, layer in self._layers.items())
        if foreign := [name for name, module in modules.items() if isinstance(module, BaseTunerLayer)]:
            raise UnsupportedError(
                f"the model has PEFT adapters of its own, such as in {foreign[0]}",
                next_step="Merge or unload them: model.merge_and_unload(), or model.unload() of the PeftModel.",
            )
        return modules


class _Staged(StagedAdapter):
    """One revision on its way in."""

    def __init__(self, adapters: ModuleAdapters, manifest: Manifest, revision: Revision, modules: list[str]) -> None:
        assert manifest.adapter is not None
        super().__init__(manifest.tensors)
        self._adapters = adapters
        self._config = manifest.adapter.config
        self._revision = revision
        self._modules = modules
        self._ready = False
        self.nbytes = sum(spec.nbytes + 4 * spec.numel for spec in manifest.tensors)  # as sent, and as PEFT keeps it

    def seal(self, scans: Sequence[Scan]) -> None:
        self._ready = True

    def check(self, seconds: float) -> bool:
        if not self._ready:
            return True
        if not self._adapters.lock.acquire(timeout=seconds):
            return False  # it is generating
        try:
            self._held = self._adapters.enter(self._revision, self._modules, self._config, self._tensors).hex()
        finally:
            self._adapters.lock.release()
        self._ready = False
        return True

    def proof(self) -> dict[str, Proof]:
        return dict.fromkeys(self._modules, "read back")

    def discard(self) -> None:
        super().discard()
        self._ready = False


_ADAPTED = (torch.nn.Linear, torch.nn.Embedding)


def _shapes(module: torch.nn.Module, rank: int) -> dict[str, tuple[int, int]]:
    """What an adapter of this rank has for a module, by PEFT's names."""
    if isinstance(module, torch.nn.Linear):
        return {"lora_A.weight": (rank, module.in_features), "lora_B.weight": (module.out_features, rank)}
    assert isinstance(module, torch.nn.Embedding)
    return {"lora_embedding_A": (rank, module.num_embeddings), "lora_embedding_B": (module.embedding_dim, rank)}


def _slot(revision: Revision) -> str:
    """The name of a revision in PEFT's layers, where it must have no dots."""
    return f"r{revision.id}"


@contextlib.contextmanager
def _unchanged(module: torch.nn.Module) -> Iterator[None]:
    """Takes back what PEFT changes besides the layers: which parameters are trained, the random state, an attribute."""
    trained = {parameter: parameter.requires_grad for parameter in module.parameters()}
    before = vars(module).pop("peft_config", None)  # of an adapter that was there once
    try:
        with torch.random.fork_rng(devices=()):
            yield
    finally:
        vars(module).pop("peft_config", None)
        if before is not None:
            module.peft_config = before
        for parameter, was in trained.items():
            parameter.requires_grad_(was)


def _fill(live: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> Digest:
    """Copy what was sent, and the digest of what was read back."""
    if live.keys() != tensors.keys():
        raise VerificationError(f"PEFT has made {len(live)} tensors for the {len(tensors)} that were sent")
    digest = NO_DIGEST
    for name, parameter in live.items():
        # As `PeftModel.from_pretrained` keeps the adapters of a model of this dtype.
        dtype = torch.float32 if parameter.dtype.itemsize < 4 else parameter.dtype
        parameter.data = torch.empty_like(parameter, dtype=dtype).copy_(tensors[name])
        held = scan(parameter.detach().cpu())
        if held != scan(tensors[name].to(dtype)):
            raise VerificationError(f"{name} was read back and is not what was sent")
        digest += held.digest
    return digest


def _need_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            "PEFT is not installed where this engine runs", next_step="pip install 'weightwire[peft]'"
        ) from error


def _inject(module: torch.nn.Module, slot: str, modules: Sequence[str], config: Mapping[str, Any]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    # What says how the tensors are understood; `check_adapter` has refused all that would compute something else.
    settings = LoraConfig(
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        use_rslora=config.get("use_rslora") or False,
        rank_pattern=_matching(config.get("rank_pattern"), modules),
        alpha_pattern=_matching(config.get("alpha_pattern"), modules),
        # An expression: names in a list would also be suffixes.
        target_modules="|".join(map(re.escape, modules)),
        lora_dropout=0.0,
        inference_mode=True,
    )
    inject_adapter_in_model(settings, module, adapter_name=slot)


def _matching(pattern: Mapping[str, Any] | None, modules: Sequence[str]) -> dict[str, Any]:
    """Those of PEFT's keys that are for any module: it warns of the others."""
    return {
        key: value for key, value in (pattern or {}).items() if any(re.match(rf"(.*\.)?({key})$", m) for m in modules)
    }
