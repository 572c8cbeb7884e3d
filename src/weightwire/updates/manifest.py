"""The manifest: what an update holds, agreed before any byte travels."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from weightwire.errors import ManifestError

if TYPE_CHECKING:
    import torch  # which is heavy, and not needed here

__all__ = ["DTYPES", "Adapter", "AdapterName", "Manifest", "Staging", "TensorSpec", "decode_manifest", "dtype_name"]

DTYPES: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "float32": 4,
    "int64": 8,
    "float64": 8,
}
"""Bytes per element of every dtype that may travel; the names are torch's."""

MAX_TENSORS = 1_000_000
MAX_BUCKET_BYTES = 1 << 30
_MAX_ELEMENTS = 1 << 48
_DELTA_DTYPES = ("bfloat16", "float16", "float32")
_DELTA_LEAST = 4096
_KEPT = 2  # an update's tensors are mostly those of the one before

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
Dimension = Annotated[int, msgspec.Meta(ge=0, le=_MAX_ELEMENTS)]


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True, cache_hash=True):
    """One tensor of a checkpoint: its name there, its dtype's name, its full (unsharded) shape.

    >>> TensorSpec(name="norm.weight", dtype="bfloat16", shape=(128,)).nbytes
    256
    """

    name: Name
    dtype: str
    shape: Annotated[tuple[Dimension, ...], msgspec.Meta(max_length=8)]

    @functools.cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype]

    @functools.cached_property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


_Tensors = Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1, max_length=MAX_TENSORS)]


def dtype_name(dtype: torch.dtype) -> str:
    """As a `TensorSpec` has it.

    >>> import torch
    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


AdapterName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z", max_length=128)]
"""Of letters, digits, dots, dashes and underscores: it stands in URLs, and before an `@` for its revisions."""


class Adapter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What makes an update one of a LoRA adapter: the name it is served under, and PEFT's config as plain data. `cast`:
    the dtype to which the trainer has cast what was wider, as the engine would have."""

    name: AdapterName
    config: dict[str, Any]
    cast: str | None = None


Staging = Literal["copy", "lent", "none"]
"""Where an update waits until it is checked: in a `copy` on the engine's side, in the trainer's own memory, which is
`lent` until the commit, or in `none`, so that it goes into the live parameters while the engine stands still."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """What an update holds: a whole model, or with `adapter` a LoRA adapter under PEFT's names, of its own versions.

    A delta, of a whole model or of an adapter, holds what changed since `base_version`, for each of `tensors` in
    `encoded` bytes (`updates.delta`), which is what travels in its place (`wire`). An adapter's config is the new one.

    `tensors` are sent in this order. `aliases` are further names of tensors that are sent once (tied weights): an
    engine that knows them as one tensor ignores them, one that keeps them apart fills both. `partial` allows tensors
    to be left out; `finite` refuses NaN and Inf. Both sides cut the same buckets from `bucket_bytes`. `staging` is
    `Staging`. With `keep`, deltas from this update may follow.
    """

    version: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    tensors: _Tensors
    kind: Literal["dense", "delta", "adapter"] = "dense"
    adapter: Adapter | None = None
    base_version: Annotated[int, msgspec.Meta(ge=0)] | None = None
    keep: bool = False
    encoded: Annotated[tuple[Dimension, ...], msgspec.Meta(max_length=MAX_TENSORS)] = ()
    aliases: dict[Name, Name] = {}
    partial: bool = False
    finite: bool = True
    staging: Staging = "copy"
    bucket_bytes: Annotated[int, msgspec.Meta(ge=4096, le=MAX_BUCKET_BYTES)] = 64 << 20

    @functools.cached_property
    def wire(self) -> tuple[TensorSpec, ...]:
        """What travels: `tensors` themselves, or each one's delta as bytes under its name."""
        if self.base_version is None:
            return self.tensors
        sizes = zip(self.tensors, self.encoded, strict=True)
        return tuple(TensorSpec(name=spec.name, dtype="uint8", shape=(nbytes,)) for spec, nbytes in sizes)

    @functools.cached_property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.wire)

    def whole(self) -> Manifest:
        """That of what a delta leads to, as if all of it were sent.

        >>> spec = TensorSpec(name="w", dtype="float32", shape=(2, 4))
        >>> delta = Manifest(version=7, kind="delta", tensors=(spec,), base_version=6, encoded=(96,))
        >>> delta.nbytes, delta.whole().kind, delta.whole().nbytes
        (96, 'dense', 32)
        """
        kind = "dense" if self.kind == "delta" else self.kind
        return msgspec.structs.replace(self, kind=kind, base_version=None, encoded=())

    def check(self) -> Manifest:
        """This manifest, or a `ManifestError` that names the first tensor at fault."""
        if (self.kind == "adapter") != (self.adapter is not None):
            raise ManifestError(f"kind {self.kind!r} {'without' if self.adapter is None else 'with'} an adapter's name")
        if (self.staging != "copy" and self.adapter) or (self.staging == "none" and self.partial):
            raise ManifestError(f"staging {self.staging!r} is for whole models")
        if self.adapter is not None and (self.partial or self.aliases):
            raise ManifestError("of an adapter all tensors are sent, and it has no aliases")
        names = _check_tensors(self.tensors)
        self._check_delta()
        for alias, name in self.aliases.items():
            _check_name(alias)
            if name not in names or alias in names:
                raise ManifestError(
                    f"alias {alias!r} of {name!r}: the first must be no tensor of this update, the second must be one"
                )
        return self

    def _check_delta(self) -> None:
        if self.kind != "adapter" and (self.kind == "delta") != (self.base_version is not None):
            raise ManifestError(f"kind {self.kind!r} with base version {self.base_version}")
        if self.base_version is None:
            if self.encoded:
                raise ManifestError(f"kind {self.kind!r} with sizes of deltas and no base version")
            return
        if self.staging != "copy" or self.partial:
            raise ManifestError("a delta is staged as it is, and is of a whole model")
        if len(self.encoded) != len(self.tensors):
            raise ManifestError(f"{len(self.encoded)} sizes of deltas for {len(self.tensors)} tensors")
        for spec, nbytes in zip(self.tensors, self.encoded, strict=True):
            if spec.dtype not in _DELTA_DTYPES:
                raise ManifestError(f"{spec.name!r} has dtype {spec.dtype!r}, of which there is no delta")
            if nbytes > 2 * spec.nbytes + _DELTA_LEAST:
                raise ManifestError(f"{spec.name!r}: a delta of {nbytes} bytes for {spec.nbytes}")


