"""Memory of this process that others of the same host can be given: it has no name anywhere, only whoever is handed it
can read it, and it is gone with its last user."""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref

import torch

from weightwire.errors import TransportError

__all__ = ["MAPPED", "SharedMemory", "mapped", "view_of"]

MAPPED = mmap.MAP_SHARED | mmap.MAP_POPULATE  # every page is going to be used; found one by one they take much longer
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SharedMemory:
    """`data`: so many bytes, uint8, 1-D. `fd` is what others are given."""

    def __init__(self, nbytes: int) -> None:
        self.fd = os.memfd_create("weightwire", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._close = weakref.finalize(self, os.close, self.fd)
        try:
            # Reserved now: with no room left, the first touch would end the process.
            os.posix_fallocate(self.fd, 0, max(nbytes, 1))
            # Whoever reads it relies on that it does not become shorter: that would end his process.
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self.data = mapped(self.fd, nbytes)
        except OSError as error:
            self._close()
            raise TransportError(f"no room for {nbytes} bytes of shared memory: {error}") from error

    def close(self) -> None:
        """Give it to nobody any more; it is freed once nobody has it."""
        self._close()
        self.data = self.data.new_empty(0)


def mapped(fd: int, nbytes: int) -> torch.Tensor:
    """The first bytes of a file or memory that has so many, or one. Shared, so that what others write later is seen;
    and writable, because torch warns of memory that is not, also where nothing is written."""
    return torch.frombuffer(mmap.mmap(fd, max(nbytes, 1), flags=MAPPED), dtype=torch.uint8)[:nbytes]


def view_of(fd: int, nbytes: int) -> torch.Tensor:
    """The first bytes of memory that another process has handed over as `fd`, which may be closed afterwards. Raises
    `TransportError` where it has fewer, or could come to have."""
    try:
        seals, size = fcntl.fcntl(fd, fcntl.F_GET_SEALS), os.fstat(fd).st_size
        if not seals & fcntl.F_SEAL_SHRINK or size < nbytes:
            raise TransportError(f"the memory handed over has {size} bytes, {nbytes} were announced, to stay so many")
        return mapped(fd, nbytes)
    except OSError as error:
        raise TransportError(f"what was handed over is no memory that could be read: {error}") from error
