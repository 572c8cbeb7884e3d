"""A LoRA adapter as a source: of a module that PEFT has adapted, as a mapping of tensors, or on disk.

Tensors come under the names under which PEFT saves them. PEFT itself is not needed: what it puts into a module is found
by its attributes and names.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from weightwire.errors import SourceError, UsageError
from weightwire.sources.base import LocalSource
from weightwire.sources.checkpoint import INDEX, WHOLE, CheckpointSource, open_file
from weightwire.sources.tensors import refuse_without_data, state_of, unwrapped
from weightwire.updates.adapter import METADATA_KEY, PREFIX, check_adapter, plain_config
from weightwire.updates.manifest import TensorSpec

__all__ = ["AdapterFolderSource", "AdapterSource", "PeftAdapter", "PeftSource", "has_adapter", "is_adapter"]

_CONFIG, _TENSORS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# With the adapter's name, as a module's state has it.
_LIVE = re.compile(r"(.+\.lora_(?:[AB]|embedding_[AB]))\.([^.]+)(\.weight)?")


class PeftAdapter:
    """One adapter of a module, as the module has it now.

    `module`: a `peft.PeftModel`, or a model to which Transformers' `add_adapter` or PEFT's `inject_adapter_in_model`
    has added adapters. `adapter`: the name that PEFT knows it by; by default the one that is active. `SourceError` when
    there is no such adapter, or not one active.
    """

    def __init__(self, module: torch.nn.Module, adapter: str | None = None) -> None:
        self._module = unwrapped(module)
        self.name = _chosen(self._module, adapter)
        # Whatever PEFT may hang onto a layer, so that it is refused by name and not left out.
        self._own = re.compile(
            rf"(.+\.(?:lora_\w+|modules_to_save|trainable_tokens_\w+))\.{re.escape(self.name)}((?:\..+)?)"
        )
        self._places: tuple[Any, list[tuple[str, dict[str, Any], str]]] = (None, [])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors, without those of the base model and of other adapters, under PEFT's saved names."""
        config = _configs(self._module)[_chosen(self._module, self.name)]
        # Where they are stays so for as long as the adapter does; to look costs more than to read.
        if self._places[0] is not config:
            self._places = (config, list(self._find()))
        return {name: held[own] for name, held, own in self._places[1] if held.get(own) is not None}

    def _find(self) -> Iterator[tuple[str, dict[str, Any], str]]:
        """The name of each of its tensors, and where it is: among a module's parameters or buffers, under which key."""
        for path, module in self._module.named_modules(remove_duplicate=False):
            for held in (module._parameters, module._buffers):
                for own in held:
                    name = f"{path}.{own}".replace("_orig_mod.", "")
                    if (match := self._own.fullmatch(name)) is not None:
                        yield _prefixed(match[1] + match[2]), held, own

    def config(self) -> dict[str, Any]:
        """Its config as plain data."""
        return plain_config(_configs(self._module)[_chosen(self._module, self.name)])


class PeftSource(LocalSource):
    """An adapter of a module whose tensors are whole and in this process, read anew at each publish; see `PeftAdapter`.

    Raises what `weightwire.updates.adapter.check_adapter` does: what is more than a plain LoRA adapter is refused here.
    """

    def __init__(self, module: torch.nn.Module, adapter: str | None = None) -> None:
        self._adapter = PeftAdapter(module, adapter)
        self._checked: tuple[Sequence[TensorSpec], Mapping[str, Any]] | None = None
        self.metadata()
        self.release()

    def named(self) -> Mapping[str, torch.Tensor]:
        tensors = self._adapter.tensors()
        refuse_without_data(tensors)
        return tensors

    def metadata(self) -> Sequence[TensorSpec]:
        specs, config = super().metadata(), self._adapter.config()
        if (specs, config) != self._checked:
            check_adapter(specs, config)
        self._checked, self.lora = (specs, config), config
        return specs


