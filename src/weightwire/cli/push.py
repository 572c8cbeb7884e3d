"""`weightwire push`: a safetensors checkpoint or a LoRA adapter into running engines, as one version for all."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightwire.cli.arguments import add_access, add_json, engines_at
from weightwire.cli.output import print_json, print_table
from weightwire.errors import PublishError, WeightwireError

if TYPE_CHECKING:
    import torch

    from weightwire.connection import Engines
    from weightwire.engines.base import KeepCache
    from weightwire.sources.base import Source
    from weightwire.updates.digest import Pending, Scan
    from weightwire.updates.manifest import TensorSpec
    from weightwire.updates.receipt import Receipt

__all__ = ["add_parser"]

_KEPT: dict[str, KeepCache] = {"none": False, "running": "running", "all": True}


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "push",
        help="put a checkpoint or an adapter into running engines",
        description="Put a safetensors checkpoint, or a LoRA adapter as PEFT saves it, into running engines: all of"
        " them get it, or none.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a folder, or a .safetensors file")
    parser.add_argument(
        "--as", dest="adapter", metavar="NAME", help="the model that an adapter is served as (default: policy)"
    )
    parser.add_argument(
        "--base",
        type=Path,
        metavar="CHECKPOINT",
        help="what the engines serve, of a model pushed with --base too: send only what changed since, if they agree",
    )
    parser.add_argument("--to", action="append", required=True, metavar="URL", help="an engine; may be given again")
    parser.add_argument("--version", type=int, metavar="N", help="default: one more than any of the engines has")
    add_access(parser)
    parser.add_argument("--transport", metavar="NAME", help="shm, gloo or http (default: the first that works)")
    parser.add_argument("--partial", action="store_true", help="allow parameters to be left out")
    parser.add_argument("--allow-nonfinite", action="store_true", help="take NaN and Inf as well")
    parser.add_argument(
        "--pause", choices=("keep", "wait", "abort"), default="keep", help="what requests in flight do (default: keep)"
    )
    parser.add_argument(
        "--keep-cache", choices=tuple(_KEPT), default="none",
        help="whose cached keys and values of the old weights are kept: of requests in flight, for themselves, or all",
    )  # fmt: skip
    parser.add_argument("--deadline", type=float, default=600.0, metavar="S", help="seconds in all (default: 600)")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from weightwire import sources
    from weightwire.publisher import Publisher

    with engines_at(args.to, args) as engines, _progress() as advance:
        source = _Counted(sources.find(args.checkpoint, timeout=args.deadline), advance)
        with Publisher(
            source,
            engines,
            adapter=args.adapter,
            transport=args.transport,
            baseline="host" if args.base else None,
            deadline=args.deadline,
        ) as publisher:
            served = _served(engines, publisher.adapter) if args.base else set()
            if len(served) == 1 and (version := served.pop()) is not None:
                publisher.start_from(args.base, version)
            try:
                receipt = publisher.publish(
                    _next_version(engines, publisher.adapter) if args.version is None else args.version,
                    partial=args.partial,
                    finite=not args.allow_nonfinite,
                    pause=args.pause,
                    keep_cache=_KEPT[args.keep_cache],
                )
            except PublishError as error:
                error.details["outcomes"] = {name: _plain(outcome) for name, outcome in error.outcomes.items()}
                raise
    if args.json:
        print_json(receipt)
    else:
        _print(receipt)
    return 0


def _next_version(engines: Engines, adapter: str | None) -> int:
    if adapter is not None:
        return engines.adapters.next_version(adapter)
    return 1 + max(-1 if version is None else version for version in _served(engines, None))


def _served(engines: Engines, adapter: str | None) -> set[int | None]:
    return {status.serves(adapter) for status in engines.status().values()}


def _plain(outcome: Any) -> Any:
    import msgspec

    return outcome.to_wire() if isinstance(outcome, WeightwireError) else msgspec.to_builtins(outcome)


def _print(receipt: Receipt) -> None:
    rows = []
    for name, engine in receipt.engines.items():
        proofs = ", ".join(sorted(set(engine.proven.values())))
        rows.append([name, engine.transport, str(engine.parameters), proofs, f"{engine.pause * 1e3:.0f} ms"])
    print(receipt)
    what = "modules" if receipt.kind == "adapter" else "parameters"
    print_table(["engine", "transport", what, "proven", "paused"], rows)


class _Counted:
    """A source that tells how many bytes of it were read."""

    def __init__(self, source: Source, advance: Callable[[int, int], None]) -> None:
        self._source = source
        self._advance = advance
        self.aliases: Mapping[str, str] = source.aliases
        self.ranks = source.ranks

    @property
    def lora(self) -> Mapping[str, Any] | None:
        return self._source.lora

    def metadata(self) -> Sequence[TensorSpec]:
        specs = self._source.metadata()
        self._total = sum(spec.nbytes for spec in specs)
        return specs

    def read(self, tensor: int, start: int, out: torch.Tensor) -> Scan | Pending:
        scanned = self._source.read(tensor, start, out)
        self._advance(out.nbytes, self._total)
        return scanned

    def release(self) -> None:
        self._source.release()


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Yields `advance(nbytes, total)`, which draws a bar on stderr where that is a terminal, and else does nothing."""
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("staging", total=None)
        yield lambda nbytes, total: bar.update(task, advance=nbytes, total=total)
