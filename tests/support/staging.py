"""A model whose layers keep their weights as vLLM's do on a CPU, and updates of it in a worker's staged copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from weightwire.engines.vllm.layout import Slot
from weightwire.engines.vllm.recording import record
from weightwire.engines.vllm.spare import Spare
from weightwire.engines.vllm.target import _Staged
from weightwire.sources.tensors import TensorSource
from weightwire.updates.digest import scan
from weightwire.updates.manifest import Manifest

__all__ = ["Layer", "Model", "Updates"]


class Layer(torch.nn.Module):
    """A weight; with `packs`, only what a kernel made of it."""

    def __init__(self, shape: Sequence[int], device: str, packs: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(shape, device=device), requires_grad=False)
        self.input_size_per_partition = shape[-1]
        self.quant_method = self
        if packs and device == "cpu":
            self.process_weights_after_loading(self)

    @staticmethod
    def process_weights_after_loading(layer: torch.nn.Module) -> None:
        packed = layer.weight.detach().clone()
        layer.cpu_linear = lambda x, weight, bias: x @ packed.t()
        layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)


class Model(torch.nn.Module):
    """Layers of these shapes, in float32."""

    def __init__(self, shapes: Sequence[Sequence[int]], device: str, packs: bool = False) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer(shape, device, packs) for shape in shapes)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self.get_parameter(name).data.copy_(tensor)


class Updates:
    """Updates of one model, one after the other, the next one with `weights`."""

    def __init__(self, shapes: Sequence[Sequence[int]], packs: bool) -> None:
        self.live = Model(shapes, "cpu", packs)
        self.weights = {f"layers.{number}.weight": torch.ones(tuple(shape)) for number, shape in enumerate(shapes)}
        self.spare = Spare()
        self.slots = [Slot(layer, {"weight": f"layers.{k}.weight"}, packs) for k, layer in enumerate(self.live.layers)]
        self._twin = Model(shapes, "meta")
        self._manifest = Manifest(version=1, tensors=tuple(TensorSource(self.weights).metadata()))
        self._plan = record(self._twin, self._manifest)
        self._packer = ThreadPoolExecutor(1)

    def begin(self) -> _Staged:
        return _Staged(
            self._manifest, self._plan, self._twin, [s.fresh() for s in self.slots], self._packer, self.spare
        )

    def write(self, staged: _Staged, watch: Callable[[], None] = lambda: None, run: int = 1 << 18) -> None:
        """Everything, `run` elements at a time; `watch` is called after each."""
        for number, spec in enumerate(self._manifest.tensors):
            for start, part in enumerate(self.weights[spec.name].view(-1).split(run)):
                staged.write(number, start * run, part)
                watch()

    def commit(self, staged: _Staged) -> None:
        staged.seal([scan(self.weights[spec.name]) for spec in self._manifest.tensors])
        assert staged.check(float("inf"))
        staged.commit()

    def close(self) -> None:
        self._packer.shutdown()
