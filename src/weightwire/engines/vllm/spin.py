"""While our calls run, vLLM's engine core and workers wait for each other asleep. On a CPU only.

For a second after each message, vLLM's processes wait for the next in a loop that looks, yields and looks again. That
keeps a model step short. In one of our calls it takes a core from the threads that stage an update, which on a CPU do
their work on the same cores. So the engine core sleeps until a worker has answered our call, and a worker sleeps after
one until it is asked something else; all other waiting is as before.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["CALL", "install", "sleeping"]

CALL = "__weightwire__"
_LOOK_MS = 1  # the socket that wakes a sleeper drops the second of two messages in quick succession


def install() -> None:
    """Wrap the two methods in which vLLM waits. May run many times; where they are not, nothing is done."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    try:
        from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc
    except ImportError:
        return
    for owner, name, wrap in (
        (MultiprocExecutor, "collective_rpc", _asking),
        (WorkerProc, "_execute_worker_rpc", _answering),
    ):
        method = vars(owner).get(name)
        if method is not None and not hasattr(method, CALL):
            wrapped = wrap(method)
            setattr(wrapped, CALL, True)
            setattr(owner, name, wrapped)


def _asking(collective_rpc: Any) -> Any:
    @functools.wraps(collective_rpc)
    def wrapped(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        if method != CALL:
            return collective_rpc(self, method, *args, **kwargs)
        with sleeping(getattr(self, "response_mqs", ())):
            return collective_rpc(self, method, *args, **kwargs)

    return wrapped


def _answering(execute: Any) -> Any:
    @functools.wraps(execute)
    def wrapped(self: Any, rpc_request: Any) -> None:
        queue = getattr(self, "rpc_broadcast_mq", None)
        _wake(queue)
        execute(self, rpc_request)
        if rpc_request[0] == CALL:
            _put_to_sleep(queue)

    return wrapped


@contextlib.contextmanager
def sleeping(queues: Iterable[Any]) -> Iterator[None]:
    """Whoever waits for a message from one of these `MessageQueue`s in here sleeps until it comes."""
    queues = tuple(queues)
    for queue in queues:
        _put_to_sleep(queue)
    try:
        yield
    finally:
        for queue in queues:
            _wake(queue)


def _put_to_sleep(queue: Any) -> None:
    condition = getattr(queue, "_spin_condition", None)
    if condition is None or "wait" in vars(condition) or not hasattr(condition, "busy_loop_s"):
        return
    wait, busy_loop_s = condition.wait, condition.busy_loop_s

    def doze(timeout_ms: int | None = None) -> None:
        condition.busy_loop_s = 0
        try:
            wait(timeout_ms=_LOOK_MS if timeout_ms is None else min(timeout_ms, _LOOK_MS))
        finally:
            condition.busy_loop_s = busy_loop_s

    condition.wait = doze


def _wake(queue: Any) -> None:
    condition = getattr(queue, "_spin_condition", None)
    if condition is not None:
        vars(condition).pop("wait", None)
