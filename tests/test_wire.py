"""Only data crosses a wire, and nothing of it is ever pickled."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import weightwire as ww
from support.server import serve
from weightwire.receiver import Receiver
from weightwire.updates.digest import scan, scan_and_copy

PACKAGE = Path(ww.__file__).parent
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
OBJECT_COLLECTIVES = {"broadcast_object_list", "gather_object", "all_gather_object", "scatter_object_list"}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_file_of_the_package_can_pickle_or_run_what_it_is_sent(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.partition(".")[0] for alias in node.names} & FORBIDDEN_MODULES, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in FORBIDDEN_MODULES, node.lineno
        elif isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            owner = node.func.value.id if _is_attribute_of_a_name(node.func) else ""
            assert not (isinstance(node.func, ast.Name) and name in FORBIDDEN_CALLS), node.lineno
            assert (owner, name) not in {("torch", "load"), ("torch", "save")}, node.lineno
            assert name not in OBJECT_COLLECTIVES, node.lineno
            assert not {keyword.arg for keyword in node.keywords} & {"allow_pickle"}, node.lineno


def _is_attribute_of_a_name(function: ast.expr) -> bool:
    return isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)


@pytest.mark.parametrize("transport", ["shm", "gloo", "http"])
def test_nothing_is_pickled_on_the_way_and_every_message_is_plain(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Linear(300, 200)
    weights = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    answers: list[bytes] = []
    handle = Receiver.handle

    def keep(self: Receiver, op: str, arguments: bytes, body: bytes | None = None) -> bytes:
        msgspec.msgpack.decode(arguments, type=dict[str, Any])
        answers.append(handle(self, op, arguments, body))
        return answers[-1]

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("something was pickled")

    # Compiled now: numba keeps its own code on disk by pickle, which is no wire of ours.
    scan_and_copy(torch.zeros(4), 0, torch.zeros(4))
    scan(torch.zeros(4))
    engine = ww.TransformersEngine(model)
    with serve(engine, token="secret") as server, ww.connect(server.url, token="secret") as engines:
        bodies: list[bytes] = []
        engines[0]._client.event_hooks = {"request": [lambda request: bodies.append(request.read())]}
        monkeypatch.setattr(Receiver, "handle", keep)
        for name in ("dumps", "dump", "loads", "load", "Pickler", "Unpickler"):
            monkeypatch.setattr(pickle, name, forbidden)
        with ww.Publisher(weights, engines, transport=transport, bucket_bytes=65536) as publisher:
            publisher.publish(1)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    for answer in answers:
        msgspec.msgpack.decode(answer)
    plain = 0
    for body in bodies:
        if body[:1] == b"{":
            msgspec.json.decode(body)
            plain += 1
    assert plain >= 2  # begin, and the commit that seals, at least
    if transport == "http":
        # What else was sent is the weights' own bytes.
        raw = b"".join(body for body in bodies if body[:1] != b"{")
        assert weights["weight"].numpy().tobytes()[:50_000] in raw
