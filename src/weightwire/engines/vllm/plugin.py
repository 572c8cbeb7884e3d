"""What vLLM loads through its entry points. Nothing heavy is imported before it is needed."""

from __future__ import annotations

from typing import Any

__all__ = ["endpoint_plugin", "register"]


def register() -> None:
    """`vllm.general_plugins`: give every worker the one call that this package makes. May run many times.

    vLLM reaches methods of a worker by name. Its check for clashes with a `worker_extension_cls` leaves out names that
    begin with two underscores, so the plugin and `WORKER_EXTENSION` can both be used.
    """
    from vllm.v1.worker.worker_base import WorkerBase

    from weightwire.engines.vllm import engine_core, spin
    from weightwire.engines.vllm.worker import WorkerExtension

    spin.install()
    engine_core.install()
    if not hasattr(WorkerBase, "__weightwire__"):
        WorkerBase.__weightwire__ = WorkerExtension.__weightwire__


def endpoint_plugin() -> Any:
    """`vllm.endpoint_plugins`: the HTTP calls, in every API server process."""
    from weightwire.engines.vllm.server import EndpointPlugin

    return EndpointPlugin()
