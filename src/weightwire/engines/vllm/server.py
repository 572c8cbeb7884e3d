"""The plugin in vLLM's API server: our calls under `/v1/weightwire`, and the gate in front of generation."""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from weightwire.engines.control import Control
from weightwire.engines.routes import router
from weightwire.engines.vllm.gate import Gate
from weightwire.engines.vllm.host import AsyncHost

__all__ = ["EndpointPlugin", "read_token"]

logger = logging.getLogger("vllm.weightwire.server")


class EndpointPlugin:
    """What vLLM's `EndpointPlugin` protocol asks for."""

    name = "weightwire"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        app.include_router(
            router(
                control=lambda request: request.app.state.weightwire_control,
                token=lambda request: request.app.state.weightwire_token,
            )
        )
        app.add_middleware(Gate)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        state.weightwire_token = read_token(unix_socket=bool(getattr(args, "uds", None)))
        if state.weightwire_token == "":
            logger.warning(
                "weightwire: no token, so no update will be taken. Start with `weightwire serve`, or set"
                " WEIGHTWIRE_TOKEN or WEIGHTWIRE_TOKEN_FILE."
            )
        state.weightwire_control = Control(AsyncHost(engine_client, "server"))


def read_token(*, unix_socket: bool) -> str | None:
    """The token from the environment. Without one: None on a Unix socket (none is needed), else empty (nobody gets
    in)."""
    if token := os.environ.get("WEIGHTWIRE_TOKEN"):
        return token
    if file := os.environ.get("WEIGHTWIRE_TOKEN_FILE"):
        return Path(file).read_text().strip()
    return None if unix_socket else ""
