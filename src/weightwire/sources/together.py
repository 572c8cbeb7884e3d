"""Work that the trainer's ranks do together: an error on any of them is an error on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from weightwire.errors import WeightwireError
from weightwire.sources.ranks import Ranks

__all__ = ["Together"]

T = TypeVar("T")


class Together:
    """The ranks of a source that is spread over several, or None: then there is one, and it leads.

    >>> Together(None).from_leader(lambda: 7, int)
    7
    """

    def __init__(self, ranks: Ranks | None) -> None:
        self._ranks = ranks
        self.leads = ranks is None or ranks.rank == 0

    def everywhere(self, work: Callable[[], T]) -> T:
        """Work that every rank does for itself."""
        result, error = None, None
        try:
            result = work()
        except WeightwireError as failed:
            error = failed
        except Exception as unexpected:
            error = WeightwireError(f"unexpected {unexpected!r}").with_traceback(unexpected.__traceback__)
        if self._ranks is not None:
            self._ranks.agree(error)
        elif error is not None:
            raise error
        return result  # type: ignore[return-value]

    def on_leader(self, work: Callable[[], T]) -> T | None:
        """Work that only rank 0 does."""
        return self.everywhere(lambda: work() if self.leads else None)

    def from_leader(self, work: Callable[[], T], type: Any) -> T:
        """Work that only rank 0 does, whose result all ranks get, as JSON."""
        result = self.on_leader(work)
        if self._ranks is None:
            return result  # type: ignore[return-value]
        data = self._ranks.share(None if result is None else msgspec.json.encode(result))
        return msgspec.json.decode(data, type=type)  # type: ignore[no-any-return]
