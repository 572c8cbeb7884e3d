"""The `weightwire` command itself: quick to ask, and clear about what it was not told."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from weightwire.cli.output import print_json
from weightwire.errors import UsageError

VERBS = ("serve", "push", "status", "doctor", "demo")
HEAVY = ("torch", "numpy", "numba", "httpx2", "rich", "fastapi", "vllm", "transformers", "msgspec")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from weightwire.cli.main import main\n"
        "try:\n    main(['--help'])\n"
        f"except SystemExit:\n    print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr.strip() == "[]"
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(run: Any, verb: str) -> None:
    done = run(verb, "--help")
    assert done.code == 0
    assert done.out.startswith(f"usage: weightwire {verb}")


@pytest.mark.parametrize(
    "argv", [(), ("frobnicate",), ("push",), ("push", "x"), ("status",), ("status", "--nope"), ("demo", "--mode", "x")]
)
def test_a_wrong_call_is_code_2(run: Any, argv: Any) -> None:
    done = run(*argv)
    assert done.code == 2
    assert "usage: weightwire" in done.err


def test_an_interrupt_is_no_traceback(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("weightwire.cli.status.run", interrupt)
    done = run("status", "http://127.0.0.1:1")
    assert (done.code, done.err) == (130, "weightwire: interrupted\n")


def test_what_a_library_prints_keeps_out_of_the_json(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def chatter(args: object) -> int:
        print("a library says hello")
        print_json({"answer": 42})
        raise UsageError("and then this", next_step="None.")

    monkeypatch.setattr("weightwire.cli.status.run", chatter)
    document, error = run("status", "--json", "http://127.0.0.1:1").out.rstrip().rsplit("\n", 1)

    assert json.loads(document) == {"answer": 42}
    assert json.loads(error)["error"]["message"].startswith("and then this")
    assert "hello" in run("status", "http://127.0.0.1:1").out
