"""Python's garbage collector, held off for a moment."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator

__all__ = ["held"]

_lock = threading.Lock()
_holders = 0
_was_enabled = False


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Meanwhile it does not run by itself. In a process with torch in it, it may take 0.1 s to look at everything, and
    what is made for an update, some thousand small things, is what calls it: all of them are free again without it.

    >>> with held():
    ...     gc.isenabled()
    False
    >>> gc.isenabled()
    True
    """
    global _holders, _was_enabled
    with _lock:
        if not _holders:
            _was_enabled = gc.isenabled()
            gc.disable()
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if not _holders and _was_enabled:
                gc.enable()


def _in_child() -> None:
    """A process that was forked meanwhile has none of the threads that hold it."""
    global _lock, _holders
    _lock = threading.Lock()
    if _holders and _was_enabled:
        gc.enable()
    _holders = 0


os.register_at_fork(after_in_child=_in_child)
