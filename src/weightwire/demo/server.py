"""A vLLM server as a process of our own: started, waited for, and stopped whatever happens."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2 as httpx

from weightwire.errors import DeadlineError, EngineLost, WeightwireError

__all__ = ["Server", "end_session", "free_port"]

_FIRST_PORT = 10000
_READY_SECONDS = 420.0
_STOP_SECONDS = 20.0
_REST_SECONDS = 10.0  # once a server has gone, its other processes remove what they had in shared memory
_KILLED_SECONDS = 30.0
_TAIL_LINES = 25

# A model this small is fastest on one thread, which leaves the other core to the trainer.
_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def free_port() -> int:
    """A port that nobody listens on, below those that the system gives to whoever asks for any: it takes a server
    seconds until it listens, and one of those might be somebody else's by then."""
    range_of = Path("/proc/sys/net/ipv4/ip_local_port_range")
    end = int(range_of.read_text().split()[0]) if range_of.exists() else 32768
    if end <= _FIRST_PORT:  # none is left below
        end = 65536
    while True:
        port = _FIRST_PORT + secrets.randbelow(end - _FIRST_PORT)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


class Server:
    """`command`, which is to answer at `url`. As a context it runs from the start to the end of it.

    When it fails meanwhile, the end of its log is shown on stderr.
    """

    def __init__(self, command: Sequence[str], url: str, *, log: Path, environment: Mapping[str, str]) -> None:
        self.url = url
        self._command = command
        self._log = log
        self._environment = environment

    def __enter__(self) -> Self:
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **_ENVIRONMENT, **self._environment},
                # Its own session: Ctrl-C reaches us alone, and we stop it with all the processes that it started.
                start_new_session=True,
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        died = self._process.poll() is not None
        try:
            if isinstance(error, Exception) and (died or self._is_of(error)):
                self._show_log()
        finally:
            self._stop()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        while not self._is_healthy():
            if (code := self._process.poll()) is not None:
                raise EngineLost(
                    f"the server ended with exit code {code} before it was ready",
                    engine=self.url,
                    phase="start",
                    next_step="The end of its log is above; `weightwire doctor` says what this machine lacks.",
                )
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"the server was not ready within {_READY_SECONDS:.0f} s",
                    engine=self.url,
                    phase="start",
                    next_step="The end of its log is above; is the machine busy with something else?",
                )
            time.sleep(0.2)

    def _is_healthy(self) -> bool:
        try:
            return bool(httpx.get(f"{self.url}/health", timeout=5.0, trust_env=False).is_success)
        except httpx.TransportError:
            return False

    def _is_of(self, error: Exception) -> bool:
        return isinstance(error, WeightwireError) and error.engine == self.url

    def _show_log(self) -> None:
        lines = self._log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        print(
            "\n".join([f"the log of {self.url} ends:", *(f"  {line}" for line in lines)]), file=sys.stderr, flush=True
        )

    def _stop(self) -> None:
        end_session(self._process, stop=_STOP_SECONDS, rest=_REST_SECONDS)


def end_session(process: subprocess.Popen[Any], *, stop: float, rest: float) -> None:
    """End the leader of a session, and with it the session: in `stop` and `rest` seconds, or by SIGKILL."""
    try:
        process.terminate()
        process.wait(stop)
        until = time.monotonic() + rest
        while time.monotonic() < until:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
    except (subprocess.TimeoutExpired, ProcessLookupError):
        pass
    finally:
        # Whoever of it is still there: the leader itself, or workers that it left behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(_KILLED_SECONDS)
