"""What verbs print: tables for people, one JSON document for machines."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

__all__ = ["json_alone", "print_json", "print_table", "stdout"]

_kept: TextIO | None = None


@contextmanager
def json_alone() -> Iterator[None]:
    """Keep stdout for what goes to `stdout()`; what libraries print or log there goes to stderr."""
    global _kept
    _kept = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _kept = None


def stdout() -> TextIO:
    """Where results go, also inside `json_alone`."""
    return _kept or sys.stdout


def print_json(document: Any) -> None:
    """One JSON document to stdout; takes structs and dataclasses as well."""
    import msgspec

    stdout().write(msgspec.json.format(msgspec.json.encode(document)).decode() + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table to stdout: drawn by rich on a terminal that has it, else aligned text, one line a row."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        _draw(columns, rows)
        return
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _draw(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        # As text: what an engine says of itself is not to be read as markup.
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
