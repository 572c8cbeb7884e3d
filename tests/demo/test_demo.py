"""`weightwire demo` from end to end, with the engine that needs no vLLM."""

from __future__ import annotations

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
from weightwire.demo import prove
from weightwire.demo.local import LocalPolicy


def demo(report: Path, *more: str) -> int:
    return main(["demo", "--engine", "transformers", "--report", str(report), *more])


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files of this process go; at the end none may be left."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_it_learns_and_proves_itself(tmp_path, scratch, shm_root, no_threads_left, capsys):
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)

    assert demo(tmp_path / "report.html", "--json", "--steps", "12") == 0

    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    assert [step["version"] for step in steps] == list(range(1, 13))
    assert all(step["mismatch"] < 1e-4 for step in steps)
    assert steps[-1]["reward"] > steps[0]["reward"] + 0.4
    verdicts = [event for event in events if event["event"] == "verdict"]
    assert [(verdict["version"], verdict["passed"]) for verdict in verdicts] == [(1, True), (6, True), (12, True)]
    assert events[-1]["event"] == "end"
    assert events[-1]["passed"]
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert list(scratch.iterdir()) == []
    assert (torch.get_num_threads(), signal.getsignal(signal.SIGTERM)) == (threads, handler)


def test_an_engine_with_other_weights_fails_the_proof(tmp_path, scratch, shm_root, capsys, monkeypatch):
    def stale(kind, checkpoint, folder):
        return LocalPolicy(checkpoint.parent / "version-0")

    monkeypatch.setattr(prove, "fresh", stale)

    assert demo(tmp_path / "report.html", "--steps", "3") == 1

    out = capsys.readouterr().out
    assert out.count("FAIL  version") == 3
    assert "\x1b" not in out
    assert "demo: fail" in (tmp_path / "report.html").read_text()
    assert list(scratch.iterdir()) == []


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


@pytest.mark.parametrize("wrong", [["--steps", "2"], ["--report", "/nowhere/report.html"]])
def test_a_wrong_call_says_what_to_do(wrong, tmp_path, capsys):
    assert demo(tmp_path / "report.html", *wrong) == 2
    assert wrong[0] in capsys.readouterr().err
