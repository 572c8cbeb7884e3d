"""Weights as a plain mapping of names to tensors, or as a module's own parameters."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

import torch
from torch.nn.parallel import DistributedDataParallel

from weightwire.errors import SourceError
from weightwire.sources.base import LocalSource, without_aliases

__all__ = ["ModuleSource", "TensorSource", "refuse_without_data", "state_of", "unwrapped", "wrappers"]


class TensorSource(LocalSource):
    """A mapping of names to tensors, whole and in this process.

    >>> TensorSource({"w": torch.zeros(2, 2)}).metadata()
    [TensorSpec(name='w', dtype='float32', shape=(2, 2))]
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._unique, self.aliases = _checked(tensors)

    def named(self) -> Mapping[str, torch.Tensor]:
        return self._unique


class ModuleSource(LocalSource):
    """A module's parameters and persistent buffers under the names of its `state_dict()`, read anew at each publish."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self.named()

    def named(self) -> Mapping[str, torch.Tensor]:
        unique, self.aliases = _checked({name: tensor.detach() for name, tensor in state_of(self._module).items()})
        return unique


def _checked(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    refuse_without_data(tensors)
    return without_aliases(tensors)


def refuse_without_data(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `SourceError` for what is no tensor, on the meta device, or stands for memory that is elsewhere."""
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise SourceError(
                f"expected names and tensors, got {name!r}: {type(tensor).__name__}",
                next_step="Pass a mapping of str to torch.Tensor, such as module.state_dict().",
            )
        if tensor.device.type == "meta":
            raise SourceError(f"{name!r} is on the meta device and has no data", next_step="Load the model first.")
        # Its address is 0, and so is that of others like it, which would pass for tied.
        if tensor.numel() and not tensor.data_ptr():
            raise SourceError(
                f"{name!r} is a {type(tensor).__name__} that has no memory of its own",
                next_step="Pass whole tensors (of a DTensor: full_tensor()), or the module: its ranks are then found.",
            )


def wrappers(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """A module, and what is in it while that is what `torch.compile`, DistributedDataParallel or DeepSpeed wrapped."""
    # Where nobody has imported it, there is none of its engines.
    engine = getattr(sys.modules.get("deepspeed.runtime.engine"), "DeepSpeedEngine", DistributedDataParallel)
    inner: object = module
    while isinstance(inner, torch.nn.Module):
        yield inner
        wraps = isinstance(inner, DistributedDataParallel | engine)
        inner = inner.module if wraps else inner._modules.get("_orig_mod")


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """A module without what is wrapped around it."""
    *_, innermost = wrappers(module)
    return innermost


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A module's own parameters and persistent buffers by checkpoint name, `unwrapped`."""
    state = unwrapped(module).state_dict(keep_vars=True)
    return {n.replace("_orig_mod.", ""): t for n, t in state.items() if isinstance(t, torch.Tensor)}
