"""The plugin in vLLM's API server: our calls under `/v1/weightwire`, and the gate in front of generation."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from weightwire.engines.control import Control
from weightwire.engines.routes import router
from weightwire.engines.vllm.gate import Gate
from weightwire.engines.vllm.host import AsyncHost
from weightwire.engines.vllm.names import Names
from weightwire.errors import WeightwireError

__all__ = ["EndpointPlugin", "read_token"]

logger = logging.getLogger("vllm.weightwire.server")

_REPORT_SECONDS = 5.0


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
        names = serve_names(state.openai_serving_models, engine_client)
        control = Control(AsyncHost(engine_client, "server", names))
        state.weightwire_control = control
        if names.clients > 1 and engine_client.vllm_config.lora_config is not None:
            state.weightwire_reports = asyncio.ensure_future(_report(control))


def serve_names(models: Any, engine_client: Any) -> Names:
    """The names of one API server: in vLLM's own table, from which its list of models is made too."""
    core = engine_client.engine_core
    listing = models.show_available_models

    async def show_available_models() -> Any:
        # vLLM lists each by its request's name, which here is that of the revision.
        shown = await listing()
        for name, card in zip(reversed(models.lora_requests), reversed(shown.data), strict=False):
            card.id = name
        return shown

    models.show_available_models = show_available_models
    return Names(models.lora_requests, getattr(core, "client_index", 0), getattr(core, "client_count", 1))


async def _report(control: Control) -> None:
    """Of several API servers, an idle one would keep retired revisions from being freed: it says that it has none."""
    while True:
        await asyncio.sleep(_REPORT_SECONDS)
        with contextlib.suppress(WeightwireError):
            await control.refresh(_REPORT_SECONDS)


def read_token(*, unix_socket: bool) -> str | None:
    """The token from the environment. Without one: None on a Unix socket (none is needed), else empty (nobody gets
    in)."""
    if token := os.environ.get("WEIGHTWIRE_TOKEN"):
        return token
    if file := os.environ.get("WEIGHTWIRE_TOKEN_FILE"):
        return Path(file).read_text().strip()
    return None if unix_socket else ""
