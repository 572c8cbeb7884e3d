"""A LoRA adapter as one safetensors body: how `PUT /adapters/{name}` takes it through the steps of an update."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from weightwire.engines.control import Control
from weightwire.errors import ManifestError, WeightwireError
from weightwire.updates.adapter import METADATA_KEY, check_adapter
from weightwire.updates.buckets import Bucket, cut
from weightwire.updates.digest import NO_DIGEST, Scan, scan
from weightwire.updates.manifest import Manifest, decode_manifest, dtype_name
from weightwire.updates.receipt import EngineReceipt

__all__ = ["load_body"]

_BUCKET_BYTES = 32 << 20


async def load_body(control: Control, name: str, version: int | None, body: bytes, timeout: float) -> EngineReceipt:
    """Make `body` the newest revision of `name` on every rank of the engine; `version` None: one more than the newest.
    Raises a `WeightwireError`, and then the revision before it still is the newest."""
    deadline = time.monotonic() + timeout
    tensors, config = await asyncio.to_thread(_parse, body)
    if version is None:
        version = (await control.status((), timeout)).next_version(name)
    # By way of plain data, so that all of it is checked as if a trainer had sent it.
    manifest = decode_manifest(
        {
            "version": version,
            "kind": "adapter",
            "adapter": {"name": name, "config": config},
            "tensors": [_spec_of(name, tensor) for name, tensor in tensors.items()],
            "bucket_bytes": _BUCKET_BYTES,
        }
    )
    check_adapter(manifest.tensors, config)
    begun = await control.begin(manifest, "an HTTP body", timeout, timeout)
    try:
        digests = await _put_all(control, begun.id, manifest, list(tensors.values()), deadline)
        return await control.commit(begun.id, "keep", False, deadline - time.monotonic(), digests)
    except (WeightwireError, asyncio.CancelledError) as error:
        await control.give_up(begun.id, error, "its body could not be taken")
        raise


def _parse(body: bytes) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        tensors = load(body)
        header = msgspec.json.decode(body[8 : 8 + int.from_bytes(body[:8], "little")])
        config = msgspec.json.decode(header.get("__metadata__", {}).get(METADATA_KEY, "null"))
    except (SafetensorError, msgspec.MsgspecError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ManifestError(
            f"not a safetensors body: {error}", next_step="Send what safetensors.torch.save makes."
        ) from error
    if not isinstance(config, Mapping):
        raise ManifestError(
            f"the body's metadata has no {METADATA_KEY!r}",
            next_step="Put the text of adapter_config.json there: save(tensors, metadata={...}).",
        )
    return tensors, dict(config)


def _spec_of(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    return {"name": name, "dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}


async def _put_all(
    control: Control, id: str, manifest: Manifest, tensors: list[torch.Tensor], deadline: float
) -> list[str]:
    scans = [Scan(NO_DIGEST, 0)] * len(tensors)
    for bucket in cut(manifest):
        data = await asyncio.to_thread(_fill, bucket, tensors, scans)
        await control.put(id, bucket.index, data, deadline - time.monotonic())
    return [each.digest.hex() for each in scans]


def _fill(bucket: Bucket, tensors: list[torch.Tensor], scans: list[Scan]) -> bytes:
    data = bytearray(bucket.nbytes)
    for piece in bucket.pieces:
        run = piece.of(tensors[piece.tensor].reshape(-1))
        scans[piece.tensor] += scan(run, piece.start)
        data[piece.offset : piece.offset + run.nbytes] = run.contiguous().view(torch.uint8).numpy().tobytes()
    return bytes(data)
