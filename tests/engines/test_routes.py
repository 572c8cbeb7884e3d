"""The HTTP calls over a real server: who may, what they take, and what a client that misbehaves cannot do."""

from __future__ import annotations

import contextlib
import functools
import hmac
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import weightwire as ww
from support import Server, same, serve, snapshot, tiny, weights_for
from support.cases import cases
from weightwire.engines import routes
from weightwire.sources import find
from weightwire.updates.buckets import cut
from weightwire.updates.manifest import Manifest

TOKEN = "a-token-of-some-length"
BASE = "/v1/weightwire"
NOBODY = "0" * 32
UPDATE_CALLS = [
    ("POST", f"/updates/{NOBODY}/stage"),
    ("PUT", f"/updates/{NOBODY}/buckets/0"),
    ("POST", f"/updates/{NOBODY}/seal"),
    ("POST", f"/updates/{NOBODY}/commit"),
    ("DELETE", f"/updates/{NOBODY}"),
]
ADAPTER_CALLS = [(method, "/adapters/policy") for method in ("PUT", "GET", "DELETE")]
CALLS = [("GET", "/status"), ("POST", "/updates"), *UPDATE_CALLS, *ADAPTER_CALLS]


class Client:
    """One connection that is kept, and nothing between the test and the wire."""

    def __init__(self, server: Server, token: str | None = TOKEN) -> None:
        self._server, self._token = server, token
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)

    def call(
        self, method: str, path: str, body: Any = None, *, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and parsed answer. A body that is not bytes is sent as JSON."""
        token = {} if self._token is None else {routes.TOKEN_HEADER: self._token}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            self._connection.request(method, BASE + path, data, {**token, **(headers or {})})
            response = self._connection.getresponse()
            content = response.read()
        except http.client.RemoteDisconnected:
            self._connection.close()
            raise
        return response.status, json.loads(content) if content else None

    def close(self) -> None:
        self._connection.close()


class Here:
    """A server with an engine of 4 tensors, and what must still be true of it after each call."""

    def __init__(self, server: Server, engine: ww.TransformersEngine) -> None:
        self.server, self.engine, self.model = server, engine, engine.model
        self.old = snapshot(engine.model)
        self.weights = weights_for(engine.model, 1)
        self.manifest = Manifest(
            version=1, tensors=tuple(find(self.weights, timeout=9.0).metadata()), bucket_bytes=4096
        )
        self.client = Client(server)

    def plain(self) -> dict[str, Any]:
        """A body for `POST /updates` that is right."""
        tensors = [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in self.manifest.tensors]
        manifest = {"version": 1, "tensors": tensors, "bucket_bytes": 4096}
        return {"manifest": manifest, "holder": "a test", "lease": 60.0}

    def begin(self, **more: Any) -> str:
        status, answer = self.client.call("POST", "/updates", self.plain() | more)
        assert status == 201
        return str(answer["id"])

    def unchanged(self) -> bool:
        """Nothing was changed, and nobody holds the engine."""
        status = self.engine.receiver.status()
        return (status["state"], status["version"], status["update"]) == ("idle", None, None)

    def untouched(self) -> bool:
        return self.unchanged() and same(self.model, self.old)


@pytest.fixture(scope="module")
def shared() -> Iterator[Here]:
    """For tests that leave it as it was."""
    engine = ww.TransformersEngine(tiny(), name="here")
    with contextlib.closing(engine), serve(engine, TOKEN) as server:
        here = Here(server, engine)
        yield here
        here.client.close()
        assert here.untouched()


@pytest.fixture
def here(shm_root: Any, no_threads_left: None) -> Iterator[Here]:
    """For tests that update it."""
    engine = ww.TransformersEngine(tiny(width=64), name="here")
    with contextlib.closing(engine), serve(engine, TOKEN) as server:
        made = Here(server, engine)
        yield made
        made.client.close()


def is_error(answer: Any, *, code: str | None = None) -> bool:
    """Whether an answer has the OpenAI shape and says what is wrong."""
    error = answer["error"]
    return (
        error.keys() == {"message", "type", "param", "code", "weightwire"}
        and bool(error["message"])
        and hasattr(ww, error["type"])
        and error["code"] == error["weightwire"]["code"]
        and code in (None, error["code"])
    )


# -- who may -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), CALLS)
@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "é"])
def test_without_the_token_no_call_does_anything(shared: Here, method: str, path: str, token: str | None) -> None:
    stranger = Client(shared.server, token)
    with contextlib.closing(stranger):
        status, answer = stranger.call(method, path, None if method in ("GET", "DELETE") else shared.plain())
    assert status == 401
    assert is_error(answer, code="unauthorized")
    assert "token" in answer["error"]["message"]
    assert TOKEN not in json.dumps(answer)
    assert shared.untouched()


def test_every_route_is_in_the_list_above(shared: Here) -> None:
    paths = shared.server.app.openapi()["paths"]
    listed = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    places = {NOBODY: "{id}", "/buckets/0": "/buckets/{n}", "/policy": "/{name}"}
    named = {(m, BASE + functools.reduce(lambda p, a: p.replace(a, places[a]), places, path)) for m, path in CALLS}
    assert listed == named


def test_without_the_token_an_update_under_way_is_safe(shared: Here) -> None:
    id = shared.begin()
    stranger = Client(shared.server, "wrong")
    try:
        for method, path in UPDATE_CALLS:
            body = None if method == "DELETE" else {"address": "shm:", "digests": []}
            assert stranger.call(method, path.replace(NOBODY, id), body)[0] == 401
        held = shared.engine.receiver.status()["update"]
        assert (held["id"], held["received"]) == (id, 0)
    finally:
        stranger.close()
        assert shared.client.call("DELETE", f"/updates/{id}")[0] == 204


@pytest.mark.parametrize("verdict", [True, False])
def test_the_comparison_that_decides_takes_constant_time(
    shared: Here, monkeypatch: pytest.MonkeyPatch, verdict: bool
) -> None:
    compared: list[tuple[int, int]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return verdict

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for token in ("wrong", "x" * 5000, TOKEN):
        with contextlib.closing(Client(shared.server, token)) as client:
            assert client.call("GET", "/status")[0] == (200 if verdict else 401)
    assert compared == [(32, 32)] * 3


def test_a_server_without_a_token_admits_nobody(shared: Here) -> None:
    with serve(shared.engine, "") as server:
        for token in (None, "", "anything"):
            with contextlib.closing(Client(server, token)) as client:
                for method, path in CALLS:
                    status, answer = client.call(method, path)
                    assert status == 401
                    assert "started without a token" in answer["error"]["message"]
                    assert "weightwire serve" in answer["error"]["message"]


def test_a_server_that_wants_no_token_admits_everybody(shared: Here, tmp_path: Any) -> None:
    with serve(shared.engine, None) as server, contextlib.closing(Client(server, None)) as client:
        assert client.call("GET", "/status")[0] == 200
    with serve(shared.engine, None, unix_socket=str(tmp_path / "s")) as server, ww.connect(server.url) as engines:
        (status,) = engines.status().values()
        assert (status.engine, status.state) == (server.url, "idle")


# -- bodies that are too large -------------------------------------------------------------------------------------


def raw(server: Server, head: str, *chunks: bytes, seconds: float = 60.0) -> bytes:
    """What comes back for a request written by hand; the connection is left open after the last chunk."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        connection.sendall((head + "\r\n").encode())
        with contextlib.suppress(OSError):  # the server may answer and close before it has everything
            for chunk in chunks:
                connection.sendall(chunk)
        return connection.recv(4096)


def head(method: str, path: str, *headers: str) -> str:
    return "".join(f"{line}\r\n" for line in (f"{method} {BASE}{path} HTTP/1.1", "Host: here", *headers))


@pytest.mark.parametrize(("method", "path"), [call for call in CALLS if call[0] in ("POST", "PUT")])
@pytest.mark.parametrize("length", [str(1 << 40), "9" * 18])
def test_an_announced_body_that_is_too_large_is_not_waited_for(
    shared: Here, method: str, path: str, length: str
) -> None:
    answer = raw(shared.server, head(method, path, f"{routes.TOKEN_HEADER}: {TOKEN}", f"Content-Length: {length}"))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"too_large"' in answer
    assert shared.untouched()


def test_a_stranger_is_not_even_asked_how_large(shared: Here) -> None:
    answer = raw(shared.server, head("POST", "/updates", f"Content-Length: {1 << 40}"))
    assert answer.startswith(b"HTTP/1.1 401 ")


def test_a_chunked_body_is_cut_off_at_the_limit(shared: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "MAX_JSON_BODY", 10_000)
    chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
    request = head("POST", "/updates", f"{routes.TOKEN_HEADER}: {TOKEN}", "Transfer-Encoding: chunked")
    # Never ended: the answer comes although more is to follow.
    answer = raw(shared.server, request, *[chunk] * 12)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"more than 10000 bytes" in answer
    assert shared.untouched()


def test_a_bucket_may_be_larger_than_json(shared: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "MAX_JSON_BODY", 100)
    assert shared.client.call("PUT", f"/updates/{NOBODY}/buckets/0", bytes(4096))[0] == 404
    assert shared.client.call("POST", "/updates", shared.plain())[0] == 413


def test_a_body_that_never_comes_is_not_waited_for_for_ever(shared: Here) -> None:
    request = head("POST", "/updates?timeout=0.2", f"{routes.TOKEN_HEADER}: {TOKEN}", "Content-Length: 100")
    answer = raw(shared.server, request, b"{")
    assert answer.startswith(b"HTTP/1.1 504 ")
    assert b"1 bytes of the body arrived within 0.2 s" in answer


# -- bodies that are wrong -----------------------------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["", "\ud800", "\x00", "0.weight", "float32", "x" * 600, "../../etc/passwd", "dense", "ünï", 1e400]
    )
)
junk = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def mutate(draw: Callable[[Any], Any], node: Any) -> Any:
    """A JSON value with something in it gone, doubled, added, or replaced."""
    inner = [k for k, v in (node.items() if isinstance(node, dict) else enumerate(node)) if isinstance(v, (dict, list))]
    if inner and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(inner))
        node[key] = mutate(draw, node[key])
        return node
    how = draw(st.sampled_from(["replace", "replace", "remove", "add", "double", "all"]))
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    if how == "all" or not keys:
        return draw(junk)
    key = draw(st.sampled_from(keys))
    if how == "replace":
        node[key] = draw(junk)
    elif how == "remove":
        del node[key]
    elif isinstance(node, dict):
        node[draw(st.text(max_size=8))] = draw(junk)
    else:
        node.append(node[key] if how == "double" else draw(junk))
    return node


