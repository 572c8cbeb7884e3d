"""`weightwire demo`: train a tiny policy by rollouts from a running engine, update it at every step, and prove it."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from weightwire.cli.output import stdout
from weightwire.errors import UsageError

__all__ = ["add_parser"]

_NEEDED = ("httpx2", "jinja2", "rich", "transformers")
_NEEDED_BY = {"dense": (), "delta": (), "adapter": ("peft",)}


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "demo",
        help="train a tiny policy on this machine, updating a running engine at every step",
        description="Make a tiny random model, serve it, train it by policy gradient on rollouts from that engine,"
        " publish every step into it, and prove three of the versions against fresh engines.",
    )
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm", help="default: vllm")
    parser.add_argument(
        "--mode",
        choices=tuple(_NEEDED_BY),
        default="dense",
        help="what is sent: the whole model, what changed in it, or a LoRA adapter, which then alone is trained"
        " (default: dense)",
    )
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="optimiser steps (default: 30)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random model (default: 0)")
    parser.add_argument(
        "--report",
        type=Path,
        default=Path("demo-report.html"),
        metavar="FILE",
        help="where the curves go (default: demo-report.html)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if missing := [name for name in (*_NEEDED, *_NEEDED_BY[args.mode]) if importlib.util.find_spec(name) is None]:
        raise UsageError(
            f"the demo needs {', '.join(missing)}", next_step="pip install 'weightwire[demo]', or make demo."
        )
    from weightwire.demo import progress
    from weightwire.demo.run import run as run_demo

    shown = progress.choose(as_json=args.json, stdout=stdout())
    passed = run_demo(args.engine, args.mode, steps=args.steps, seed=args.seed, report_file=args.report, progress=shown)
    return 0 if passed else 1
