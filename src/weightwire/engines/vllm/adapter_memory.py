"""Memory of one adapter's matrices in a worker, and what is kept of it for the next adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from weightwire.engines.vllm.spare import uses
from weightwire.updates.manifest import TensorSpec

__all__ = ["AdapterMemory", "SpareMemory", "is_a"]


def is_a(name: str) -> bool:
    """Whether this matrix is the first of its two, which an input comes to first.

    >>> is_a("base_model.model.q.lora_A.weight"), is_a("base_model.model.q.lora_B.weight")
    (True, False)
    """
    return name.endswith((".lora_A.weight", ".lora_embedding_A"))


class AdapterMemory:
    """All A lie in one piece of memory and all B in another, so that what is done to every matrix is one operation on
    few pieces, not one on each of hundreds of small ones."""

    def __init__(self, specs: Sequence[TensorSpec], dtype: torch.dtype, device: torch.device) -> None:
        self.specs, self.dtype, self.device = specs, dtype, device
        self.sent: dict[str, torch.Tensor] = {}
        """What is sent, by name."""
        self.given: dict[str, torch.Tensor] = {}
        """What vLLM is given: it scales each B in place, and what was sent may be asked for again."""
        self.rows: dict[int, torch.Tensor] = {}
        """What is sent, by its number, in one dimension."""
        self.flat: list[tuple[torch.Tensor, torch.Tensor]] = []
        """The pieces that `sent` and `given` are parts of: of A, which are one, and of B."""
        self._free: torch.cuda.Event | None = None
        self._model: tuple[object, Any, list[int | None]] | None = None
        self._lay_out()
        self._uses = self._count()

    def _lay_out(self) -> None:
        for first in (True, False):
            numbers = [number for number, spec in enumerate(self.specs) if is_a(spec.name) is first]
            sizes = [self.specs[number].numel for number in numbers]
            flat = torch.empty(sum(sizes), dtype=self.dtype, device=self.device)
            own = flat if first else torch.empty_like(flat)
            for number, part, owned in zip(numbers, torch.split(flat, sizes), torch.split(own, sizes), strict=True):
                spec, self.rows[number] = self.specs[number], part
                self.sent[spec.name], self.given[spec.name] = part.view(spec.shape), owned.view(spec.shape)
            self.flat.append((flat, own))

    def free_after(self, stream: torch.cuda.Stream | None) -> None:
        """Not to be written before what `stream` has been given to do by now is done."""
        self._free = None if stream is None else stream.record_event()

    def wait_until_free(self) -> None:
        """Have the current stream wait for that."""
        if self._free is not None:
            torch.cuda.current_stream(self.device).wait_event(self._free)

    def fits(self, specs: Sequence[TensorSpec], dtype: torch.dtype, device: torch.device) -> bool:
        """Whether another adapter's matrices would lie just so, and nobody else has any of it."""
        alike = (self.dtype, self.device) == (dtype, device) and self.specs == specs
        expected = self._uses if self._model is None else self._model[2]
        return alike and None not in self._uses and expected == self._count()

    def prepare(self, pattern: object, make: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        """Have the next adapter's model ready, made by this `pattern` of tensors of its own, so that it is seen for how
        long vLLM keeps them. Not while somebody has any of them."""
        if self._model is None and self._uses == self._count():
            model = make({name: tensor.detach() for name, tensor in self.given.items()})
            self._model = (pattern, model, self._count())

    def take_model(self, pattern: object) -> Any:
        """What was made ready by it, once; else None."""
        model, self._model = self._model, None
        return model[1] if model is not None and model[0] is pattern else None

    def _count(self) -> list[int | None]:
        return [uses(each) for both in self.flat for each in both]


class SpareMemory:
    """Of an adapter that was dropped or is elsewhere by now, kept for the next one: to lay it out takes longer than to
    fill it, and on a CPU so does touching what is new. Any thread may call.

    >>> spare, specs = SpareMemory(), [TensorSpec(name="q.lora_A.weight", dtype="float32", shape=(2, 4))]
    >>> first = spare.take(specs, torch.float32, torch.device("cpu"))
    >>> spare.keep(first)
    >>> spare.take(specs, torch.float32, torch.device("cpu")) is first
    True
    """

    def __init__(self) -> None:
        self._kept: list[AdapterMemory] = []

    def keep(self, memory: AdapterMemory) -> None:
        """Take it back. What was kept before is let go of."""
        self._kept = [memory]

    def clear(self) -> None:
        """Let go of what is kept."""
        self._kept = []

    def fits(self, specs: Sequence[TensorSpec], dtype: torch.dtype, device: torch.device) -> bool:
        """Whether what is kept would do for these matrices."""
        return any(kept.fits(specs, dtype, device) for kept in self._kept)

    def take(self, specs: Sequence[TensorSpec], dtype: torch.dtype, device: torch.device) -> AdapterMemory:
        """Memory for these matrices, whatever it holds."""
        kept, self._kept = self._kept, []
        if kept and kept[0].fits(specs, dtype, device):
            return kept[0]
        return AdapterMemory(specs, dtype, device)