@st.composite
def mutated(draw: Any, valid: dict[str, Any]) -> Any:
    body = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 3))):
        if isinstance(body, (dict, list)):
            body = mutate(draw, body)
    return body


def is_refused(here: Here, body: Any, path: str = "/updates") -> None:
    """The answer is a 4xx that says what is wrong; nothing was changed. What is right after all is given back."""
    status, answer = here.client.call("POST", path, body)
    if status == 201:
        sent = json.loads(body) if isinstance(body, bytes) else body
        assert [t["name"] for t in sent["manifest"]["tensors"]] or sent["manifest"]["partial"] is True
        assert here.client.call("DELETE", f"/updates/{answer['id']}")[0] == 204
    else:
        assert 400 <= status < 500, (status, answer)
        assert is_error(answer)
    assert here.unchanged()


def test_any_json_is_refused(shared: Here) -> None:
    @settings(max_examples=cases(400))
    @given(junk | st.fixed_dictionaries({"manifest": junk}, optional={"holder": junk, "lease": junk}))
    def check(body: Any) -> None:
        is_refused(shared, body)

    check()
    assert shared.untouched()


def test_a_manifest_with_anything_changed_is_refused_or_right(shared: Here) -> None:
    @settings(max_examples=cases(700))
    @given(mutated(shared.plain()))
    def check(body: Any) -> None:
        is_refused(shared, body)

    check()
    assert shared.untouched()


