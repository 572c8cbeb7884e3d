"""Running a verb as a user would, against a real server."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import weightwire as ww
from support import Server, serve, tiny, weights_for
from weightwire.cli.main import main

TOKEN = "the-token"


@dataclass
class Outcome:
    """What a verb came to."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """`run("status", url)`: exit code, stdout, stderr. Nothing of the environment's own tokens is seen."""
    for name in ("WEIGHTWIRE_TOKEN", "WEIGHTWIRE_TOKEN_FILE", "VLLM_API_KEY", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)

    def call(*argv: object) -> Outcome:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in argv])
        except SystemExit as exit:
            code = int(exit.code or 0)
        return Outcome(code, *capsys.readouterr())

    return call


@dataclass
class Served:
    """A server, the engine in it, and what it serves."""

    engine: ww.TransformersEngine
    server: Server

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def model(self) -> torch.nn.Module:
        return self.engine.model


@pytest.fixture
def served(shm_root: Path) -> Iterator[Callable[[], Served]]:
    """Starts a server around a tiny model, each time it is called."""
    with contextlib.ExitStack() as stack:

        def start() -> Served:
            engine = stack.enter_context(contextlib.closing(ww.TransformersEngine(tiny(), name="here")))
            return Served(engine, stack.enter_context(serve(engine, TOKEN)))

        yield start


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint for the tiny model; `changed` are tensors that differ, None leaves one out."""

    def write(seed: int, **changed: torch.Tensor | None) -> Path:
        folder = tmp_path / f"checkpoint-{seed}"
        folder.mkdir()
        tensors = {**weights_for(tiny(), seed), **{name.replace("_", "."): t for name, t in changed.items()}}
        save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")
        return folder

    return write
