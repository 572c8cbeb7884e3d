"""Settings of the whole Python interpreter, changed for a moment by whoever is in a hurry."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator

__all__ = ["collecting_later", "taking_turns"]

_TURN_SECONDS = 0.0002


class _Setting:
    """Changed from when the first asks for it until the last is done. `change` gives what changes it back."""

    def __init__(self, change: Callable[[], Callable[[], None]]) -> None:
        self._change = change
        self._lock = threading.Lock()
        self._holders = 0
        self._undo: Callable[[], None] = _nothing
        os.register_at_fork(after_in_child=self._in_child)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._holders:
                self._undo = self._change()
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders:
                    self._undo()

    def _in_child(self) -> None:
        """A process that was forked meanwhile has none of the threads that asked for it."""
        self._lock = threading.Lock()
        if self._holders:
            self._undo()
        self._holders = 0


def _nothing() -> None:
    pass


def _collector_off() -> Callable[[], None]:
    was_enabled = gc.isenabled()
    gc.disable()
    return gc.enable if was_enabled else _nothing


def _short_turns() -> Callable[[], None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, _TURN_SECONDS))
    return lambda: sys.setswitchinterval(before)


collecting_later = _Setting(_collector_off)
"""Meanwhile the garbage collector does not run by itself. In a process with torch in it, it may take 0.1 s to look at
everything, and what is made for an update, some thousand small things, is what calls it: all of them are free again
without it.

>>> with collecting_later():
...     gc.isenabled()
False
>>> gc.isenabled()
True
"""

taking_turns = _Setting(_short_turns)
"""Meanwhile a thread that computes keeps the interpreter from another that was woken for 0.2 ms at most, where Python
lets it for 5: of an update, some threads are there only to send and to receive what others wait for.

>>> with taking_turns():
...     sys.getswitchinterval() <= 0.001
True
"""