def test_any_bytes_are_refused(shared: Here) -> None:
    valid = json.dumps(shared.plain()).encode()
    cut_off = st.integers(0, len(valid) - 1).map(lambda n: valid[:n])
    spliced = st.builds(lambda n, b: valid[:n] + b + valid[n + len(b) :], st.integers(0, len(valid)), st.binary())

    @settings(max_examples=cases(400))
    @given(st.binary() | st.binary(min_size=500, max_size=5000) | cut_off | spliced)
    def check(body: bytes) -> None:
        is_refused(shared, body)

    check()
    assert shared.untouched()


@pytest.mark.parametrize("depth", [10, 900, 1100, 20_000, 1_000_000])
@pytest.mark.parametrize("opening", [b"[", b'{"manifest":', b'{"manifest":{"tensors":[{"shape":', b'{"a":[', b'"'])
def test_deep_nesting_is_refused(shared: Here, depth: int, opening: bytes) -> None:
    is_refused(shared, opening * depth)
    closing = opening.translate(bytes.maketrans(b"[{", b"]}"), b'":abcdefghijklmnopqrstuvwxyz')[::-1]
    is_refused(shared, opening * depth + b"1" + closing * depth)
    is_refused(shared, b'{"manifest": ' + b"[" * depth + b"]" * depth + b"}")


BIG = "9" * 4000
TENSOR = '{"name": "w", "dtype": "float32", "shape": [%s]}'


