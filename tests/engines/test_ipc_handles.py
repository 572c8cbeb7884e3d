"""Handles of shared GPU memory: only plain data that agrees with what was announced is taken for one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from weightwire.engines.vllm.ipc_handles import Shared, for_device, read
from weightwire.errors import ManifestError, ShapeMismatch, TransportError, WeightwireError
from weightwire.updates.manifest import TensorSpec

SPEC = TensorSpec(name="w", dtype="bfloat16", shape=(4, 6))
FACTS = {
    "class": torch.Tensor,
    "size": torch.Size([4, 6]),
    "stride": (6, 1),
    "offset": 8,
    "storage class": torch.storage.TypedStorage,
    "dtype": torch.bfloat16,
    "device": 3,
    "handle": b"c" * 66,
    "nbytes": 64,
    "start": 512,
    "grad": False,
    "counter": b"/torch_123_456_0",
    "counter offset": 7,
    "event": b"e" * 64,
    "wait": True,
}


def never(*_: Any) -> Any:
    raise AssertionError("the function of a handle was called")


def handle(**changes: Any) -> Any:
    return never, tuple({**FACTS, **{name.replace("_", " "): value for name, value in changes.items()}}.values())


def test_what_reduce_tensor_gives_is_read() -> None:
    assert read(SPEC, handle()) == Shared(
        spec=SPEC, offset=8, handle=b"c" * 66, nbytes=64, start=512, counter=b"/torch_123_456_0", counter_offset=7,
        event=b"e" * 64, wait=True,
    )  # fmt: skip


def test_lists_and_names_do_as_well() -> None:
    _, arguments = handle(size=[4, 6], stride=[6, 1], dtype="bfloat16", counter="/torch_123_456_0")
    assert read(SPEC, [None, list(arguments)]) == read(SPEC, handle())


def test_the_stride_of_a_single_row_means_nothing() -> None:
    spec = TensorSpec(name="w", dtype="bfloat16", shape=(1, 6))
    assert read(spec, handle(size=(1, 6), stride=(99, 1))).spec == spec


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"size": (4, 7)}, ShapeMismatch),
        ({"size": (4,)}, ShapeMismatch),
        ({"size": "46"}, ManifestError),
        ({"size": (4, True)}, ManifestError),
        ({"stride": (1, 4)}, ShapeMismatch),
        ({"stride": (6,)}, ShapeMismatch),
        ({"stride": (6, -1)}, ManifestError),
        ({"dtype": torch.float16}, ShapeMismatch),
        ({"offset": 9}, ShapeMismatch),  # one element beyond the end
        ({"offset": -1}, ManifestError),
        ({"offset": 1 << 70}, ManifestError),
        ({"nbytes": 63}, ShapeMismatch),
        ({"start": -512}, ManifestError),
        ({"start": 1.5}, ManifestError),
        ({"handle": b""}, ManifestError),
        ({"handle": "c" * 66}, ManifestError),
        ({"handle": b"c" * 5000}, ManifestError),
        ({"counter": b"/etc/passwd"}, ManifestError),
        ({"counter": b"/torch_1_2_3/../x"}, ManifestError),
        ({"counter": b"/torch_1_2_3\n"}, ManifestError),
        ({"counter": None}, ManifestError),
        ({"counter_offset": -1}, ManifestError),
        ({"event": None}, ManifestError),
        ({"wait": 1}, ManifestError),
    ],
)
def test_what_does_not_agree_is_refused(changes: dict[str, Any], error: type[WeightwireError]) -> None:
    with pytest.raises(error, match="w"):
        read(SPEC, handle(**changes))


@pytest.mark.parametrize("bad", [None, (), never, (never,), (never, None), (never, (1, 2)), b"pickle", {"a": 1}])
def test_what_is_no_handle_at_all_is_refused(bad: Any) -> None:
    with pytest.raises(ManifestError, match="reduce_tensor"):
        read(SPEC, bad)


def test_a_worker_takes_the_handle_of_its_own_gpu() -> None:
    assert for_device({"gpu-a": 1, "gpu-b": 2}, "gpu-b") == 2
    with pytest.raises(TransportError, match=r"gpu-c, only \['gpu-a'\]"):
        for_device({"gpu-a": 1}, "gpu-c")
    with pytest.raises(TransportError, match="NoneType"):
        for_device(None, "gpu-a")
