"""Python's garbage collector, held off for a moment."""

from __future__ import annotations

import contextlib
import gc
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
