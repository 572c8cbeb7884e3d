"""A safetensors checkpoint on disk: one file, or a folder as `save_pretrained` writes it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from weightwire.errors import SourceError
from weightwire.sources.ranks import Ranks
from weightwire.updates.digest import Scan, scan
from weightwire.updates.manifest import TensorSpec

__all__ = ["INDEX", "WHOLE", "CheckpointSource", "open_file"]

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "F32": "float32",
    "I64": "int64",
    "F64": "float64",
}


class CheckpointSource:
    """A `.safetensors` file, or a folder with `model.safetensors` or `model.safetensors.index.json` and its shards.

    Files are mapped, one at a time, never loaded. Tensors come in the order in which they lie on disk. The headers are
    read at once, so a path that cannot work is a `SourceError` here.

    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"w": torch.arange(4.0)}, f"{folder}/model.safetensors")
    ...     source, out = CheckpointSource(folder), torch.empty(2)
    ...     scanned = source.read(0, 1, out)
    >>> out, scanned.nonfinite
    (tensor([1., 2.]), 0)
    """

    ranks: Ranks | None = None
    lora: Mapping[str, Any] | None = None

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.aliases: Mapping[str, str] = {}
        self._path = Path(path).absolute()
        self._open: tuple[Path, Any] | None = None
        self.metadata()

    def metadata(self) -> Sequence[TensorSpec]:
        """Every tensor's name, dtype and shape, from the headers as they are now."""
        self._open = None
        self._places = [(file, spec) for file, names in _files(self._path) for spec in _specs(file, names)]
        if not self._places:
            raise SourceError(f"{self._path} has no tensors in it")
        return [spec for _, spec in self._places]

    def read(self, tensor: int, start: int, out: torch.Tensor) -> Scan:
        """See `Source.read`."""
        file, spec = self._places[tensor]
        if self._open is None or self._open[0] != file:
            self._open = None
            self._open = (file, open_file(file))
        try:
            whole = self._open[1].get_tensor(spec.name)
        except (SafetensorError, RuntimeError) as error:
            raise SourceError(f"{spec.name!r} in {file} could not be read: {error}") from error
        if tuple(whole.shape) != spec.shape or whole.dtype != out.dtype:
            raise SourceError(f"{spec.name!r} in {file} changed while it was being read")
        run = whole.reshape(-1)[start : start + out.numel()]
        out.copy_(run)
        return scan(run, start)

    def release(self) -> None:
        self._open = None


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _files(path: Path) -> Iterator[tuple[Path, list[str] | None]]:
    """The files of a checkpoint with the names to take from each; None for all."""
    if not path.exists():
        raise SourceError(f"there is no {path}", next_step="Pass a local path; nothing is downloaded.")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise SourceError(
                f"{path} is no .safetensors file", next_step="Save the weights as safetensors; pickle is never read."
            )
        yield path, None
    elif (path / WHOLE).is_file():
        yield path / WHOLE, None
    elif (path / INDEX).is_file():
        yield from _shards(path)
    else:
        raise _no_checkpoint(path)


def _shards(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    try:
        index = msgspec.json.decode((folder / INDEX).read_bytes(), type=_Index)
    except (msgspec.MsgspecError, UnicodeDecodeError, OSError) as error:
        raise SourceError(f"{folder / INDEX} is no index of a checkpoint: {error}") from error
    for shard in sorted(set(index.weight_map.values())):
        # An index comes with a checkpoint from anywhere; it may name its neighbours only.
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise SourceError(
                f"{folder / INDEX} names the file {shard!r}",
                next_step="A shard must be a .safetensors file in the same folder.",
            )
        if not (folder / shard).is_file():
            raise SourceError(f"{folder / INDEX} names {shard!r}, which is not there", next_step="Copy every shard.")
        yield folder / shard, [name for name, file in index.weight_map.items() if file == shard]


def _specs(file: Path, names: Sequence[str] | None) -> Iterator[TensorSpec]:
    opened = open_file(file)
    # In the order of their bytes, where this safetensors can tell.
    present: list[str] = getattr(opened, "offset_keys", opened.keys)()
    wanted = set(present if names is None else names)
    if missing := sorted(wanted.difference(present)):
        raise SourceError(f"{file} has no {missing[0]!r}, which the index says it has ({len(missing)} missing)")
    for name in present:
        if name in wanted:
            header = opened.get_slice(name)
            dtype = _DTYPES.get(header.get_dtype())
            if dtype is None:
                raise SourceError(
                    f"{name!r} in {file} has dtype {header.get_dtype()}", next_step=f"Use one of {', '.join(_DTYPES)}."
                )
            yield TensorSpec(name=name, dtype=dtype, shape=tuple(header.get_shape()))


def open_file(file: Path) -> Any:
    """A mapped safetensors file; `SourceError` if it is none."""
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{file} is no readable safetensors file: {error}") from error


def _no_checkpoint(folder: Path) -> SourceError:
    names = sorted(entry.name for entry in folder.iterdir())
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        next_step = f"It has {', '.join(others[:3])}: pass the path of that file, or write an index."
    elif pickles:
        next_step = f"It has {pickles[0]}, but pickle is never read: save with safe_serialization=True."
    else:
        next_step = "Pass the folder that save_pretrained wrote, or a .safetensors file."
    return SourceError(f"{folder} has neither {WHOLE} nor {INDEX}", next_step=next_step)