class AdapterSource(LocalSource):
    """A mapping of an adapter's tensors, whole and in this process, and its config: whatever `plain_config` takes.

    Names are those that PEFT saves, or those of a module's state, if they are of one adapter. Raises what
    `weightwire.updates.adapter.check_adapter` does.

    >>> a, b = torch.zeros(2, 4), torch.zeros(3, 2)
    >>> tensors = {"base_model.model.q.lora_A.default.weight": a, "base_model.model.q.lora_B.default.weight": b}
    >>> [spec.name for spec in AdapterSource(tensors, {"r": 2, "lora_alpha": 4}).metadata()]
    ['base_model.model.q.lora_A.weight', 'base_model.model.q.lora_B.weight']
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], config: Any) -> None:
        refuse_without_data(tensors)
        self._named = _renamed(tensors)
        self.lora = plain_config(config)
        check_adapter(self.metadata(), self.lora)

    def named(self) -> Mapping[str, torch.Tensor]:
        return self._named


class AdapterFolderSource(CheckpointSource):
    """A folder with `adapter_config.json` and `adapter_model.safetensors`, as PEFT's `save_pretrained` writes it, or
    the path of such a file. A file may bring its own config: as JSON text, in its metadata, under `adapter_config`.

    A path that cannot work is a `SourceError` here; also raises what `weightwire.updates.adapter.check_adapter` does.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        super().__init__(_tensors_in(path) if path.is_dir() else path)

    def metadata(self) -> Sequence[TensorSpec]:
        specs = super().metadata()
        self.lora = _config_of(self._path)
        check_adapter(specs, self.lora)
        return specs


def has_adapter(module: torch.nn.Module) -> bool:
    """Whether a module is PEFT's, or has LoRA tensors that PEFT put there."""
    module = unwrapped(module)
    # Where nobody has imported it, there is none of its models.
    if isinstance(module, getattr(sys.modules.get("peft"), "PeftModel", ())):
        return True
    # A model from which the adapter was unloaded keeps its config.
    return bool(_configs(module)) and any(".lora_" in name for name in state_of(module))


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether there is an adapter at a path, and no whole model; `SourceError` if there are both."""
    path = Path(path)
    if path.is_file():
        return path.suffix == ".safetensors" and _has_lora(path)
    adapter = [name for name in (_CONFIG, _TENSORS, _PICKLE) if (path / name).is_file()]
    model = [name for name in (WHOLE, INDEX) if (path / name).is_file()]
    if adapter and model:
        raise SourceError(
            f"{path} has both {adapter[0]} and {model[0]}",
            next_step="Pass the path of the .safetensors file that is meant, or move one of the two elsewhere.",
        )
    return bool(adapter or (not model and _folders_in(path)))


# -- modules -----------------------------------------------------------------------------------------------------------


def _configs(module: torch.nn.Module) -> Mapping[str, Any]:
    configs = getattr(module, "peft_config", None)
    return configs if isinstance(configs, Mapping) else {}


def _chosen(module: torch.nn.Module, adapter: str | None) -> str:
    configs = _configs(module)
    if not configs:
        raise SourceError(f"{type(module).__name__} has no PEFT adapters", next_step="Pass a peft.PeftModel.")
    known = ", ".join(map(repr, configs))
    if adapter is not None:
        if adapter not in configs:
            raise SourceError(f"there is no adapter {adapter!r}", next_step=f"There are: {known}.")
        return adapter
    active = _active(module)
    if len(active) != 1:
        raise SourceError(
            f"{len(active)} adapters are active: {', '.join(map(repr, active)) or 'none'}",
            next_step=f"Name one: PeftSource(module, adapter=...). There are: {known}.",
        )
    return active[0]


def _active(module: torch.nn.Module) -> list[str]:
    active = getattr(module, "active_adapters", None) or getattr(module, "active_adapter", None) or ()
    if callable(active):
        try:
            active = active()
        except ValueError:  # Transformers, of an adapter that it did not add itself
            active = ()
    return [active] if isinstance(active, str) else list(active)


# -- tensors -----------------------------------------------------------------------------------------------------------


def _prefixed(name: str) -> str:
    # Names in a module that PEFT did not wrap lack it; in what PEFT saves of one they have it.
    return name if name.startswith(PREFIX) else PREFIX + name


def _renamed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under PEFT's saved names. Names that are of no LoRA tensor are left for `check_adapter`.

    >>> list(_renamed({"q.lora_A.policy.weight": torch.zeros(1), "lm_head.weight": torch.zeros(1)}))
    ['base_model.model.q.lora_A.weight', 'lm_head.weight']
    """
    adapters: set[str] = set()
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        saved, adapter = _saved_name(name)
        if saved in renamed:
            raise SourceError(f"two tensors would be {saved!r}, one of them {name!r}", next_step="Pass one of them.")
        renamed[saved] = tensor
        if adapter is not None:
            adapters.add(adapter)
    if len(adapters) > 1:
        raise SourceError(
            f"these are tensors of {len(adapters)} adapters: {', '.join(sorted(map(repr, adapters)))}",
            next_step="Pass those of one.",
        )
    return renamed


