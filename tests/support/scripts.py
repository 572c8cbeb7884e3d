"""Scripts that tests run as processes of their own, and what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from weightwire.demo.server import free_port

__all__ = ["Ended", "last_json", "run_ranks"]


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def run_ranks(
    script: Path, *arguments: object, size: int, seconds: float, environment: Mapping[str, str]
) -> list[Ended]:
    """How a script ended on each of `size` ranks, which find each other by torchrun's variables."""
    port = free_port()
    common = {**environment, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(script), *map(str, arguments)]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        said = [rank.communicate(timeout=seconds) for rank in ranks]
        return [Ended(rank.returncode, out, err) for rank, (out, err) in zip(ranks, said, strict=True)]
    finally:
        for rank in ranks:
            rank.kill()


def last_json(output: str) -> dict[str, Any]:
    """The last line that is a JSON object: vLLM may have more to say while it shuts down."""
    return dict(json.loads([line for line in output.splitlines() if line.startswith("{")][-1]))
