"""The `weightwire` command. Results go to stdout, all else to stderr; a failure says the next step and exits not 0."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from weightwire.cli import demo, doctor, inspect, push, serve, status
from weightwire.cli.output import json_alone, stdout
from weightwire.errors import UsageError, WeightwireError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 1 for what went wrong, 2 for a wrong call."""
    parser = argparse.ArgumentParser(prog="weightwire", description="New weights into running inference engines.")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for verb in (serve, push, status, inspect, doctor, demo):
        verb.add_parser(verbs)
    args, rest = parser.parse_known_args(argv)
    if rest and not getattr(args, "passes_through", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    with json_alone() if getattr(args, "json", False) else nullcontext():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    try:
        return int(args.run(args))
    except WeightwireError as error:
        if getattr(args, "json", False):
            print(json.dumps({"error": error.to_wire()}), file=stdout())
        print(f"weightwire: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("weightwire: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
