"""What vLLM's engine core does by one question: it stands still, its workers commit, it goes on; or it stands still and
they stage.

Asked one after the other these are several questions, and while they are on their way a busy engine stands still.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec

from weightwire.engines.vllm.prefix_cache import pause_apart
from weightwire.engines.vllm.spin import CALL

__all__ = ["COMMIT", "STAGE", "install"]

COMMIT, STAGE = "__weightwire_commit__", "__weightwire_stage__"


def install() -> None:
    """In a process with an engine core, give it these calls. May run many times."""
    module = sys.modules.get("vllm.v1.engine.core")  # it loads plugins itself; workers need not import it
    if module is not None:
        setattr(module.EngineCore, COMMIT, _commit)
        setattr(module.EngineCore, STAGE, _stage)


def _commit(self: Any, keep_cache: Any, arguments: bytes, sealing: Sequence[Any] | None) -> Any:
    """As `control.CommitsAtOnce.commit_at_once`, between two model steps. Where vLLM has that, outputs bear the new
    version from then on."""

    sealed: list[bytes] = []
    if sealing is not None:
        sealed, found = _ask(self, *sealing)
        if not all(each and each["state"] == "sealed" and each["kind"] != "adapter" for each in found):
            return [sealed, None, 0.0, 0.0]
    # With the weights awake and the KV cache not, an update is welcome, and whoever put it to sleep lets it go on.
    goes_on = not any(_ask(self, "asleep", msgspec.msgpack.encode({}))[1])
    started = time.monotonic()
    # Keys and values in other processes' hands cannot be set apart.
    if keep_cache == "running" and self.vllm_config.kv_transfer_config is None:
        pausing = pause_apart(self)
    else:
        pausing = self.pause_scheduler("keep", keep_cache is not True)

    def commit() -> list[Any]:
        replies, answers = _ask(self, "commit", arguments)
        committed = time.monotonic()
        if all(answers):
            if callable(label := getattr(self, "set_weight_version", None)):
                label(str(answers[0]["version"]))
            if goes_on:
                self.resume_scheduler()
        resumed = time.monotonic()
        return [sealed, replies, resumed - started, resumed - committed]

    return _when_paused(self, pausing, commit)


def _stage(self: Any, arguments: bytes) -> Any:
    """As `control.CommitsAtOnce.stage_at_once`."""
    return _when_paused(self, self.pause_scheduler("keep", False), lambda: _ask(self, "stage", arguments)[0])


def _ask(self: Any, op: str, arguments: bytes) -> tuple[list[bytes], list[Any]]:
    """Every rank's answer, and what is in it where it is no error."""
    replies = list(self.collective_rpc(CALL, args=(op, arguments, None)))
    return replies, [msgspec.msgpack.decode(reply).get("ok") for reply in replies]


def _when_paused(self: Any, pausing: Future[Any] | None, work: Callable[[], Any]) -> Any:
    if pausing is None:
        return work()
    done: Future[Any] = Future()

    def when_paused(pausing: Future[Any]) -> None:
        try:
            pausing.result()
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)
        # Its loop waits for a message next, whatever there is to do since.
        self.input_queue.put_nowait((_wake_up(), None))

    pausing.add_done_callback(when_paused)
    return done


def _wake_up() -> Any:
    from vllm.v1.engine import EngineCoreRequestType

    return EngineCoreRequestType.WAKEUP
