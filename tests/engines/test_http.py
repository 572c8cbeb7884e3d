"""The client of an engine's HTTP calls, against servers that are not what it hoped for."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import weightwire as ww
from support import same, serve, tiny, weights_for
from weightwire.updates.manifest import Manifest, TensorSpec

MANIFEST = Manifest(version=1, tensors=(TensorSpec(name="w", dtype="float32", shape=(2,)),))


@contextmanager
def answering(status: int, body: bytes) -> Iterator[tuple[str, list[Any]]]:
    """A server that gives one answer to everything; yields its URL and the headers it was sent."""
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            seen.append(self.headers)
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        thread.join(30)
        server.server_close()


def engine_at(url: str, **options: Any) -> Any:
    return ww.connect(url, **options)[0]


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8000", "ftp://here", "http://", "unix:", "", "file:///etc/passwd", "http://a:99999999", "http://[::1"],
)
def test_what_is_no_url_is_a_usage_error(url: str) -> None:
    with pytest.raises(ww.UsageError):
        engine_at(url)


def test_a_token_that_fits_in_no_header_is_a_usage_error() -> None:
    with pytest.raises(ww.UsageError):
        engine_at("http://127.0.0.1:1", token="日本")


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "httpx2", None)
    with pytest.raises(ww.UsageError, match=r"pip install 'weightwire\[client\]'"):
        engine_at("http://127.0.0.1:1")


def test_where_nobody_listens_the_engine_is_lost() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    engine = engine_at(f"http://127.0.0.1:{port}")
    with pytest.raises(ww.EngineLost, match="Is the server running") as caught:
        engine.status()
    assert (caught.value.engine, caught.value.phase) == (engine.name, "status")
    engine.close()


def test_where_nobody_answers_the_deadline_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightwire.engines.http._GRACE_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        engine = engine_at(f"http://127.0.0.1:{silent.getsockname()[1]}")
        calls = {
            "status": lambda: engine.status(timeout=0.1),
            "begin": lambda: engine.begin(MANIFEST, holder="t", lease=1.0, timeout=0.1),
            "stage": lambda: engine.put("0" * 32, 3, memoryview(b"1234"), timeout=0.1),
            "seal": lambda: engine.seal("0" * 32, [], timeout=0.1),
            "commit": lambda: engine.commit("0" * 32, pause="keep", keep_cache=False, timeout=0.1),
            "abort": lambda: engine.abort("0" * 32, timeout=0.1),
        }
        for phase, call in calls.items():
            with pytest.raises(ww.DeadlineError, match=r"no answer within 0\.1 s") as caught:
                call()
            assert (caught.value.engine, caught.value.phase) == (engine.name, phase)
        engine.close()


@pytest.mark.parametrize(
    ("status", "body", "kind", "match"),
    [
        (200, b"<html>hello</html>", ww.EngineError, "does not speak weightwire"),
        (200, b"{}", ww.EngineError, "does not speak weightwire"),
        (200, b"\xff\xfe", ww.EngineError, "does not speak weightwire"),
        (200, b'{"engine": 5}', ww.EngineError, "does not speak weightwire"),
        (404, b'{"detail": "Not Found"}', ww.EngineError, "add weightwire to VLLM_PLUGINS"),
        (401, b'{"error": "Unauthorized"}', ww.AuthError, "api_key"),
        (401, b'{"error": {"message": "no", "code": "x"}}', ww.AuthError, "api_key"),
        (500, b"\xff\xfeoops", ww.EngineError, "HTTP 500: .*oops"),
        (502, b"[]", ww.EngineError, "HTTP 502"),
        (503, b'{"error": {"weightwire": 5}}', ww.EngineError, "HTTP 503"),
        (503, b'{"error": {"weightwire": {}}}', ww.EngineError, "no message"),
        (409, b'{"error": {"weightwire": {"code": "busy", "message": "m", "details": 3}}}', ww.BusyError, ": m"),
        (418, b'{"error": {"weightwire": {"code": "newer", "message": "m"}}}', ww.EngineError, ": m"),
    ],
)
def test_another_server_is_told_from_ours(status: int, body: bytes, kind: type[ww.WeightwireError], match: str) -> None:
    with answering(status, body) as (url, _):
        engine = engine_at(url)
        with pytest.raises(ww.WeightwireError, match=match) as caught:
            engine.status()
        assert type(caught.value) is kind
        assert caught.value.engine == url
        engine.close()


def test_the_token_and_the_key_are_sent_and_proxies_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    error = {"error": {"weightwire": {"code": "state", "message": "m"}}}
    with answering(409, json.dumps(error).encode()) as (url, seen):
        engine = engine_at(url + "/", token="secret", api_key="key")
        assert engine.name == url
        with pytest.raises(ww.StateError):
            engine.status()
        engine.close()
    (headers,) = seen
    assert (headers["x-weightwire-token"], headers["authorization"]) == ("secret", "Bearer key")


def test_a_longer_deadline_than_the_server_takes_is_no_error(tmp_path: Path) -> None:
    wire = ww.TransformersEngine(tiny(), name="here")
    with serve(wire, None, unix_socket=str(tmp_path / "s")) as server, ww.connect(server.url) as engines:
        with ww.Publisher(new := weights_for(wire.model, 1), engines, deadline=86_400.0) as publisher:
            receipt = publisher.publish(1)
        assert list(receipt.engines) == [server.url]
        assert same(wire.model, new)
        assert engines[0].status(timeout=86_400.0).version == 1
    wire.close()
