"""Adapters in a real server with two API processes: names, requests in flight, HTTP bodies, and no file anywhere."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import models
import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save
from watch import watching

import weightwire as ww
from conftest import Server, serving

pytestmark = pytest.mark.alone
PROMPT = [10, 20, 30, 40]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG = {"r": 8, "lora_alpha": 16, "target_modules": LINEARS}


@pytest.fixture(scope="module")
def lora_server(served_model: Any, folder: Path) -> Iterator[Server]:
    flags = (
        *("--dtype", "float32", "--enable-lora", "--max-lora-rank", "16", "--max-loras", "2", "--max-cpu-loras", "3"),
        *("--api-server-count", "2", "--worker-extension-cls", "faults.FaultyWorker"),
    )
    with serving(folder / "model", folder, *flags, VLLM_SERVER_DEV_MODE="1") as running:
        yield running


@pytest.fixture
def policy(served_model: Any) -> Any:
    """A PEFT model on the served base."""
    import copy

    return get_peft_model(copy.deepcopy(served_model), LoraConfig(**CONFIG))


def shaken(model: Any, seed: int) -> Any:
    models.shake_adapter(model, seed)
    return model


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {name.replace(".default.", "."): tensor for name, tensor in state.items() if ".lora_" in name}


def newest(server: Server, name: str = "policy") -> int:
    with server.engines() as engines:
        (listed,) = engines.adapters.list().values()
    return max((each["version"] for each in listed if each["name"] == name), default=0)


def complete(server: Server, model: str, *, tokens: int = 8) -> dict[str, Any]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    reply = server.client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def test_a_published_adapter_is_served_by_name_and_by_version(lora_server: Server, policy: Any) -> None:
    before = newest(lora_server)
    with lora_server.engines() as engines, ww.Publisher(shaken(policy, 1), engines) as publisher:
        receipt = publisher.publish(before + 1)
        first = complete(lora_server, "policy")
        shaken(policy, 2)
        publisher.publish(before + 2)
    assert receipt.engines[lora_server.url].adapter == f"policy@{before + 1}"
    assert first["model"] == f"policy@{before + 1}"
    second = complete(lora_server, "policy")
    assert second["model"] == f"policy@{before + 2}"
    assert second["choices"][0]["text"] != first["choices"][0]["text"]
    pinned = complete(lora_server, f"policy@{before + 1}")
    assert pinned["choices"][0]["text"] == first["choices"][0]["text"]
    listed = {model["id"] for model in lora_server.client.get("/v1/models").json()["data"]}
    assert {"policy", f"policy@{before + 1}", f"policy@{before + 2}"} <= listed


def test_every_api_process_answers_with_the_newest_as_soon_as_publish_has_returned(
    lora_server: Server, policy: Any
) -> None:
    before = newest(lora_server)
    seen: set[int] = set()
    with lora_server.engines() as engines, ww.Publisher(policy, engines) as publisher:
        for version in range(before + 1, before + 9):
            shaken(policy, version)
            publisher.publish(version)
            for said, process in _asked_by_many(lora_server):
                assert said == f"policy@{version}"
                seen.add(process)
    assert len(seen) == 2, "only one of the API processes was asked"


def test_retired_revisions_are_freed_although_one_api_process_is_idle(lora_server: Server, policy: Any) -> None:
    before = newest(lora_server)
    with lora_server.engines() as engines, ww.Publisher(shaken(policy, 3), engines) as publisher:
        for version in range(before + 1, before + 9):
            publisher.publish(version)
    deadline = time.monotonic() + 60
    while (held := lora_server.worker_rpc("adapters_held")[0][0]) > 3:
        assert time.monotonic() < deadline, f"{held} revisions are held"
        time.sleep(1)
    reply = lora_server.client.post("/v1/completions", json={"model": f"policy@{before + 1}", "prompt": PROMPT})
    assert reply.status_code == 404


def test_requests_in_flight_finish_on_their_revision_and_new_ones_get_the_next(
    lora_server: Server, policy: Any
) -> None:
    version = newest(lora_server) + 1
    started, published = threading.Event(), threading.Event()

    def stream(tokens: int) -> list[dict[str, Any]]:
        outputs = []
        while not published.is_set():
            outputs.append(_stream(lora_server, "policy", tokens, started))
        return outputs

    with lora_server.engines() as engines, ThreadPoolExecutor(3) as pool:
        with ww.Publisher(shaken(policy, 4), engines) as publisher:
            publisher.publish(version)
            jobs = [pool.submit(stream, tokens) for tokens in (120, 160, 200)]
            try:
                assert started.wait(120)
                shaken(policy, 5)
                # Enough that the first is retired while it is still in use.
                for later in range(version + 1, version + 5):
                    publisher.publish(later)
                    assert complete(lora_server, "policy", tokens=2)["model"] == f"policy@{later}"
            finally:
                published.set()
        outputs = [output for job in jobs for output in job.result(timeout=180)]
    told = {output["model"] for output in outputs}
    assert f"policy@{version}" in told
    for output in outputs:
        assert output["finish_reason"] == "length"
        assert output["models"] == {output["model"]}, "an output of two revisions"
    # Whatever was published meanwhile, all of one length under one revision said the same.
    texts = {(o["model"] == f"policy@{version}", o["text"][:50]) for o in outputs}
    assert len(texts) == len({model == f"policy@{version}" for model in told})


def test_a_body_from_a_machine_that_shares_nothing(lora_server: Server, policy: Any) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tensors_of(shaken(policy, 6)).items()}
    body = save(tensors, metadata={"adapter_config": json.dumps(CONFIG)})
    version = newest(lora_server, "remote") + 1
    with _api(lora_server) as client:
        reply = client.put("/adapters/remote", content=body)
        assert reply.status_code == 200, reply.text
        assert (reply.json()["version"], reply.json()["adapter"]) == (version, f"remote@{version}")
        assert client.put("/adapters/remote", content=body, params={"version": version + 5}).status_code == 200
        assert client.put("/adapters/remote", content=body, params={"version": version + 5}).status_code == 409
        assert client.get("/adapters/remote").json()["version"] == version + 5
        served = complete(lora_server, "remote")
        with lora_server.engines() as engines, ww.Publisher(policy, engines) as publisher:
            publisher.publish(newest(lora_server) + 1)
        assert served["choices"][0]["text"] == complete(lora_server, "policy")["choices"][0]["text"]
        assert client.delete("/adapters/remote").status_code == 204
        assert client.delete("/adapters/remote").status_code == 404
        assert client.get("/adapters/remote").status_code == 404
    for _ in range(6):
        with httpx.Client(base_url=lora_server.url, trust_env=False, timeout=60) as fresh:
            assert fresh.post("/v1/completions", json={"model": "remote", "prompt": PROMPT}).status_code == 404


def test_bodies_that_are_broken_are_refused_and_the_old_revision_serves(lora_server: Server, policy: Any) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tensors_of(shaken(policy, 7)).items()}
    good = save(tensors, metadata={"adapter_config": json.dumps(CONFIG)})
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__")

    def with_header(**changes: Any) -> bytes:
        changed = json.dumps({**header, name: {**header[name], **changes}}).encode()
        return len(changed).to_bytes(8, "little") + changed + good[8 + length :]

    start, end = header[name]["data_offsets"]
    cases = {
        "truncated": good[:-100],
        "over-long": good + b"\0" * 100,
        "offsets": with_header(data_offsets=[start, end + 4096]),
        "backwards": with_header(data_offsets=[end, start]),
        "shape": with_header(shape=[1 << 40, 1 << 40]),
        "dtype": with_header(dtype="F64"),
        "length": (1 << 62).to_bytes(8, "little") + good[8:],
        "no header": b"\0" * 8,
        "empty": b"",
        "not safetensors": b"\x80\x04cposix\nsystem\n" * 100,
        "no config": save(tensors),
        "config is no JSON": save(tensors, metadata={"adapter_config": "{"}),
        "config is a list": save(tensors, metadata={"adapter_config": "[]"}),
        "rank": save(tensors, metadata={"adapter_config": json.dumps({**CONFIG, "r": 4})}),
        "NaN": save({**tensors, name: torch.full_like(tensors[name], float("nan"))}, metadata=header["__metadata__"]),
    }
    version = newest(lora_server) + 1
    with lora_server.engines() as engines, ww.Publisher(policy, engines) as publisher:
        publisher.publish(version)
    before = complete(lora_server, "policy")
    with _api(lora_server) as client:
        for case, body in cases.items():
            reply = client.put("/adapters/policy", content=body)
            assert 400 <= reply.status_code < 500, (case, reply.text)
            assert reply.json()["error"]["message"], case
        assert client.put("/adapters/no%40name", content=good).status_code == 400
        assert client.put("/adapters/policy", content=good, params={"version": "-1"}).status_code == 400
        reply = client.put("/adapters/policy", content=good, headers={"x-weightwire-token": "wrong"})
        assert reply.status_code == 401
    assert _announced(lora_server, 1 << 40) == 413
    assert newest(lora_server) == version
    after = complete(lora_server, "policy")
    assert (after["model"], after["choices"]) == (before["model"], before["choices"])


@pytest.mark.parametrize("transport", ["shm", "http", "gloo"])
def test_nothing_of_an_adapter_reaches_a_file(lora_server: Server, policy: Any, folder: Path, transport: str) -> None:
    version = newest(lora_server) + 1
    tensors = tensors_of(shaken(policy, 8))
    with lora_server.engines() as engines, ww.Publisher(policy, engines, transport=transport) as publisher:
        publisher.explain()
        with watching() as seen:
            publisher.publish(version)
            complete(lora_server, "policy")
    segments = [path for path in seen.made if path.startswith("/dev/shm/weightwire-")]
    assert seen.made == segments
    assert bool(segments) == (transport == "shm")
    assert not any(Path(path).exists() for path in segments)
    needles = [tensor.numpy().tobytes()[:64] for tensor in tensors.values()]
    for path in seen.written:
        if Path(path).is_file():
            data = Path(path).read_bytes()
            assert not any(needle in data for needle in needles), path


def test_an_engine_without_lora_says_the_flag(server: Server, policy: Any) -> None:
    with server.engines() as engines, ww.Publisher(policy, engines) as publisher:
        with pytest.raises(ww.UnsupportedError, match=r"started without LoRA.*--enable-lora"):
            publisher.publish(1)
        assert engines.adapters.list()[server.url] == []


def test_data_parallel_replicas_are_refused_by_name(served_model: Any, folder: Path, policy: Any) -> None:
    flags = ("--dtype", "float32", "--enable-lora", "--data-parallel-size", "2")
    with serving(folder / "model", folder, *flags) as replicas, replicas.engines() as engines:
        with (
            ww.Publisher(policy, engines) as publisher,
            pytest.raises(ww.UnsupportedError, match="data_parallel_size=2"),
        ):
            publisher.publish(1)


def _api(server: Server) -> httpx.Client:
    headers = {"x-weightwire-token": str(server.token)}
    return httpx.Client(base_url=f"{server.url}/v1/weightwire", headers=headers, timeout=120, trust_env=False)


def _announced(server: Server, nbytes: int) -> int:
    """The answer to a body that is said to be so long, before any of it was sent."""
    address = httpx.URL(server.url)
    with contextlib.closing(http.client.HTTPConnection(address.host, address.port, timeout=60)) as connection:
        connection.putrequest("PUT", "/v1/weightwire/adapters/policy")
        connection.putheader("x-weightwire-token", str(server.token))
        connection.putheader("content-length", str(nbytes))
        connection.endheaders()
        return connection.getresponse().status


def _asked_by_many(server: Server) -> Iterator[tuple[str, int]]:
    """What the model `policy` is to 12 new connections, and the process that each came to."""
    address = httpx.URL(server.url)
    connections = [http.client.HTTPConnection(address.host, address.port, timeout=120) for _ in range(12)]
    body = json.dumps({"model": "policy", "prompt": PROMPT, "max_tokens": 1})
    try:
        for connection in connections:
            connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        for connection in connections:
            port = connection.sock.getsockname()[1]
            reply = json.loads(connection.getresponse().read())
            yield reply["model"], _process_at(server, port)
    finally:
        for connection in connections:
            connection.close()


def _process_at(server: Server, port: int) -> int:
    for process in psutil.Process(server.process.pid).children(recursive=True):
        for connection in process.net_connections("tcp"):
            if connection.raddr and connection.raddr.port == port:
                return int(process.pid)
    raise AssertionError(f"nobody is connected to port {port}")


def _stream(server: Server, model: str, tokens: int, started: threading.Event) -> dict[str, Any]:
    body = {
        "model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
    }  # fmt: skip
    output: dict[str, Any] = {"model": None, "models": set(), "text": "", "finish_reason": None}
    with server.client.stream("POST", "/v1/completions", json=body) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                started.set()
                chunk = json.loads(line[6:])
                output["model"] = chunk["model"]
                output["models"].add(chunk["model"])
                for choice in chunk["choices"]:
                    output["text"] += choice["text"]
                    output["finish_reason"] = choice["finish_reason"] or output["finish_reason"]
    return output