def _check_name(name: str) -> None:
    if not name.isprintable():
        raise ManifestError(f"{name!r} is not a printable name")


@functools.lru_cache(maxsize=_KEPT)
def _check_tensors(tensors: tuple[TensorSpec, ...]) -> frozenset[str]:
    """Their names."""
    names: set[str] = set()
    for spec in tensors:
        _check_name(spec.name)
        if spec.dtype not in DTYPES:
            raise ManifestError(
                f"{spec.name!r} has dtype {spec.dtype!r}", next_step=f"Send one of {', '.join(DTYPES)}."
            )
        if spec.numel > _MAX_ELEMENTS:
            raise ManifestError(f"{spec.name!r} has {spec.numel} elements, more than {_MAX_ELEMENTS}")
        if spec.name in names:
            raise ManifestError(f"{spec.name!r} is listed twice", next_step="List every tensor once.")
        names.add(spec.name)
    return frozenset(names)


class _Undecoded(Manifest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A manifest whose tensors are JSON still."""

    tensors: msgspec.Raw  # type: ignore[assignment]


class _OnlyTensors(msgspec.Struct):
    tensors: _Tensors


# Made here, and not when they are first needed: msgspec crashes the process if two threads are the first to ask for a
# type whose fields have limits.
_drafts, _tensors = msgspec.json.Decoder(_Undecoded), msgspec.json.Decoder(_OnlyTensors)
msgspec.json.Decoder(Manifest)


@functools.lru_cache(maxsize=_KEPT)
def _decode_tensors(data: bytes) -> tuple[TensorSpec, ...]:
    # Under their name, so that errors say where they are.
    return _tensors.decode(b'{"tensors":%b}' % data).tensors


def decode_manifest(data: bytes | dict[str, Any]) -> Manifest:
    """A checked manifest from JSON or plain data; `ManifestError` says what is wrong and where.

    >>> decode_manifest(b'{"version": 3, "tensors": [{"name": "w", "dtype": "float32", "shape": [2, 2]}]}').nbytes
    16
    """
    try:
        if isinstance(data, dict):
            return msgspec.convert(data, Manifest).check()
        facts = msgspec.structs.asdict(_drafts.decode(data))
        return Manifest(**facts | {"tensors": _decode_tensors(bytes(facts["tensors"]))}).check()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(f"not a manifest: {error}") from error
