"""Whatever goes wrong before the commit: the old version serves on, bit for bit, and the next good update succeeds."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import msgspec
import pytest
import torch

import weightwire as ww
from conftest import ENVIRONMENT, Server
from weightwire.sources.tensors import TensorSource
from weightwire.transports import shm
from weightwire.transports.unix_socket import SocketSender
from weightwire.updates.buckets import Bucket
from weightwire.updates.manifest import Manifest

pytestmark = pytest.mark.alone
PROMPT = [10, 20, 30, 40]


@contextlib.contextmanager
def unchanged(server: Server, served_model: Any) -> Iterator[int]:
    """What happens inside must leave the server as it was; then a good update must succeed. Gives a free version."""
    before, version, segments = server.generate(PROMPT), server.version(), _segments()
    yield (version or 0) + 1
    after = server.generate(PROMPT)
    assert after == before
    assert server.version() == version
    deadline = time.monotonic() + 60
    with server.engines() as engines:
        while engines[0].status().state != "idle":
            assert time.monotonic() < deadline, engines[0].status()
            time.sleep(0.1)
        with ww.Publisher(served_model, engines) as publisher:
            assert publisher.publish((version or 0) + 1).version == (version or 0) + 1
    assert server.generate(PROMPT)["versions"][0][0] == str((version or 0) + 1)
    assert _segments() <= segments


def _segments() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("weightwire-*")}


@pytest.mark.parametrize("size", ["small", "large"])
def test_one_flipped_bit(
    server: Server, served_model: Any, trained: Any, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    sender = SocketSender if size == "small" else shm._Sender
    send, flipped = sender.send, []

    def flip(self: Any, bucket: Bucket) -> None:
        data = self.buffer(bucket) if size == "small" else self._segments[bucket.index % 2].data
        data[bucket.nbytes // 2] ^= 1
        flipped.append(bucket.index)
        send(self, bucket)

    with unchanged(server, served_model) as version, server.engines() as engines:
        monkeypatch.setattr(sender, "send", flip)
        if size == "large":
            monkeypatch.setattr(shm, "_SMALL_UPDATE", 0)
        with (
            ww.Publisher(trained, engines, transport="shm") as publisher,
            pytest.raises(ww.VerificationError, match="another digest"),
        ):
            publisher.publish(version)
        monkeypatch.undo()
    assert flipped


def _other_shape(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = torch.zeros(64)


def _other_model(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.7.mlp.up_proj.weight"] = torch.zeros(256, 128)


def _missing(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.layers.1.self_attn.v_proj.weight"]


def _fused_too_long(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(128, 128)


def _not_finite(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = torch.full((128,), float("nan"))


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (_other_shape, ww.ShapeMismatch, "model.norm.weight"),
        (_other_model, ww.UnknownTensor, "layers.7"),
        (_missing, ww.MissingTensor, "qkv_proj"),
        (_fused_too_long, ww.ShapeMismatch, "k_proj"),
        (_not_finite, ww.NonFinite, r"model.norm.weight \(128 of 128\)"),
    ],
)
def test_weights_that_do_not_fit(
    server: Server, served_model: Any, trained: Any, spoil: Any, error: type[Exception], says: str
) -> None:
    weights = {name: tensor.clone() for name, tensor in trained.state_dict().items() if name != "lm_head.weight"}
    spoil(weights)
    with unchanged(server, served_model) as version, server.engines() as engines:
        with ww.Publisher(weights, engines) as publisher, pytest.raises(error, match=says):
            publisher.publish(version)


def test_a_dtype_that_cannot_be_loaded(server: Server, served_model: Any) -> None:
    with unchanged(server, served_model) as version:
        body = {"manifest": {"version": version, "tensors": [{"name": "w", "dtype": "object", "shape": [1]}]}}
        reply = server.client.post("/v1/weightwire/updates", json=body, headers={"x-weightwire-token": server.token})
        assert reply.status_code == 422
        assert "object" in reply.json()["error"]["message"]


def test_an_old_version_number(server: Server, served_model: Any, trained: Any) -> None:
    with unchanged(server, served_model) as version, server.engines() as engines:
        with ww.Publisher(trained, engines) as publisher:
            for old in {0, max(version - 1, 0)}:
                if server.version() is not None:
                    with pytest.raises(ww.VersionError, match="not newer"):
                        publisher.publish(old)


def test_a_seal_with_wrong_digests(server: Server, served_model: Any, trained: Any) -> None:
    with unchanged(server, served_model) as version, server.engines() as engines:
        engine = engines[0]
        source = TensorSource(dict(trained.state_dict()))
        manifest = Manifest(version=version, tensors=tuple(source.metadata()), aliases=dict(source.aliases))
        begun = engine.begin(manifest, holder="test", lease=30, timeout=30)
        from weightwire.updates.buckets import cut

        for bucket in cut(manifest):
            data = torch.zeros(bucket.nbytes, dtype=torch.uint8)
            for piece in bucket.pieces:
                spec = manifest.tensors[piece.tensor]
                part = data[piece.offset : piece.offset + piece.count * spec.itemsize]
                source.read(piece.tensor, piece.start, part.view(torch.float32))
            engine.put(begun.id, bucket.index, memoryview(data.numpy()), timeout=60)
        with pytest.raises(ww.VerificationError):
            engine.seal(begun.id, ["0" * 32] * len(manifest.tensors), timeout=60)
        with pytest.raises(ww.UpdateNotFound):
            engine.commit(begun.id, pause="keep", keep_cache=False, timeout=60)


def test_the_trainer_is_killed_while_it_sends(server: Server, served_model: Any, folder: Path, tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import sys, time, torch
        import weightwire as ww
        from weightwire.sources.checkpoint import CheckpointSource

        class Slow(CheckpointSource):
            def read(self, tensor, start, out):
                if tensor == 7:
                    print("sending", flush=True)
                    time.sleep(600)
                return super().read(tensor, start, out)

        engines = ww.connect({server.url!r}, token={server.token!r})
        ww.Publisher(Slow({str(folder / "model")!r}), engines, lease=3, bucket_bytes=65536).publish(int(sys.argv[1]))
    """)
    with unchanged(server, served_model) as version:
        command = [sys.executable, "-c", script, str(version)]
        with subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, text=True) as trainer:
            assert trainer.stdout is not None
            assert trainer.stdout.readline() == "sending\n"
            with server.engines() as engines:
                held = engines[0].status()
                assert held.state == "staging"
                with (
                    ww.Publisher(served_model, engines) as second,
                    pytest.raises(ww.BusyError, match=rf"held by .*:{trainer.pid}, .*until 20"),
                ):
                    second.publish(version)
            trainer.send_signal(signal.SIGKILL)


