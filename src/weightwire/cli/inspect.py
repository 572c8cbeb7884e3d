"""`weightwire inspect`: what the file of a delta holds, and whether its bytes are unharmed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightwire.cli.arguments import add_json
from weightwire.cli.output import print_json, print_table
from weightwire.errors import SourceError

if TYPE_CHECKING:
    from weightwire.updates.delta import Delta

__all__ = ["add_parser"]


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("inspect", help="say what the file of a delta holds, and whether it is whole")
    parser.add_argument("file", type=Path, metavar="FILE", help="the bytes of one delta")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from weightwire.updates.delta import parse, steps_of

    try:
        data = args.file.read_bytes()
    except OSError as error:
        raise SourceError(f"{args.file} cannot be read: {error.strerror}") from error
    delta = parse(str(args.file), data)
    facts = _facts(delta, steps_of(str(args.file), delta))
    if args.json:
        print_json(facts)
    else:
        print_table(("what", "value"), [[name.replace("_", " "), str(value)] for name, value in facts.items()])
    return 0


def _facts(delta: Delta, steps: dict[int, int]) -> dict[str, Any]:
    from weightwire.updates.manifest import dtype_name

    dense = delta.numel * delta.dtype.itemsize
    return {
        "dtype": dtype_name(delta.dtype),
        "elements": delta.numel,
        "from_index": delta.start,
        "changed": delta.count,
        "density": round(delta.density, 6),
        "of_them_by_one_unit": steps.get(1, 0),
        "largest_step": max(steps, default=0),
        "bytes": delta.nbytes,
        "of_the_dense_size": round(delta.nbytes / dense, 6) if dense else 0.0,
        "blocks": delta.blocks,
        "elements_a_block": 1 << delta.block_bits,
        "unit_bits": delta.unit_bits,
        "digest_before": delta.before.hex(),
        "digest_after": delta.after.hex(),
    }
