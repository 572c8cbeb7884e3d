"""How each module of the live model takes new weights.

Most parameters are plain tensors: they are handed the staged memory, or copied to where something else shares the live
one, and read back. On a CPU a linear layer keeps its weight only in a kernel's packing; such a module is packed anew,
beside the live one, by vLLM's own code, and at commit the live module is handed the new packing. A matrix product with
unit vectors shows what a packing holds, exactly.
Whatever is neither is refused by name: an update that would not be exact must not happen.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from weightwire.engines.vllm.spare import is_alone
from weightwire.errors import NonFinite, UnsupportedError, VerificationError
from weightwire.updates.digest import Scan, all_finite, scan
from weightwire.updates.receipt import Proof

__all__ = ["Slot", "find_slots", "refuse_infinite"]

_KNOWN_METHODS = {"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"}
_ASKED_COLUMNS = 4
_READ_COLUMNS = 256
_ABSENT = object()


@dataclass(slots=True)
class Slot:
    """One module of the live model that holds parameters, and the shapes and dtypes that they are loaded with.

    `parameters` maps the module's own parameter names to their names in the model. A parameter that several modules
    share (tied embeddings) is in the slot of each. `packs` says that a kernel keeps a packing of the module's weight.
    An `undoable` slot keeps what its `commit` replaces.
    """

    module: torch.nn.Module
    parameters: dict[str, str]
    packs: bool = False
    undoable: bool = False
    _ready: dict[str, torch.Tensor] = field(default_factory=dict)
    _expected: dict[str, Sequence[tuple[int, int, Scan]]] = field(default_factory=dict)
    _attributes: dict[str, Any] = field(default_factory=dict)
    _replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    _packing: dict[str, Any] = field(default_factory=dict)
    _question: tuple[torch.nn.Module, list[int], torch.Tensor] | None = None
    _proof: Proof = "staged"

    def fresh(self) -> Slot:
        """The same slot for another update."""
        return Slot(self.module, self.parameters, self.packs)

    @property
    def packs_beside(self) -> bool:
        """Whether the weight itself is kept beside the packing, as embeddings do."""
        layer: Any = self.module
        return self.packs and bool(layer.weight.numel())

    def current(self, own: str, shape: tuple[int, ...]) -> torch.Tensor:
        """What a parameter holds now, in the shape it is loaded with; out of the packing if need be."""
        live: torch.Tensor = getattr(self.module, own).detach()
        if tuple(live.shape) == shape:
            return live
        columns = [
            _ask(self.module, list(range(k, min(k + _READ_COLUMNS, shape[1]))))
            for k in range(0, shape[1], _READ_COLUMNS)
        ]
        return torch.cat(columns, dim=1)

    def prepare(
        self, staged: Mapping[str, torch.Tensor], *, finite: bool, expected: Collection[str] = frozenset()
    ) -> None:
        """Make ready what `commit` needs, from this slot's parameters in `staged` (by model name). Off the live model:
        a packing is made on a copy of the module's shell. `finite`: no element is known to be NaN or infinite. What
        `proof` must find in the parameters in `expected` will be said with `expect`; that of others is read here."""
        values = {own: staged[name] for own, name in self.parameters.items() if name in staged}
        if not self.packs:
            # As tensors of their own, by which it is known who else still has the memory.
            self._ready = {own: value.detach() for own, value in values.items()}
            for own, value in values.items():
                if self.parameters[own] not in expected:
                    self._expected[own] = [(0, value.numel(), scan(value))]
            return
        layer: Any = self.module
        shell = _shell(layer, values)
        weight = values["weight"]
        # With NaN or Inf, which somebody asked for, no product can be told from another.
        if finite or all_finite(weight):
            # Neighbours, from a random place on: each row's share of them is one cache line.
            first = random.randrange(max(weight.shape[1] - _ASKED_COLUMNS, 0) + 1)
            columns = list(range(first, min(first + _ASKED_COLUMNS, weight.shape[1])))
            self._question = (shell, columns, weight[:, columns[0] : columns[-1] + 1].clone())
        with torch.no_grad():
            layer.quant_method.process_weights_after_loading(shell)
        before = self.module.__dict__
        self._attributes = {k: v for k, v in shell.__dict__.items() if k not in _TORCH and before.get(k) is not v}
        for own in values:
            made, live = getattr(shell, own).detach(), getattr(self.module, own)
            if made.numel() != live.numel():
                raise UnsupportedError(f"{self.parameters[own]} was packed into another shape than the live one")
            if made.numel():
                self._ready[own] = made
                self._expected[own] = [(0, made.numel(), scan(made))]

    def expect(self, arrived: Mapping[str, Sequence[tuple[int, int, Scan]]]) -> None:
        """What `proof` must find in parameters that are kept as they were sent: by their names in the model, runs of
        elements: the first, how many, and the scan that they arrived with."""
        if not self.packs:
            self._expected |= {own: arrived[name] for own, name in self.parameters.items() if name in arrived}

    def ask(self) -> None:
        """Raise if a packing made ready is not of the weight it was made from. On the engine's thread: vLLM's oneDNN
        products share one scratchpad and one cache of primitives, so none may run beside those of a model step."""
        if self._question is None:
            return
        shell, columns, expected = self._question
        self._question = None
        if not torch.equal(_ask(shell, columns), expected):
            raise UnsupportedError(
                f"the packing of {self.parameters['weight']} does not hold the weight it was made from",
                next_step="This kernel cannot be updated exactly.",
            )
        self._proof = "asked"

    def commit(self) -> None:
        """Make it live. On the engine's thread, between two model steps."""
        for own, value in self._ready.items():
            parameter = getattr(self.module, own)
            if parameter.data_ptr() == value.data_ptr():
                continue  # another module shares it, and came first
            if not self.packs and parameter.dtype == value.dtype and is_alone(parameter):
                # They change places: the next update is staged in what was live.
                before = self._ready[own] = parameter.data
                parameter.data = value
            else:
                before = parameter.data.clone() if self.undoable else None
                parameter.data.copy_(value)
            if self.undoable:
                self._replaced[own] = before
        for attribute, value in self._attributes.items():
            if self.undoable:
                self._packing[attribute] = self.module.__dict__.get(attribute, _ABSENT)
            setattr(self.module, attribute, value)

    def undo(self) -> None:
        """Put back what `commit` has replaced, however far it came; it must have been `undoable`."""
        for own, value in self._replaced.items():
            getattr(self.module, own).data.copy_(value)
        for attribute, value in self._packing.items():
            if value is _ABSENT:
                self.module.__dict__.pop(attribute, None)
            else:
                self.module.__dict__[attribute] = value

    def release(self) -> Iterator[torch.Tensor]:
        """Let go of all memory that this slot had for parameters of its module; gives that which they can be staged
        in the next time, one after the other: what was staged, or what has changed places with it."""
        self._replaced.clear()
        while self._ready:
            yield self._ready.popitem()[1]

    def proof(self) -> dict[str, Proof]:
        """How each parameter of this slot was proven; raises when one is not what was staged."""
        for own, runs in self._expected.items():
            live = getattr(self.module, own).detach().cpu().reshape(-1)
            if any(scan(live[at : at + count]) != expected for at, count, expected in runs):
                raise VerificationError(f"{self.parameters[own]} was read back and is not what was staged")
        for attribute, value in self._attributes.items():
            if self.module.__dict__.get(attribute) is not value:
                raise VerificationError(f"{self.parameters['weight']}: its packing was replaced by somebody else")
        return dict.fromkeys(self.parameters.values(), self._proof if self.packs else "read back")


