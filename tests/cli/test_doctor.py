"""`weightwire doctor`: what this machine can do, and how weights would travel."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest

from weightwire.cli import doctor
from weightwire.engines.vllm import compat

TOKEN = ("--token", "the-token")
NAMES = ["weightwire", "torch", "numba", "shared memory", "gloo", "httpx2", "rich", "vLLM", "vLLM plugin"]


@pytest.fixture(autouse=True)
def quick_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vLLM that has every name: importing the real one takes longer than all these tests."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find("json" if name == "vllm" else name))
    monkeypatch.setattr(compat, "missing_names", list)


def state_of(told: Any, name: str) -> tuple[str, str]:
    (check,) = (check for check in told["checks"] if check["name"] == name)
    return check["state"], check["detail"]


def test_everything_is_looked_at(run: Any) -> None:
    done = run("doctor", "--json")
    assert (done.code, done.err) == (0, "")
    assert [check["name"] for check in done.json["checks"]] == NAMES
    assert {check["state"] for check in done.json["checks"]} == {"ok"}
    assert done.json["engines"] == {}
    assert "MB free" in state_of(done.json, "shared memory")[1]
    assert "127.0.0.1:" in state_of(done.json, "gloo")[1]
    assert "vllm.general_plugins, vllm.endpoint_plugins" in state_of(done.json, "vLLM plugin")[1]


def test_for_people_it_is_a_table(run: Any) -> None:
    done = run("doctor")
    lines = done.out.splitlines()
    assert lines[0].split() == ["what", "state", "detail"]
    assert [line.partition("  ")[0] for line in lines[1:]] == NAMES


def test_a_vllm_without_a_name_is_broken(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing_names() -> list[str]:
        print("INFO vLLM says something on stdout")
        return ["vllm.x.Y.z"]

    monkeypatch.setattr(compat, "missing_names", missing_names)
    done = run("doctor", "--json")
    assert done.code == 1
    state, detail = state_of(done.json, "vLLM")
    assert state == "broken"
    assert "has no vllm.x.Y.z: take vLLM 0.26 to 0.32" in detail
    assert "something on stdout" in done.err


def test_what_is_optional_may_be_missing(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("weightwire.transports.shm.Shm.room", lambda self: 100)

    def version(package: str) -> str:
        if package in ("httpx2", "rich"):
            raise doctor.PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(doctor, "version", version)
    done = run("doctor", "--json")
    assert done.code == 0
    assert state_of(done.json, "vLLM")[0] == "missing"
    assert state_of(done.json, "httpx2") == (
        "missing",
        "URLs cannot be connected to; pip install 'weightwire[client]'",
    )
    assert state_of(done.json, "rich")[0] == "missing"
    state, detail = state_of(done.json, "shared memory")
    assert state == "missing"
    assert "room for two buckets of 100 bytes" in detail


def test_a_plugin_that_is_left_out_is_broken(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    done = run("doctor", "--json")
    assert done.code == 1
    assert state_of(done.json, "vLLM plugin") == (
        "broken",
        "VLLM_PLUGINS=another leaves weightwire out: add it, or use `weightwire serve`",
    )


def test_a_core_package_that_does_not_work_is_broken(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def scan(_: object) -> None:
        raise SystemError("no compiler")

    monkeypatch.setattr("weightwire.updates.digest.scan", scan)
    done = run("doctor")
    assert done.code == 1
    assert "no compiler" in done.out


def test_the_way_to_an_engine_is_shown(run: Any, served: Any, shm_root: Any) -> None:
    here = served()
    done = run("doctor", here.url, *TOKEN)
    assert done.code == 0
    *_, name, ipc, nccl, shm, gloo, http = done.out.splitlines()
    assert all("not on an Nvidia GPU" in line for line in (ipc, nccl))
    assert name == here.url
    assert [line.split() for line in (shm, gloo, http)] == [
        ["shm", "would", "be", "used"],
        ["gloo", "could", "be", "used"],
        ["http", "could", "be", "used"],
    ]
    assert not list(shm_root.iterdir())


def test_why_not_is_shown(run: Any, served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from weightwire import transports

    here = served()
    monkeypatch.setitem(transports._PROBE, "shm", lambda offer: "another container")
    told = run("doctor", here.url, *TOKEN, "--json").json["engines"][here.url]
    reasons = {name: told["reasons"][name] for name in ("shm", "gloo", "http")}
    assert (told["name"], reasons) == ("gloo", {"shm": "another container", "gloo": None, "http": None})


def test_an_engine_that_does_not_answer_is_an_error(run: Any) -> None:
    done = run("doctor", "http://127.0.0.1:1", "--json")
    assert done.code == 1
    assert done.json["errors"][0]["code"] == "engine_lost"
    assert len(done.json["checks"]) == len(NAMES)
    assert "Is the server running" in done.err


def test_what_is_no_url_is_a_wrong_call(run: Any) -> None:
    assert run("doctor", "127.0.0.1:8000").code == 2


@pytest.mark.vllm
def test_this_vllm_has_every_name(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pytest.importorskip("vllm")
    assert run("doctor", "--json").code == 0
    assert "vllm" in sys.modules
