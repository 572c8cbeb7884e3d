"""Arguments that several verbs share: engines by URL, and what they want to be shown before they listen."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weightwire.errors import UsageError

if TYPE_CHECKING:
    from weightwire.connection import Engines

__all__ = ["add_access", "add_json", "engines_at", "token_of"]


def add_access(parser: argparse.ArgumentParser) -> None:
    """`--token`, `--token-file`, `--api-key`."""
    tokens = parser.add_mutually_exclusive_group()
    tokens.add_argument("--token", help="the server's token; others on this machine can see it here")
    tokens.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="file with the server's token (default: WEIGHTWIRE_TOKEN or WEIGHTWIRE_TOKEN_FILE)",
    )
    parser.add_argument("--api-key", metavar="KEY", help="what vLLM's own --api-key wants (default: VLLM_API_KEY)")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def token_of(args: argparse.Namespace) -> str | None:
    """The token from the arguments, else from the environment, else None."""
    if args.token is not None:
        return str(args.token)
    if args.token_file is not None:
        return _read(args.token_file)
    if token := os.environ.get("WEIGHTWIRE_TOKEN"):
        return token
    if file := os.environ.get("WEIGHTWIRE_TOKEN_FILE"):
        return _read(Path(file))
    return None


def engines_at(urls: Sequence[str], args: argparse.Namespace) -> Engines:
    """The engines behind URLs, with the token and the key that the arguments give."""
    from weightwire.connection import connect

    return connect(list(urls), token=token_of(args), api_key=args.api_key or os.environ.get("VLLM_API_KEY"))


def _read(file: Path) -> str:
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the token file {file} cannot be read: {error}", next_step="Copy it from the server's machine."
        ) from error
    if not token:
        raise UsageError(f"the token file {file} is empty", next_step="Copy it from the server's machine.")
    return token
