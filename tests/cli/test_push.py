"""`weightwire push`: a checkpoint on disk into real servers."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import weightwire as ww
from support import same, snapshot
from weightwire.errors import PoisonedError

TOKEN = ("--token", "the-token")


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_checkpoint_is_pushed_and_told_of(run: Any, served: Any, checkpoint: Any) -> None:
    here, folder = served(), checkpoint(1)
    done = run("push", folder, "--to", here.url, "--version", 7, *TOKEN)
    assert (done.code, done.err) == (0, "")
    assert same(here.model, weights_in(folder))
    first, header, row = done.out.splitlines()
    assert first.startswith("version 7 (dense): 4 tensors")
    assert header.split() == ["engine", "transport", "parameters", "proven", "paused"]
    assert row.startswith(f"{here.url}  shm        4           read back  ")
    assert row.endswith(" ms")


def test_json_is_one_document(run: Any, served: Any, checkpoint: Any) -> None:
    here = served()
    done = run("push", checkpoint(1), "--to", here.url, "--version", 7, *TOKEN, "--json")
    assert (done.code, done.err) == (0, "")
    assert (done.json["version"], done.json["tensors"]) == (7, 4)
    assert done.json["engines"][here.url]["proven"] == dict.fromkeys(snapshot(here.model), "read back")


def test_without_a_version_it_is_one_more_than_any_engine_serves(run: Any, served: Any, checkpoint: Any) -> None:
    one, two = served(), served()
    both = ("--to", one.url, "--to", two.url, *TOKEN, "--json")
    assert run("push", checkpoint(0), "--to", one.url, *TOKEN, "--json").json["version"] == 0
    assert run("push", checkpoint(1), *both).json["version"] == 1
    assert run("push", checkpoint(2), "--to", two.url, *TOKEN, "--version", 41).code == 0
    assert run("push", checkpoint(3), *both).json["version"] == 42
    assert one.engine.status().version == two.engine.status().version == 42


def test_with_a_base_only_what_changed_is_sent(run: Any, served: Any, checkpoint: Any, tmp_path: Path) -> None:
    here, old, new = served(), checkpoint(1), tmp_path / "new"
    shutil.copytree(old, new)
    weights = weights_in(old)
    next(iter(weights.values())).view(-1)[3] += 1
    save_file(weights, new / "model.safetensors")
    to = ("--to", here.url, *TOKEN, "--json")
    assert run("push", old, "--base", old, *to).json["kind"] == "dense"  # nothing is served that it could start from
    done = run("push", new, "--base", old, *to)
    assert (done.json["kind"], done.json["version"]) == ("delta", 1)
    assert same(here.model, weights)
    # A base that the engine does not hold: it says so, and gets everything.
    done = run("push", old, "--base", old, *to)
    assert (done.code, done.json["kind"]) == (0, "dense")
    assert same(here.model, weights_in(old))
    assert run("push", new, "--base", old, *to[:-1]).out.count("of the elements changed") == 1


@pytest.mark.parametrize("how", ["--token", "--token-file", "WEIGHTWIRE_TOKEN", "WEIGHTWIRE_TOKEN_FILE"])
def test_the_token_comes_from_four_places(
    run: Any, served: Any, checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    here, file, flags = served(), tmp_path / "token", []
    file.write_text("the-token\n")
    value = str(file) if how.lower().replace("-", "_").endswith("file") else "the-token"
    if how.startswith("--"):
        flags = [how, value]
        monkeypatch.setenv("WEIGHTWIRE_TOKEN", "a flag comes before the environment")
    else:
        monkeypatch.setenv(how, value)
    assert run("push", checkpoint(1), "--to", here.url, *flags).code == 0


@pytest.mark.parametrize("flags", [(), ("--token", "wrong"), ("--token", "")])
def test_without_the_right_token_nothing_happens(run: Any, served: Any, checkpoint: Any, flags: Any) -> None:
    here = served()
    old = snapshot(here.model)
    done = run("push", checkpoint(1), "--to", here.url, *flags)
    assert (done.code, done.out) == (1, "")
    assert "this call needs the server's token, and was sent none or another. Send it as" in done.err
    assert same(here.model, old)


@pytest.mark.parametrize("content", [None, "", " \n", b"\xff\xfe"])
def test_a_token_file_that_cannot_be_right_is_a_wrong_call(
    run: Any, checkpoint: Any, tmp_path: Path, content: Any
) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    done = run("push", checkpoint(1), "--to", "http://127.0.0.1:1", "--token-file", file)
    assert done.code == 2
    assert str(file) in done.err
    assert "Copy it from the server's machine" in done.err


def test_both_kinds_of_token_are_a_wrong_call(run: Any, tmp_path: Path) -> None:
    done = run("push", tmp_path, "--to", "http://127.0.0.1:1", "--token", "a", "--token-file", "b")
    assert done.code == 2
    assert "not allowed with argument" in done.err


@pytest.mark.parametrize("transport", ["http", "gloo"])
def test_a_transport_is_asked_for_by_name(run: Any, served: Any, checkpoint: Any, transport: str) -> None:
    here = served()
    done = run("push", checkpoint(1), "--to", here.url, *TOKEN, "--transport", transport, "--json")
    assert done.json["engines"][here.url]["transport"] == transport


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--transport", "pigeon"), "no transport 'pigeon'"),
        (("--version", "-1"), "version=-1"),
        (("--deadline", "0"), "both must be positive"),
        (("--pause", "nap"), "invalid choice"),
        (("--version", "x"), "invalid int value"),
        (("--frobnicate",), "unrecognized arguments: --frobnicate"),
    ],
)
def test_a_wrong_call_is_code_2(run: Any, served: Any, checkpoint: Any, flags: Any, says: str) -> None:
    done = run("push", checkpoint(1), "--to", served().url, *TOKEN, *flags)
    assert (done.code, done.out) == (2, "")
    assert says in done.err


@pytest.mark.parametrize(("pause", "kept", "keep_cache"), [("abort", "all", True), ("keep", "running", "running")])
def test_flags_reach_the_publisher(
    run: Any, served: Any, checkpoint: Any, pause: str, kept: str, keep_cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, asked = served(), {}
    commit = here.engine._control.commit

    async def note(id: str, pause: str, keep_cache: Any, timeout: float, digests: Any) -> Any:
        asked.update(pause=pause, keep_cache=keep_cache, timeout=timeout)
        return await commit(id, pause, keep_cache, timeout, digests)

    monkeypatch.setattr(here.engine._control, "commit", note)
    done = run(
        "push", checkpoint(1), "--to", here.url, *TOKEN, "--pause", pause, "--keep-cache", kept, "--deadline", "50"
    )
    assert done.code == 0
    assert (asked["pause"], asked["keep_cache"]) == (pause, keep_cache)
    assert 0 < asked["timeout"] <= 50


def test_less_than_everything_must_be_asked_for(run: Any, served: Any, checkpoint: Any) -> None:
    here = served()
    folder = checkpoint(1, **{"1_bias": None})
    done = run("push", folder, "--to", here.url, *TOKEN)
    assert done.code == 1
    assert "nothing was sent for 1.bias" in done.err
    assert run("push", folder, "--to", here.url, *TOKEN, "--partial").code == 0


def test_nan_must_be_asked_for(run: Any, served: Any, checkpoint: Any) -> None:
    here = served()
    folder = checkpoint(1, **{"1_bias": torch.full((16,), float("nan"))})
    done = run("push", folder, "--to", here.url, *TOKEN)
    assert done.code == 1
    assert "NaN or Inf in 1.bias (16 of 16)" in done.err
    assert run("push", folder, "--to", here.url, *TOKEN, "--allow-nonfinite").code == 0
    assert same(here.model, weights_in(folder))


def test_what_is_no_checkpoint_is_said(run: Any, served: Any, tmp_path: Path) -> None:
    for path, says in ((tmp_path / "nowhere", "there is no"), (tmp_path, "has neither model.safetensors nor")):
        done = run("push", path, "--to", served().url, *TOKEN, "--json")
        assert done.code == 1
        assert says in done.err
        assert done.json["error"]["code"] == "source"


def test_engines_that_end_differently_are_told_apart(run: Any, served: Any, checkpoint: Any) -> None:
    good, bad = served(), served()

    async def commit(*_: object) -> None:
        raise PoisonedError("on fire", next_step="Publish a complete update.")

    bad.engine._control.commit = commit
    done = run("push", checkpoint(1), "--to", good.url, "--to", bad.url, *TOKEN, "--json")
    assert done.code == 1
    assert "1 of 2 engines did not commit" in done.err
    outcomes = done.json["error"]["details"]["outcomes"]
    assert outcomes[good.url]["version"] == 0
    assert outcomes[bad.url]["code"] == "poisoned"


def test_progress_is_for_terminals(run: Any, served: Any, checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    here = served()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    done = run("push", checkpoint(1), "--to", here.url, *TOKEN, "--json")
    assert done.code == 0
    assert "staging" in done.err
    assert done.json["version"] == 0


def test_without_the_client_the_extra_is_named(run: Any, checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    done = run("push", checkpoint(1), "--to", "http://127.0.0.1:1")
    assert done.code == 2
    assert "pip install 'weightwire[client]'" in done.err


def test_an_engine_that_is_not_there_is_named(run: Any, checkpoint: Any) -> None:
    done = run("push", checkpoint(1), "--to", "http://127.0.0.1:1", "--version", "1")
    assert done.code == 1
    assert "http://127.0.0.1:1: " in done.err
    assert "Is the server running" in done.err


def test_a_publisher_of_the_same_checkpoint_does_the_same(served: Any, checkpoint: Any) -> None:
    here, folder = served(), checkpoint(1)
    with ww.connect(here.url, token="the-token") as engines, ww.Publisher(folder, engines) as publisher:
        publisher.publish(3)
    assert same(here.model, weights_in(folder))
