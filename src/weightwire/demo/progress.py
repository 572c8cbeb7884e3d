"""What the demo says while it runs: a live table on a terminal, plain lines elsewhere, JSON lines on request."""

from __future__ import annotations

import json
import sys
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

import msgspec
from rich.console import Console
from rich.live import Live
from rich.table import Table

from weightwire.demo.prove import Verdict
from weightwire.demo.train import Step

__all__ = ["COLUMNS", "JsonLines", "LiveTable", "PlainLines", "Progress", "cells", "choose"]

PHASES = ("sample", "learn", "begin", "stage", "seal", "commit")
"""Of `Step.seconds`, in their order."""

COLUMNS = ("step", "reward", "kind", "bytes", *PHASES, "pause", "mismatch")


def cells(step: Step) -> list[str]:
    """A step, whose number is its version too, as the texts of a row under `COLUMNS`; phases are in seconds."""
    seconds = [f"{step.seconds.get(phase, 0.0):.3f}" for phase in PHASES]
    nbytes = f"{step.nbytes / 1e6:.1f} MB" if step.nbytes >= 1e6 else f"{step.nbytes / 1e3:.0f} kB"
    start = [str(step.step), f"{step.reward:.3f}", step.kind, nbytes]
    return [*start, *seconds, f"{step.pause * 1e3:.0f} ms", f"{step.mismatch:.0e}"]


class Progress(Protocol):
    """Used as a context around the steps."""

    def note(self, text: str) -> None: ...
    def step(self, step: Step) -> None: ...
    def verdict(self, verdict: Verdict) -> None: ...
    def end(self, summary: dict[str, Any]) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *error: Any) -> None: ...


def choose(*, as_json: bool, stdout: TextIO) -> Progress:
    if as_json:
        return JsonLines(stdout)
    return LiveTable() if sys.stdout.isatty() else PlainLines()


class PlainLines:
    """One line for each thing that happened, and no escape codes."""

    def __enter__(self) -> Self:
        self.note(_line(COLUMNS))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...

    def note(self, text: str) -> None:
        print(text, flush=True)

    def step(self, step: Step) -> None:
        self.note(_line(cells(step)))

    def verdict(self, verdict: Verdict) -> None:
        self.note(str(verdict))

    def end(self, summary: dict[str, Any]) -> None:
        self.note(_ending(summary))


class JsonLines:
    """One JSON object a line; `event` says which kind."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...

    def note(self, text: str) -> None:
        self._print("note", {"text": text})

    def step(self, step: Step) -> None:
        self._print("step", msgspec.to_builtins(step))

    def verdict(self, verdict: Verdict) -> None:
        self._print("verdict", {"passed": verdict.passed, **msgspec.to_builtins(verdict)})

    def end(self, summary: dict[str, Any]) -> None:
        self._print("end", summary)

    def _print(self, event: str, fields: dict[str, Any]) -> None:
        print(json.dumps({"event": event, **fields}), file=self._stream, flush=True)


class LiveTable:
    """A table that grows; while it is longer than the terminal, its newest rows."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._rows: list[list[str]] = []
        self._live: Live | None = None

    def __enter__(self) -> Self:
        self._live = Live(console=self._console, auto_refresh=False)
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._live.update(self._table(self._rows))
            self._live.stop()
            self._live = None

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def step(self, step: Step) -> None:
        self._rows.append(cells(step))
        if self._live is not None:
            self._live.update(self._table(self._rows[-max(self._console.height - 5, 1) :]), refresh=True)

    def verdict(self, verdict: Verdict) -> None:
        self._console.print(str(verdict), markup=False, soft_wrap=True, style="green" if verdict.passed else "bold red")

    def end(self, summary: dict[str, Any]) -> None:
        self.note(_ending(summary))

    def _table(self, rows: list[list[str]]) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        for column in COLUMNS:
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        return table


def _line(texts: tuple[str, ...] | list[str]) -> str:
    return " ".join(text.rjust(max(len(column), 6)) for text, column in zip(texts, COLUMNS, strict=True))


def _ending(summary: dict[str, Any]) -> str:
    return (
        f"reward {summary['first_reward']:.2f} -> {summary['last_reward']:.2f} in {summary['steps']} steps,"
        f" {summary['seconds']:.0f} s in all; the curves are in {summary['report']}"
    )