def find_slots(model: torch.nn.Module, twin: torch.nn.Module) -> list[Slot]:
    """A slot for each module of the live model that holds parameters of the twin; refuses what is not known exactly."""
    _refuse_derived_weights(model)
    slots = []
    for path, shadow in twin.named_modules(remove_duplicate=False):
        own = {name: f"{path}.{name}".lstrip(".") for name, p in shadow._parameters.items() if p is not None}
        if own:
            module = _live(model, path, shadow)
            slots.append(Slot(module, own, _packs(module)))
    _use_first_names(slots, twin)
    for slot in slots:
        _refuse_unknown(slot, twin)
    _refuse_other_ties(slots)
    return slots


def refuse_infinite(name: str, staged: torch.Tensor) -> None:
    """Raise if what was finite as it arrived is not in the engine's dtype."""
    if not all_finite(staged):
        raise NonFinite(
            f"{name} is not finite in the engine's {staged.dtype}",
            next_step="Nothing was changed. Serve in a wider dtype, or publish with finite=False.",
        )


_TORCH = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}


def _shell(module: torch.nn.Module, parameters: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    shell = object.__new__(type(module))
    shell.__dict__.update(module.__dict__)
    for kept in _TORCH & module.__dict__.keys():
        shell.__dict__[kept] = type(module.__dict__[kept])(module.__dict__[kept])
    for own, value in parameters.items():
        shell._parameters[own] = torch.nn.Parameter(value, requires_grad=False)
    return shell


def _packs(module: torch.nn.Module) -> bool:
    """Whether the module's kernel multiplies with a packing of its own. Where oneDNN has no product for the dtype
    (bfloat16 on a CPU with AVX2 only) vLLM takes torch's, which multiplies with the weight that it is given."""
    layer: Any = module
    if "cpu_linear" not in module.__dict__:
        return False
    if layer.weight.dim() != 2 or not layer.weight.numel():
        return True
    other = layer.weight.new_zeros(3 if len(layer.weight) == 2 else 2, layer.weight.shape[1])
    with torch.no_grad():
        return bool(layer.cpu_linear(other[:1], other, None).shape[-1] != len(other))


def _ask(module: torch.nn.Module, columns: list[int]) -> torch.Tensor:
    """Columns of a packed weight, exactly: the module's own kernel on unit vectors, of which each product is a weight
    times one plus zeros."""
    layer: Any = module
    width = layer.weight.shape[-1] if layer.weight.dim() == 2 else layer.input_size_per_partition
    units = torch.zeros(len(columns), width, dtype=layer.weight.dtype)
    units[torch.arange(len(columns)), columns] = 1
    with torch.no_grad():
        return layer.cpu_linear(units, layer.weight, None).t()  # type: ignore[no-any-return]


def _live(model: torch.nn.Module, path: str, shadow: torch.nn.Module) -> torch.nn.Module:
    module: Any = model
    for part in path.split(".") if path else ():
        module = getattr(getattr(module, "base_layer", module), part)
    module = getattr(module, "base_layer", module)  # what LoRA puts around a layer
    if type(module) is not type(shadow):
        raise UnsupportedError(
            f"{path} is a {type(module).__name__} in the live model and was built as a {type(shadow).__name__}"
        )
    return module


def _use_first_names(slots: list[Slot], twin: torch.nn.Module) -> None:
    # A shared parameter is staged once, under the first of its names.
    first = {id(p): name for name, p in reversed(list(twin.named_parameters(remove_duplicate=False)))}
    parameters = dict(twin.named_parameters(remove_duplicate=False))
    for slot in slots:
        slot.parameters = {own: first[id(parameters[name])] for own, name in slot.parameters.items()}


def _refuse_unknown(slot: Slot, twin: torch.nn.Module) -> None:
    module, names = slot.module, list(slot.parameters.values())
    method = getattr(module, "quant_method", None)
    if method is not None and type(method).__name__ not in _KNOWN_METHODS:
        raise UnsupportedError(
            f"{names[0]} belongs to a {type(module).__name__} with {type(method).__name__}",
            next_step="Mixture-of-experts and quantised layers cannot be updated exactly yet.",
        )
    for own, name in slot.parameters.items():
        live, loaded = getattr(module, own, None), twin.get_parameter(name)
        same = live is not None and tuple(live.shape) == tuple(loaded.shape) and live.is_contiguous()
        packed = slot.packs and own == "weight" and live is not None and live.numel() == 0 and loaded.dim() == 2
        if not (same or packed):
            raise UnsupportedError(
                f"{name} is {None if live is None else tuple(live.shape)} in the live model and is loaded as"
                f" {tuple(loaded.shape)}"
            )


def _refuse_other_ties(slots: list[Slot]) -> None:
    # vLLM can tie an output head to the embedding after it has loaded both; the twin does not know that.
    names: dict[int, str] = {}
    for slot in slots:
        for own, name in slot.parameters.items():
            live = getattr(slot.module, own)
            if live.numel() and names.setdefault(live.data_ptr(), name) != name:
                raise UnsupportedError(
                    f"{name} and {names[live.data_ptr()]} are one tensor in the live model but two in its configuration"
                )


def _refuse_derived_weights(model: torch.nn.Module) -> None:
    from vllm.model_executor.layers.attention import Attention

    if callable(getattr(model, "process_weights_after_loading", None)):
        raise UnsupportedError(f"{type(model).__name__} derives further weights from those it loads")
    for path, module in model.named_modules():
        if callable(getattr(module, "process_weights_after_loading", None)) and not isinstance(module, Attention):
            raise UnsupportedError(f"{path} ({type(module).__name__}) derives further weights from those it loads")
