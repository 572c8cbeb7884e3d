"""vLLM's own model of an adapter, once made, as the pattern of those of later revisions.

They differ by their number and by the tensors they are made of. To have vLLM parse hundreds of names anew for each
takes as long as its bytes take to arrive, and keeps the interpreter from who receives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

__all__ = ["AdapterTemplate"]

_MATRICES = ("lora_a", "lora_b")


class _Thing(NamedTuple):
    """An object as it is made again: its class, and its attributes; those that are containers are empty, and `fresh`
    each time."""

    kind: Any
    facts: dict[str, Any]
    fresh: dict[str, Any]

    def again(self, **more: Any) -> Any:
        made = object.__new__(self.kind)
        made.__dict__.update(self.facts, **{name: kind() for name, kind in self.fresh.items()}, **more)
        return made


class AdapterTemplate:
    """The model, and of each module that it has weights for, these and which tensors they are made of, by name."""

    def __init__(self, model: _Thing, loras: Mapping[str, tuple[_Thing, str, str]]) -> None:
        self._model, self._loras = model, loras

    @classmethod
    def of(cls, built: Any, given: Mapping[str, torch.Tensor]) -> AdapterTemplate | None:
        """`built`: a `LoRAModel` as vLLM made it of `given`, by name, before anybody has changed it. None where it has
        anything else than these very tensors and plain facts."""
        names = {tensor.data_ptr(): name for name, tensor in given.items()}
        model = _thing(built, ("id", "loras"))
        loras: dict[str, tuple[_Thing, str, str]] = {}
        for module, lora in built.loras.items():
            thing = _thing(lora, _MATRICES)
            matrices = [getattr(lora, which) for which in _MATRICES]
            own = [names.get(each.data_ptr()) if isinstance(each, torch.Tensor) else None for each in matrices]
            if thing is None or own[0] is None or own[1] is None:
                return None
            loras[module] = thing, own[0], own[1]
        return None if model is None else cls(model, loras)

    def build(self, id: int, given: Mapping[str, torch.Tensor]) -> Any:
        """What vLLM would make of these under this number."""
        loras = {module: thing.again(lora_a=given[a], lora_b=given[b]) for module, (thing, a, b) in self._loras.items()}
        return self._model.again(id=id, loras=loras)


def _thing(made: Any, but: tuple[str, ...]) -> _Thing | None:
    facts = {name: value for name, value in vars(made).items() if name not in but}
    fresh = {name: type(facts.pop(name)) for name, value in [*facts.items()] if _is_empty(value)}
    plain = all(value is None or isinstance(value, (bool, int, float, str)) for value in facts.values())
    return _Thing(type(made), facts, fresh) if plain else None


def _is_empty(value: Any) -> bool:
    return isinstance(value, (dict, list)) and not value