@pytest.mark.parametrize(
    "manifest",
    [
        '{"tensors": [], "version": ' + BIG + "}",
        '{"version": -1, "tensors": [%s]}' % (TENSOR % 2),
        '{"version": 1.5, "tensors": [%s]}' % (TENSOR % 2),
        '{"version": 1, "tensors": []}',
        '{"version": 1, "tensors": [%s]}' % (TENSOR % BIG),
        '{"version": 1, "tensors": [%s]}' % (TENSOR % -1),
        '{"version": 1, "tensors": [%s]}' % (TENSOR % ", ".join(["281474976710656"] * 8)),
        '{"version": 1, "tensors": [%s]}' % (TENSOR % ", ".join(["1"] * 9)),
        '{"version": 1, "tensors": [' + TENSOR % 2 + ", " + TENSOR % 2 + "]}",
        '{"version": 1, "version": 2, "tensors": [%s]}' % (TENSOR % 2),
        '{"version": 1, "tensors": [%s], "aliases": {"w": "w"}}' % (TENSOR % 2),
        '{"version": 1, "tensors": [%s], "aliases": {"v": "nobody"}}' % (TENSOR % 2),
        '{"version": 1, "tensors": [%s], "bucket_bytes": 1}' % (TENSOR % 2),
        '{"version": 1, "tensors": [%s], "bucket_bytes": 1e18}' % (TENSOR % 2),
        '{"version": 1, "tensors": [%s], "kind": "pickle"}' % (TENSOR % 2),
        '{"version": 1, "tensors": [%s], "code": "import os"}' % (TENSOR % 2),
        '{"version": 1, "tensors": [{"name": "\\ud800", "dtype": "float32", "shape": []}]}',
        '{"version": 1, "tensors": [{"name": "\\u0000\\u202e", "dtype": "float32", "shape": []}]}',
        '{"version": 1, "tensors": [{"name": "", "dtype": "float32", "shape": []}]}',
        '{"version": 1, "tensors": [{"name": "w", "dtype": "complex64", "shape": []}]}',
        '{"version": 1, "tensors": [{"name": "w", "dtype": "object", "shape": []}]}',
        '{"version": 1, "tensors": [{"name": "w", "dtype": "__class__", "shape": []}]}',
        '{"version": NaN, "tensors": [%s]}' % (TENSOR % 2),
        "null",
    ],
)
def test_a_malformed_manifest_is_refused_and_told_why(shared: Here, manifest: str) -> None:
    status, answer = shared.client.call("POST", "/updates", b'{"manifest": %s}' % manifest.encode())
    assert 400 <= status < 500
    assert is_error(answer)
    assert len(answer["error"]["message"]) < 6000
    assert shared.untouched()


@pytest.mark.parametrize("lease", [0, -1, 3601, 1e400, "60", None, True])
def test_a_lease_is_seconds_up_to_an_hour(shared: Here, lease: Any) -> None:
    is_refused(shared, {**shared.plain(), "lease": lease})


def test_thousands_of_unknown_tensors_are_refused_briefly(shared: Here) -> None:
    tensors = [{"name": f"layer.{n}", "dtype": "float32", "shape": [n]} for n in range(30_000)]
    status, answer = shared.client.call("POST", "/updates", {"manifest": {"version": 1, "tensors": tensors}})
    assert status == 422
    assert is_error(answer, code="unknown_tensor")
    assert len(json.dumps(answer)) < 2000
    assert shared.untouched()


# -- ids, buckets, digests, addresses, seconds ---------------------------------------------------------------------


@given(id=st.text(min_size=1, max_size=40) | st.text("0123456789abcdef", min_size=32, max_size=32))
@settings(max_examples=cases(150))
def test_an_id_of_nobody_is_not_found(id: str) -> None:
    path = quote(id, safe="", errors="surrogatepass")
    for method, call in UPDATE_CALLS:
        body = {"address": "shm:"} if call.endswith("stage") else {"digests": []} if call.endswith("seal") else {}
        sent = None if method == "DELETE" else bytes(4) if method == "PUT" else body
        status, answer = SHARED[0].client.call(method, call.replace(NOBODY, path), sent)
        if "/" in id or id in (".", ".."):
            assert 300 <= status < 500  # no route of ours
        elif method == "DELETE" and len(id) == 32 and set(id) <= set("0123456789abcdef"):
            assert status == 204
        else:
            assert status == 404
            assert is_error(answer, code="update_not_found")
    assert SHARED[0].unchanged()


SHARED: list[Here] = []


@pytest.fixture(autouse=True, scope="module")
def for_examples(shared: Here) -> Iterator[None]:
    """Hypothesis takes no fixtures that live for one test; this one lives for all."""
    SHARED[:] = [shared]
    yield
    SHARED.clear()