def _saved_name(name: str) -> tuple[str, str | None]:
    """PEFT's saved name, and the name of the adapter where there was one.

    >>> _saved_name("q.lora_B.policy.weight"), _saved_name("base_model.model.q.lora_B.weight")
    (('base_model.model.q.lora_B.weight', 'policy'), ('base_model.model.q.lora_B.weight', None))
    >>> _saved_name("wte.lora_embedding_A.policy"), _saved_name("wte.weight")
    (('base_model.model.wte.lora_embedding_A', 'policy'), ('wte.weight', None))
    """
    found = _LIVE.fullmatch(name)
    if found is not None and ("embedding" in found[1].rpartition(".")[2]) == (found[3] is None):
        return _prefixed(found[1] + (found[3] or "")), found[2]
    return (_prefixed(name) if ".lora_" in name else name), None


# -- files -------------------------------------------------------------------------------------------------------------


def _tensors_in(folder: Path) -> Path:
    if (folder / _TENSORS).is_file():
        return folder / _TENSORS
    if (folder / _PICKLE).is_file():
        next_step = f"It has {_PICKLE}, but pickle is never read: save with safe_serialization=True."
    elif folders := _folders_in(folder):
        next_step = f"It has the adapters {', '.join(folders[:3])}: pass the path of one."
    else:
        next_step = "Pass the folder that PEFT's save_pretrained wrote, or a .safetensors file."
    raise SourceError(f"{folder} has no {_TENSORS}", next_step=next_step)


def _folders_in(folder: Path) -> list[str]:
    """Adapters that are not called `default` are saved one level down."""
    return sorted(found.parent.name for found in folder.glob(f"*/{_CONFIG}"))


def _has_lora(file: Path) -> bool:
    try:
        header = open_file(file)
    except SourceError:
        return False  # it is told why as a checkpoint
    return METADATA_KEY in (header.metadata() or {}) or any(".lora_" in name for name in header.keys())  # noqa: SIM118


def _config_of(file: Path) -> dict[str, Any]:
    text: str | bytes | None = (open_file(file).metadata() or {}).get(METADATA_KEY)
    where = f"the metadata of {file}"
    if text is None:
        where = str(file.with_name(_CONFIG))
        try:
            text = file.with_name(_CONFIG).read_bytes()
        except OSError as error:
            raise SourceError(
                f"{file} has no {METADATA_KEY} in its metadata, and {where} cannot be read: {error}",
                next_step=f"Put the {_CONFIG} that PEFT saved beside it.",
            ) from error
    try:
        return plain_config(text)
    except UsageError as error:
        raise SourceError(f"{where}: {error.message}", next_step="Save the adapter anew.") from error
