"""`weightwire status`: what servers say of themselves, and which of them say nothing."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from support import weights_for
from weightwire import Publisher
from weightwire.sources import find
from weightwire.updates.manifest import Manifest

TOKEN = ("--token", "the-token")
NOBODY = "http://127.0.0.1:1"


def test_a_server_that_has_had_no_update(run: Any, served: Any) -> None:
    here = served()
    done = run("status", here.url, *TOKEN)
    assert (done.code, done.err) == (0, "")
    header, row = done.out.splitlines()
    assert header.split("  ")[0] == "engine"
    assert [cell.strip() for cell in row.split("  ") if cell.strip()] == [
        here.url, "Sequential", "none yet", "none", "idle", "nobody", "none",
    ]  # fmt: skip


def test_the_last_update_is_shown(run: Any, served: Any) -> None:
    here = served()
    with Publisher(weights_for(here.model, 1), here.engine) as publisher:
        publisher.publish(7)
    done = run("status", here.url, *TOKEN)
    assert "version 7: 4 parameters, 0.0 MB over shm, paused" in done.out
    told = run("status", here.url, *TOKEN, "--json").json["engines"][here.url]
    assert (told["version"], told["state"], told["receipt"]["version"]) == (7, "idle", 7)


def test_who_holds_an_engine_is_shown(run: Any, served: Any) -> None:
    here = served()
    specs = tuple(find(weights_for(here.model, 1), timeout=9.0).metadata())
    begun = here.engine.begin(Manifest(version=3, tensors=specs), holder="trainer:1", lease=600.0, timeout=60.0)
    done = run("status", here.url, *TOKEN)
    assert "staging" in done.out
    assert "trainer:1, sending version 3, " in done.out
    here.engine.abort(begun.id, timeout=60.0)


def test_why_an_engine_is_poisoned_is_shown(run: Any, served: Any) -> None:
    here = served()
    here.engine.receiver.poison("the bus is on fire")
    assert "poisoned: the bus is on fire" in run("status", here.url, *TOKEN).out


def test_one_that_does_not_answer_hides_no_other(run: Any, served: Any) -> None:
    here = served()
    done = run("status", NOBODY, here.url, *TOKEN)
    assert done.code == 1
    assert here.url in done.out
    assert NOBODY not in done.out
    assert f"{NOBODY}: status: no connection" in done.err
    told = run("status", NOBODY, here.url, *TOKEN, "--json")
    assert told.code == 1
    assert told.json["engines"][NOBODY]["error"]["code"] == "engine_lost"
    assert told.json["engines"][here.url]["state"] == "idle"


def test_without_the_token_nothing_is_told(run: Any, served: Any) -> None:
    here = served()
    done = run("status", here.url)
    assert (done.code, done.out) == (1, "")
    assert "needs the server's token" in done.err


@pytest.mark.parametrize("urls", [(), ("127.0.0.1:8000",), (NOBODY, NOBODY)])
def test_a_wrong_call_is_code_2(run: Any, urls: Any) -> None:
    assert run("status", *urls).code == 2


def test_on_a_terminal_it_is_a_table(run: Any, served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    here = served()
    here.engine.receiver.poison("[bold]not markup[/bold]")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    done = run("status", here.url, *TOKEN)
    assert "─" in done.out or "━" in done.out
    assert "[bold]not markup[/bold]" in done.out


def test_on_a_terminal_without_rich_it_is_plain(run: Any, served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    here = served()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = run("status", here.url, *TOKEN)
    assert done.out.startswith("engine ")
