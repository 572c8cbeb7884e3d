"""`weightwire demo` from end to end, with the engine that needs no vLLM."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from weightwire.cli.main import main
from weightwire.demo import prove, task
from weightwire.demo.local import LocalPolicy
from weightwire.demo.serving import Weights

MODES = ("dense", "delta", "adapter")


def demo(report: Path, *more: str) -> int:
    return main(["demo", "--engine", "transformers", "--report", str(report), *more])


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files of this process go; at the end none may be left."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=[pytest.mark.slow] * (mode != "dense")) for mode in MODES])
def test_it_learns_and_proves_itself(mode, tmp_path, scratch, shm_root, no_threads_left, capsys):
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)

    assert demo(tmp_path / "report.html", "--json", "--steps", "12", "--mode", mode) == 0

    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    assert [step["version"] for step in steps] == list(range(1, 13))
    # The engine of deltas computes in bfloat16, the trainer in float32; and a smaller step learns less.
    assert all(step["mismatch"] < (0.2 if mode == "delta" else 1e-4) for step in steps)
    assert steps[-1]["reward"] > steps[0]["reward"] + (0.25 if mode == "delta" else 0.4)
    assert {step["kind"] for step in steps} == {mode}
    if mode == "delta":
        assert "(dense)" in events[2]["text"]
        assert all(step["nbytes"] < 2_400_000 / 8 for step in steps)
    verdicts = [event for event in events if event["event"] == "verdict"]
    assert [(verdict["version"], verdict["passed"]) for verdict in verdicts] == [(1, True), (6, True), (12, True)]
    answered_by = [verdict["sample"].partition(":")[0] for verdict in verdicts]
    assert (
        answered_by
        == {"dense": ["policy"] * 3, "delta": ["policy"] * 3, "adapter": ["policy@1", "policy@6", "policy@12"]}[mode]
    )
    assert events[-1]["event"] == "end"
    assert events[-1]["passed"]
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert list(scratch.iterdir()) == []
    assert (torch.get_num_threads(), signal.getsignal(signal.SIGTERM)) == (threads, handler)


@pytest.mark.parametrize("mode", MODES)
def test_an_engine_with_other_weights_fails_the_proof(mode, tmp_path, scratch, shm_root, capsys, monkeypatch):
    def stale(kind, mode, weights, folder):
        return LocalPolicy(mode, Weights(checkpoint=weights.checkpoint.parent / "version-0"))

    monkeypatch.setattr(prove, "fresh", stale)
    monkeypatch.setattr(task, "PROMPTS", task.PROMPTS[:3])

    assert demo(tmp_path / "report.html", "--steps", "3", "--mode", mode) == 1

    out = capsys.readouterr().out
    assert out.count("FAIL  version") == 3
    assert "\x1b" not in out
    assert "demo: fail" in (tmp_path / "report.html").read_text()
    assert list(scratch.iterdir()) == []


@pytest.mark.slow
def test_a_killed_demo_leaves_no_files(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "weightwire.cli.main", "demo", "--engine", "transformers", "--steps", "100000"]
    with subprocess.Popen(
        [*command, "--report", str(tmp_path / "report.html")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(scratch)},
    ) as process:
        try:
            assert process.stdout is not None
            while process.stdout.readline().split()[:1] != ["2"]:
                assert process.poll() is None
            assert any(scratch.iterdir())
            process.terminate()
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert error == "weightwire: interrupted\n"
    assert list(scratch.iterdir()) == []


def test_an_adapter_needs_peft(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    assert demo(tmp_path / "report.html", "--mode", "adapter") == 2
    assert "the demo needs peft" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--steps", "2"], ["--report", "/nowhere/report.html"]])
def test_a_wrong_call_says_what_to_do(wrong, tmp_path, capsys):
    assert demo(tmp_path / "report.html", *wrong) == 2
    assert wrong[0] in capsys.readouterr().err
