"""The demo from start to end: make a policy, serve it, train it, prove it, report."""

from __future__ import annotations

import contextlib
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from weightwire.demo import model, report
from weightwire.demo.progress import Progress
from weightwire.demo.prove import Recording, chosen_versions, prove, record
from weightwire.demo.serving import EngineKind, Mode, serve
from weightwire.demo.train import Step, train
from weightwire.errors import UsageError
from weightwire.publisher import Publisher

__all__ = ["run"]

_FEWEST_STEPS = 3


def run(kind: EngineKind, mode: Mode, *, steps: int, seed: int, report_file: Path, progress: Progress) -> bool:
    """Whether every chosen version was proven. Whatever happens, nothing that was started is left behind."""
    if steps < _FEWEST_STEPS:
        raise UsageError(f"--steps {steps}", next_step=f"Take {_FEWEST_STEPS} or more: three versions are proven.")
    if not report_file.absolute().parent.is_dir():
        raise UsageError(f"--report {report_file}: no such folder", next_step="Make it, or name another file.")
    start = time.monotonic()
    with _stopped_like_ctrl_c(), _one_thread(), tempfile.TemporaryDirectory(prefix="weightwire-demo-") as scratch:
        folder = Path(scratch)
        history, recordings = _learn(_make(seed, mode), kind, mode, steps, folder, progress)
        progress.note(f"proof: {len(recordings)} fresh engines, each loaded with the saved weights of one version")
        verdicts = []
        with contextlib.closing(prove(recordings, kind, mode, folder)) as proofs:
            for verdict in proofs:
                verdicts.append(verdict)
                progress.verdict(verdict)
    report.write(report_file, kind=kind, mode=mode, steps=history, verdicts=verdicts)
    passed = all(verdict.passed for verdict in verdicts)
    progress.end(_summary(history, passed, report_file, time.monotonic() - start))
    return passed


def _make(seed: int, mode: Mode) -> Any:
    # The more elements there are, the less of each step every one of them takes.
    return model.make_policy(seed, width=256) if mode == "delta" else model.make_policy(seed)


def _learn(
    policy: Any, kind: EngineKind, mode: Mode, steps: int, folder: Path, progress: Progress
) -> tuple[list[Step], list[Recording]]:
    progress.note(f"starting the engine: {kind}")
    start = time.monotonic()
    served = model.rounded(policy) if mode == "delta" else policy
    base = model.save(served, folder / "version-0")
    if mode == "adapter":
        policy = served = model.adapted(policy)
    history, recordings = [], []
    with serve(kind, mode, base, folder) as serving:
        serving.wait_until_ready()
        progress.note(f"ready in {time.monotonic() - start:.0f} s")
        baseline: Literal["host"] | None = "host" if mode == "delta" else None
        with serving.engines() as engines, Publisher(served, engines, baseline=baseline) as publisher:
            # The rollouts that the first step learns from have a version as well.
            progress.note(str(publisher.publish(version=0)))
            with progress:
                for step in train(policy, served, mode, serving, publisher, steps=steps):
                    history.append(step)
                    progress.step(step)
                    if step.version in chosen_versions(steps):
                        recordings.append(record(step.version, served, mode, base, serving, folder))
    return history, recordings


def _summary(history: list[Step], passed: bool, report_file: Path, seconds: float) -> dict[str, Any]:
    return {
        "passed": passed,
        "steps": len(history),
        "first_reward": history[0].reward,
        "last_reward": history[-1].reward,
        "seconds": round(seconds, 1),
        "report": str(report_file),
    }


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    # The engine shares this machine's cores with the trainer.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _stopped_like_ctrl_c() -> Iterator[None]:
    """A polite kill, or a closed terminal, unwinds as Ctrl-C does: the engine is stopped and files are removed."""
    signals = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.default_int_handler) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
