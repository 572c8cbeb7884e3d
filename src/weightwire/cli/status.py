"""`weightwire status`: what engines serve, who holds them, and what they were last sent."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from weightwire.cli.arguments import add_access, add_json, engines_at
from weightwire.cli.output import print_json, print_table
from weightwire.errors import WeightwireError

if TYPE_CHECKING:
    from weightwire.engines.base import EngineStatus

__all__ = ["add_parser"]

_COLUMNS = ("engine", "model", "version", "adapters", "state", "held by", "last update")


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("status", help="ask engines what they serve")
    parser.add_argument("urls", nargs="+", metavar="URL", help="an engine")
    add_access(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    found: dict[str, EngineStatus] = {}
    errors: dict[str, WeightwireError] = {}
    with engines_at(args.urls, args) as engines:
        for engine in engines:
            try:
                found[engine.name] = engine.status()
            except WeightwireError as error:
                errors[engine.name] = error
    if args.json:
        failed = {name: {"error": error.to_wire()} for name, error in errors.items()}
        print_json({"engines": {**found, **failed}})
    elif found:
        print_table(_COLUMNS, [_row(status) for status in found.values()])
    for lost in errors.values():
        print(f"weightwire: {lost}", file=sys.stderr)
    return 1 if errors else 0


def _row(status: EngineStatus) -> list[str]:
    state = f"{status.state}: {status.poisoned}" if status.poisoned else status.state
    version = "none yet" if status.version is None else str(status.version)
    adapters = ", ".join(f"{each['name']}@{each['version']}" for each in status.adapters) or "none"
    return [status.engine, status.model, version, adapters, state, _holder(status), _last(status)]


def _holder(status: EngineStatus) -> str:
    if status.update is None:
        return "nobody"
    left = max(status.update["until"] - time.time(), 0.0)
    return f"{status.update['holder']}, sending version {status.update['version']}, {left:.0f} s left"


def _last(status: EngineStatus) -> str:
    if (receipt := status.receipt) is None:
        return "none"
    size = f"{receipt.nbytes / 1e6:.1f} MB over {receipt.transport}"
    if receipt.adapter is not None:
        return f"{receipt.adapter}: {len(receipt.proven)} modules, {size}"
    return f"version {receipt.version}: {receipt.parameters} parameters, {size}, paused {receipt.pause * 1e3:.0f} ms"
