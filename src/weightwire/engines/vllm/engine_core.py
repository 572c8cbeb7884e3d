"""What vLLM's engine core does for a commit by one question: it stands still, its workers commit, it goes on.

Asked one after the other these are three questions, and while they are on their way a busy engine stands still.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import Future
from typing import Any

import msgspec

from weightwire.engines.vllm.prefix_cache import pause_apart
from weightwire.engines.vllm.spin import CALL

__all__ = ["COMMIT", "install"]

COMMIT = "__weightwire_commit__"


def install() -> None:
    """In a process with an engine core, give it the call `COMMIT`. May run many times."""
    module = sys.modules.get("vllm.v1.engine.core")  # it loads plugins itself; workers need not import it
    if module is not None:
        setattr(module.EngineCore, COMMIT, _commit)


def _commit(self: Any, keep_cache: Any, arguments: bytes, goes_on: bool) -> Any:
    """Between two model steps, `commit` with these arguments on every rank. If all have done it, outputs bear the new
    version, where vLLM has that, and with `goes_on` the next step begins; else it stands still for whoever asked to
    decide. Gives every rank's answer, and for how many seconds it stood."""
    started = time.monotonic()
    # Keys and values in other processes' hands cannot be set apart.
    if keep_cache == "running" and self.vllm_config.kv_transfer_config is None:
        pausing = pause_apart(self)
    else:
        pausing = self.pause_scheduler("keep", keep_cache is not True)

    def commit() -> list[Any]:
        replies = list(self.collective_rpc(CALL, args=("commit", arguments, None)))
        answers = [msgspec.msgpack.decode(reply) for reply in replies]
        if all("ok" in answer for answer in answers):
            if callable(label := getattr(self, "set_weight_version", None)):
                label(str(answers[0]["ok"]["version"]))
            if goes_on:
                self.resume_scheduler()
        return [replies, time.monotonic() - started]

    if pausing is None:
        return commit()
    committed: Future[list[Any]] = Future()

    def when_paused(pausing: Future[Any]) -> None:
        try:
            pausing.result()
            committed.set_result(commit())
        except BaseException as error:
            committed.set_exception(error)
        # Its loop waits for a message next, whatever there is to do since.
        self.input_queue.put_nowait((_wake_up(), None))

    pausing.add_done_callback(when_paused)
    return committed


def _wake_up() -> Any:
    from vllm.v1.engine import EngineCoreRequestType

    return EngineCoreRequestType.WAKEUP