@pytest.mark.parametrize("call", ["stage", "seal", "commit"])
def test_any_body_of_any_other_call_is_refused(shared: Here, call: str) -> None:
    id = shared.begin()
    valid = {"stage": {"address": "x:"}, "seal": {"digests": ["0" * 32] * 4}, "commit": {"pause": "keep"}}[call]

    @settings(max_examples=cases(150))
    @given(junk | mutated(valid) | st.binary())
    def check(body: Any) -> None:
        status, answer = shared.client.call("POST", f"/updates/{id}/{call}", body)
        assert 400 <= status < 500, (status, answer)
        assert is_error(answer)
        held = shared.engine.receiver.status()
        if held["update"] is None:  # an address that leads nowhere ends the update
            assert call == "stage"
            again(shared)
        assert held["version"] is None

    def again(here: Here) -> None:
        nonlocal id
        id = here.begin()

    check()
    shared.client.call("DELETE", f"/updates/{id}")
    assert shared.untouched()


@pytest.mark.parametrize(
    "address",
    [
        "", "shm", "shm:../../x", "shm:/etc/passwd", "file:///etc/passwd", "http://169.254.169.254/", "http:", "\x00",
        "gloo:", "gloo:nowhere", "gloo:127.0.0.1:1", "gloo:127.0.0.1:1/k/1/2/3", "gloo:127.0.0.1:x/k/1/2",
        "gloo:127.0.0.1:1/k/a/b", "gloo:127.0.0.1:1/k/0/2", "gloo:127.0.0.1:1/k/2/2", "gloo:127.0.0.1:1//1/2",
        "gloo:127.0.0.1:99999999/k/1/2", "gloo:127.0.0.1:1/k/1/999999999", "gloo:127.0.0.1:1/k/-1/2", "x" * 513,
        "pickle:abc", "cuda-ipc:gASVAAAA", "gloo:127.0.0.1:²/k/1/2",
    ],
)  # fmt: skip
def test_a_bogus_address_is_refused_and_fetched_from_nowhere(shared: Here, address: str) -> None:
    id = shared.begin()
    status, answer = shared.client.call("POST", f"/updates/{id}/stage?timeout=60", {"address": address})
    assert 400 <= status < 500
    assert is_error(answer)
    shared.client.call("DELETE", f"/updates/{id}")
    assert shared.untouched()


def test_an_address_where_nobody_is_ends_the_update(shared: Here) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    id = shared.begin()
    status, answer = shared.client.call("POST", f"/updates/{id}/stage", {"address": f"gloo:127.0.0.1:{port}/k/1/2"})
    assert status == 502
    assert is_error(answer, code="transport")
    assert shared.untouched()


@pytest.mark.parametrize("n", ["-1", "1.0", "x", "²", "٣", "9999999999", "0x0", "%00", "1e0", " 1", "+1", "5"])
def test_a_bogus_bucket_number_is_not_found(shared: Here, n: str) -> None:
    id = shared.begin()
    status, answer = shared.client.call("PUT", f"/updates/{id}/buckets/{quote(n, safe='%')}", bytes(1024))
    assert status == 404
    assert is_error(answer, code="update_not_found")
    shared.client.call("DELETE", f"/updates/{id}")
    assert shared.untouched()


@pytest.mark.parametrize("size", [0, 1, -1, 100_000])
def test_a_bucket_of_another_length_ends_the_update(shared: Here, size: int) -> None:
    id = shared.begin()
    right = cut(shared.manifest)[0].nbytes
    status, answer = shared.client.call("PUT", f"/updates/{id}/buckets/0", bytes(right - 1 if size < 0 else size))
    assert status == 422
    assert f"{right} were announced" in answer["error"]["message"]
    assert shared.client.call("POST", f"/updates/{id}/seal", {"digests": ["0" * 32] * 4})[0] == 404
    assert shared.untouched()


@pytest.mark.parametrize("digest", ["", "0" * 31, "0" * 33, "g" * 32, "A" * 32, 5, None, "0" * 32 + "\n"])
def test_a_bogus_digest_is_refused(shared: Here, digest: Any) -> None:
    id = shared.begin()
    status, answer = shared.client.call("POST", f"/updates/{id}/seal", {"digests": [digest] * 4})
    assert status == 422
    assert is_error(answer, code="manifest")
    shared.client.call("DELETE", f"/updates/{id}")