def test_the_connection_is_cut_in_the_middle_of_a_bucket(server: Server, served_model: Any, trained: Any) -> None:
    import socket

    with unchanged(server, served_model) as version, server.engines() as engines:
        source = TensorSource(dict(trained.state_dict()))
        manifest = Manifest(version=version, tensors=tuple(source.metadata()), aliases=dict(source.aliases))
        begun = engines[0].begin(manifest, holder="test", lease=3, timeout=30)
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as wire:
            head = f"PUT /v1/weightwire/updates/{begun.id}/buckets/0 HTTP/1.1\r\nhost: x\r\ncontent-length: 400000\r\n"
            wire.sendall(f"{head}x-weightwire-token: {server.token}\r\n\r\n".encode() + b"x" * 1000)


def test_two_trainers_at_once(server: Server, served_model: Any, trained: Any) -> None:
    with unchanged(server, served_model) as version, server.engines() as engines:
        specs = tuple(TensorSource(dict(trained.state_dict())).metadata())
        specs = tuple(spec for spec in specs if spec.name != "lm_head.weight")
        begun = engines[0].begin(Manifest(version=version, tensors=specs), holder="first", lease=60, timeout=30)
        with ww.Publisher(trained, engines) as publisher, pytest.raises(ww.BusyError, match="held by first") as busy:
            publisher.publish(version)
        assert busy.value.details["until"] > time.time()
        engines[0].abort(begun.id, timeout=30)


@pytest.mark.parametrize("transport", ["shm", "gloo", "http"])
def test_every_transport_carries_the_same_update(
    server: Server, served_model: Any, trained: Any, transport: str
) -> None:
    from reference import apart, logprobs

    version = (server.version() or 0) + 1
    with server.engines() as engines:
        # Many small buckets, and tensors that are split between them.
        with ww.Publisher(trained, engines, transport=transport, bucket_bytes=20_000) as publisher:
            receipt = publisher.publish(version)
        output = server.generate(PROMPT)
        assert apart(output["logprobs"], logprobs(trained, PROMPT, output["tokens"])) < 1e-3
        engine = next(iter(receipt.engines.values()))
        assert engine.transport == transport
        # The server tells anybody who asks what it serves and how it came to that.
        status = engines[0].status()
        assert status.version == version
        assert msgspec.structs.replace(status.receipt, engine=engine.engine) == engine


def test_trainer_groups_stay_usable_beside_gloo(server: Server, trained: Any) -> None:
    import torch.distributed as dist

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with server.engines() as engines, ww.Publisher(trained, engines, transport="gloo") as publisher:
            publisher.publish((server.version() or 0) + 1)
        tensor = torch.ones(2)
        dist.all_reduce(tensor)
        assert tensor.tolist() == [1, 1]
    finally:
        dist.destroy_process_group()


def test_an_api_key_guards_as_well(server: Server) -> None:
    reply = httpx.get(f"{server.url}/v1/weightwire/status", timeout=30)
    assert reply.status_code == 401
    assert reply.json()["error"]["code"] == "unauthorized"
