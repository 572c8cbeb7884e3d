"""A real HTTP server around an engine of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI

from weightwire.engines.local import LocalEngine
from weightwire.engines.routes import router

__all__ = ["Server", "serve"]

_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Server:
    """Where it listens; `url` is what `connect` takes, `app` what it runs."""

    url: str
    port: int
    app: FastAPI


@contextmanager
def serve(engine: LocalEngine, token: str | None, *, unix_socket: str | None = None) -> Iterator[Server]:
    """The routes of `engine` over HTTP for as long as the block runs, on a free port of 127.0.0.1 or a Unix socket."""
    app = FastAPI()
    app.include_router(router(control=lambda _: engine._control, token=lambda _: token))
    where: dict[str, Any] = {"uds": unix_socket} if unix_socket else {"host": "127.0.0.1", "port": 0}
    config = uvicorn.Config(app, log_level="error", lifespan="off", ws="none", timeout_keep_alive=600, **where)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="test-server", daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + _SECONDS
        while not server.started:
            if time.monotonic() > deadline or not thread.is_alive():
                raise RuntimeError("the test server did not start")
            time.sleep(0.005)
        port = 0 if unix_socket else server.servers[0].sockets[0].getsockname()[1]
        yield Server(f"unix:{unix_socket}" if unix_socket else f"http://127.0.0.1:{port}", port, app)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(_SECONDS)