@pytest.mark.parametrize(
    "seconds", ["", "0", "-1", "nan", "inf", "-inf", "3601", "1e9", "soon", "1,5", "%00", "9" * 400]
)
@pytest.mark.parametrize(("method", "path"), CALLS)
def test_a_bogus_timeout_is_refused(shared: Here, method: str, path: str, seconds: str) -> None:
    bodies = {"updates": shared.plain(), "stage": {"address": "shm:"}, "seal": {"digests": []}, "0": b"1234"}
    status, answer = shared.client.call(method, f"{path}?timeout={seconds}", bodies.get(path.rpartition("/")[2]))
    assert status == 400
    assert is_error(answer, code="usage")
    assert "timeout=" in answer["error"]["message"]
    assert shared.untouched()


@pytest.mark.parametrize("query", ["&".join(["offer=x:"] * 17), "offer=" + "x" * 513])
def test_offers_are_few_and_short(shared: Here, query: str) -> None:
    assert shared.client.call("GET", f"/status?{query}")[0] == 400


def test_bogus_offers_are_answered_with_a_reason(shared: Here) -> None:
    offers = ["", "shm:", "shm:../../../etc/passwd-x", f"shm:{NOBODY}-{NOBODY}", "gloo:x", "gloo:127.0.0.1:1", "ü:"]
    status, answer = shared.client.call("GET", "/status?" + "&".join(f"offer={quote(offer)}" for offer in offers))
    assert status == 200
    assert answer["offers"].keys() == set(offers)
    assert all(answer["offers"].values())


# -- the description -----------------------------------------------------------------------------------------------


def test_the_description_lists_every_body(shared: Here) -> None:
    description = shared.server.app.openapi()
    assert description["openapi"].startswith("3.")
    for path, methods in description["paths"].items():
        for method, call in methods.items():
            assert call["description"]
            named = {parameter["name"] for parameter in call["parameters"] if parameter["in"] == "path"}
            assert named == {part[1:-1] for part in path.split("/") if part.startswith("{")}
            assert ("requestBody" in call) == (method in ("post", "put"))
    begin = description["paths"][f"{BASE}/updates"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert begin["required"] == ["manifest"]
    manifest = begin["properties"]["manifest"]
    assert manifest["required"] == ["version", "tensors"]
    assert manifest["properties"]["tensors"]["items"]["required"] == ["name", "dtype", "shape"]
    put = description["paths"][f"{BASE}/updates/{{id}}/buckets/{{n}}"]["put"]["requestBody"]
    assert put["content"].keys() == {"application/octet-stream"}
    assert "$ref" not in json.dumps(description)


@pytest.mark.filterwarnings("ignore")
def test_what_the_description_allows_is_never_a_server_error(shared: Here) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_dict(shared.server.app.openapi())
    for operation in schema.get_all_operations():
        strategy = operation.ok().as_strategy()

        @settings(max_examples=cases(20))
        @given(strategy)
        def check(case: Any) -> None:
            case.call(base_url=shared.server.url, headers={routes.TOKEN_HEADER: TOKEN})
            assert shared.engine.receiver.status()["version"] is None

        check()
    if (held := shared.engine.receiver.status()["update"]) is not None:
        shared.client.call("DELETE", f"/updates/{held['id']}")
    assert shared.untouched()


# -- whole updates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["http", "shm", "gloo"])
@pytest.mark.parametrize("bucket_bytes", [4096, 64 << 20])
def test_a_publish_over_http_is_exact(here: Here, transport: str, bucket_bytes: int) -> None:
    source = dict(here.weights)
    with (
        ww.connect(here.server.url, token=TOKEN) as engines,
        ww.Publisher(source, engines, transport=transport, bucket_bytes=bucket_bytes) as publisher,
    ):
        assert publisher.explain().engines[here.server.url].usable == ["shm", "gloo", "http"]
        for version in range(2):
            for tensor in source.values():
                tensor.mul_(-1.5)
            receipt = publisher.publish(version)
            mine = receipt.engines[here.server.url]
            assert (mine.engine, mine.transport, mine.version) == (here.server.url, transport, version)
            assert set(mine.proven.values()) == {"read back"}
            assert same(here.model, source)
        assert engines.status()[here.server.url].receipt.version == 1


def test_several_servers_get_one_publish(here: Here) -> None:
    other = ww.TransformersEngine(tiny(width=64), name="other")
    with contextlib.closing(other), serve(other, "another token") as server:
        engines = [
            *ww.connect(here.server.url, token=TOKEN),
            *ww.connect(server.url, token="another token"),
        ]
        with ww.connect(engines) as both, ww.Publisher(here.weights, both, transport="http") as publisher:
            assert sorted(publisher.publish(1).engines) == sorted([here.server.url, server.url])
    assert same(here.model, here.weights)
    assert same(other.model, here.weights)


def test_errors_are_themselves_on_the_other_side(here: Here) -> None:
    with ww.connect(here.server.url, token=TOKEN) as engines:
        with ww.Publisher(here.weights, engines) as publisher:
            publisher.publish(5)
            with pytest.raises(ww.VersionError, match="not newer than 5") as caught:
                publisher.publish(5)
        assert (caught.value.engine, caught.value.phase) == (here.server.url, "begin")
        with ww.Publisher({"x": torch.zeros(2)}, engines) as publisher, pytest.raises(ww.UnknownTensor):
            publisher.publish(6)
    with (
        ww.connect(here.server.url, token="wrong") as engines,
        ww.Publisher(here.weights, engines) as publisher,
        pytest.raises(ww.AuthError, match="--token-file"),
    ):
        publisher.publish(6)
    assert same(here.model, here.weights)
    assert here.engine.status().version == 5


def test_one_bit_flipped_on_the_wire_is_noticed(here: Here) -> None:
    with ww.connect(here.server.url, token=TOKEN) as engines:
        put = engines[0].put

        def flip(id: str, index: int, body: memoryview, *, timeout: float) -> None:
            data = bytearray(body)
            data[-1] ^= 0x80 if index == 2 else 0
            put(id, index, memoryview(data), timeout=timeout)

        engines[0].put = flip
        with ww.Publisher(here.weights, engines, transport="http", bucket_bytes=4096) as publisher:
            with pytest.raises(ww.VerificationError, match="1 of 4 tensors arrived with another digest"):
                publisher.publish(1)
            assert here.untouched()
            engines[0].put = put
            publisher.publish(1)
    assert same(here.model, here.weights)


@pytest.mark.parametrize("watch", [0.0002, 1.0])
def test_a_slow_body_arrives_whole(here: Here, monkeypatch: pytest.MonkeyPatch, watch: float) -> None:
    # Asking whether the client is still there must not eat what it sends.
    monkeypatch.setattr(routes, "_WATCH_SECONDS", watch)
    id = here.begin()
    for bucket in cut(here.manifest):
        request = head(
            "PUT",
            f"/updates/{id}/buckets/{bucket.index}",
            f"{routes.TOKEN_HEADER}: {TOKEN}",
            f"Content-Length: {bucket.nbytes}",
        )
        with socket.create_connection(("127.0.0.1", here.server.port), timeout=60) as connection:
            connection.sendall((request + "\r\n").encode())
            for _ in range(0, bucket.nbytes, 64):
                connection.sendall(bytes(min(64, bucket.nbytes - _)))
                time.sleep(0.0005)
            assert connection.recv(4096).startswith(b"HTTP/1.1 204 ")
    assert here.engine.receiver.status()["update"]["received"] == len(cut(here.manifest))
    here.client.call("DELETE", f"/updates/{id}")


def test_a_connection_cut_in_a_bucket_changes_nothing(here: Here, caplog: pytest.LogCaptureFixture) -> None:
    id = here.begin()
    request = head("PUT", f"/updates/{id}/buckets/0", f"{routes.TOKEN_HEADER}: {TOKEN}", "Content-Length: 4096")
    for sent in (0, 1, 4095):
        with socket.create_connection(("127.0.0.1", here.server.port), timeout=60) as connection:
            connection.sendall((request + "\r\n").encode() + bytes(sent))
    assert here.client.call("POST", f"/updates/{id}/seal", {"digests": ["0" * 32] * 4})[0] == 409
    assert here.engine.receiver.status()["update"]["received"] == 0
    here.client.call("DELETE", f"/updates/{id}")
    assert here.untouched()
    with ww.connect(here.server.url, token=TOKEN) as engines, ww.Publisher(here.weights, engines) as publisher:
        publisher.publish(1)
    assert same(here.model, here.weights)
    assert not caplog.records


def test_a_trainer_that_dies_between_buckets_changes_nothing(here: Here) -> None:
    id = here.begin()
    first = cut(here.manifest)[0]
    assert here.client.call("PUT", f"/updates/{id}/buckets/0", bytes(first.nbytes))[0] == 204
    # A short lease is what frees the engine; here the next trainer is told to wait for the long one.
    with ww.connect(here.server.url, token=TOKEN) as engines, ww.Publisher(here.weights, engines) as publisher:
        with pytest.raises(ww.BusyError, match="held by a test"):
            publisher.publish(1)
        assert here.engine.status().update["id"] == id
        here.client.call("DELETE", f"/updates/{id}")
        assert here.untouched()
        publisher.publish(1)
    assert same(here.model, here.weights)


def test_a_client_that_hangs_up_during_stage_frees_the_engine(here: Here) -> None:
    id = here.begin()
    body = b'{"address": "shm:"}'
    request = head(
        "POST",
        f"/updates/{id}/stage?timeout=3000",
        f"{routes.TOKEN_HEADER}: {TOKEN}",
        f"Content-Length: {len(body)}",
    )
    with socket.create_connection(("127.0.0.1", here.server.port), timeout=60) as connection:
        connection.sendall((request + "\r\n").encode() + body)
        until(lambda: bool(here.engine.receiver._update and here.engine.receiver._update.jobs))
    until(here.unchanged)
    status, answer = here.client.call("POST", f"/updates/{id}/seal", {"digests": []})
    assert status == 404
    assert "the trainer hung up" in answer["error"]["message"]
    assert here.untouched()
    with ww.connect(here.server.url, token=TOKEN) as engines, ww.Publisher(here.weights, engines) as publisher:
        publisher.publish(1)
    assert same(here.model, here.weights)


def test_an_id_that_another_update_has_is_refused_and_that_one_goes_on(here: Here) -> None:
    id = here.begin(id="ab" * 16)
    status, answer = here.client.call("POST", "/updates", here.plain() | {"id": id})
    assert (status, answer["error"]["type"]) == (400, "UsageError")
    assert "it is under way" in answer["error"]["message"]
    assert here.engine.status().update["id"] == id
    for odd in ("ab" * 15 + "a\n", "AB" * 16, "ab" * 17, "../" * 10 + "ab"):
        assert here.client.call("POST", "/updates", here.plain() | {"id": odd})[0] == 422
    here.client.call("DELETE", f"/updates/{id}")
    assert here.untouched()


def test_a_client_that_hangs_up_while_its_commit_seals_frees_the_engine(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "_WATCH_SECONDS", 0.05)
    id = here.begin(address="shm:", id="ab" * 16)
    assert id == "ab" * 16
    body = json.dumps({"digests": ["0" * 32] * 4}).encode()
    request = head("POST", f"/updates/{id}/commit", f"{routes.TOKEN_HEADER}: {TOKEN}", f"Content-Length: {len(body)}")
    with socket.create_connection(("127.0.0.1", here.server.port), timeout=60) as connection:
        connection.sendall((request + "\r\n").encode() + body)
        until(lambda: bool(here.engine.receiver._update and len(here.engine.receiver._update.jobs) == 2))
    until(here.unchanged)
    assert (
        "the trainer hung up" in here.client.call("POST", f"/updates/{id}/seal", {"digests": []})[1]["error"]["message"]
    )
    assert here.untouched()


def test_a_client_that_hangs_up_during_commit_breaks_nothing_off(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "_WATCH_SECONDS", 0.05)
    id = here.begin()
    source = find(here.weights, timeout=9.0)
    source.metadata()
    digests = []
    for number, tensor in enumerate(here.weights.values()):
        out = torch.empty(tensor.numel())
        digests.append(source.read(number, 0, out).digest.hex())
    put_all(here, id)
    assert here.client.call("POST", f"/updates/{id}/seal", {"digests": digests})[0] == 204
    request = head("POST", f"/updates/{id}/commit", f"{routes.TOKEN_HEADER}: {TOKEN}", "Content-Length: 2")
    holding, release = threading.Event(), threading.Event()

    def hold() -> None:
        with here.engine._lock:
            holding.set()
            release.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert holding.wait(60)
    try:
        # The commit waits for what is being generated; its client does not.
        with socket.create_connection(("127.0.0.1", here.server.port), timeout=60) as connection:
            connection.sendall((request + "\r\n{}").encode())
            time.sleep(0.2)
        time.sleep(0.3)
        assert same(here.model, here.old)
    finally:
        release.set()
        thread.join()
    until(lambda: here.engine.receiver.status()["version"] == 1)
    until(lambda: here.engine.receiver.status()["receipt"] is not None)
    assert same(here.model, here.weights)


def put_all(here: Here, id: str) -> None:
    flat = [tensor.reshape(-1) for tensor in here.weights.values()]
    for bucket in cut(here.manifest):
        body = torch.zeros(bucket.nbytes, dtype=torch.uint8)
        for piece in bucket.pieces:
            run = flat[piece.tensor][piece.start : piece.start + piece.count].contiguous().view(torch.uint8)
            body[piece.offset : piece.offset + run.numel()] = run
        assert here.client.call("PUT", f"/updates/{id}/buckets/{bucket.index}", body.numpy().tobytes())[0] == 204


def until(ready: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)
