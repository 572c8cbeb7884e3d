"""Revisions: the versions of LoRA adapters that one worker holds, and when each may be forgotten.

An adapter's name means its newest revision; `name@version` pins one. The newest and `keep` older ones (at least one)
are listed, so that new requests can have them. One that is listed no more is held until no client has it in use. A
client is a process that hands revisions to requests (an API server); it reports which ones it may still hand out or has
in flight, and learns which are listed from the answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any, NamedTuple

from weightwire.errors import AdapterNotFound, StateError, VersionError

__all__ = ["Revision", "Revisions"]

# vLLM counts the adapters that it loads from files from 1, and keeps ids in 32 bits.
_FIRST_ID, _LAST_ID = 1 << 20, (1 << 31) - 1


class Revision(NamedTuple):
    """One version of one adapter; `id` is its own among all that a worker holds."""

    name: str
    version: int
    id: int

    @property
    def label(self) -> str:
        """How a request names it.

        >>> Revision("policy", 7, 1).label
        'policy@7'
        """
        return f"{self.name}@{self.version}"


class Revisions:
    """Those of one worker.

    >>> revisions = Revisions(keep=1)
    >>> for version in (7, 8, 9):
    ...     revisions.commit(revisions.open("policy", version, f"{version:x}"))
    >>> [revision.label for revision in revisions.listed()]
    ['policy@8', 'policy@9']
    >>> revisions.report(client=0, clients=1, in_use=[])
    >>> [revision.label for revision in revisions.free()]
    ['policy@7']
    """

    def __init__(self, keep: int = 2) -> None:
        # One more than the newest, so that a commit can be undone.
        self._keep = max(keep, 1)
        self._held: dict[str, list[Revision]] = {}
        self._shown: dict[str, int] = {}
        self._retired: dict[Revision, set[int]] = {}
        self._clients = 1

    def open(self, name: str, version: int, update: str) -> Revision:
        """A new revision, of which nobody hears before `commit`. Its id follows from that of the update, hexadecimal,
        which is random and the same on all ranks. Versions of a name only grow, also after `unload`: caches know by its
        label a revision that was ever listed. Raises `VersionError`."""
        newest = self.spent().get(name)
        if newest is not None and version <= newest:
            raise VersionError(
                f"version {version} of adapter {name!r} is not newer than {newest}",
                next_step=f"Load version {newest + 1} or higher.",
            )
        id = _FIRST_ID + int(update, 16) % (_LAST_ID - _FIRST_ID)
        if any(id == other.id for other in (*itertools.chain(*self._held.values()), *self._retired)):
            raise StateError(f"the id {id} is taken by another revision", next_step="Load it again.")
        return Revision(name, version, id)

    def find(self, name: str, version: int) -> Revision:
        """One that is held, be it listed or not. Raises `VersionError`, which says what is."""
        held = [*self._held.get(name, []), *(other for other in self._retired if other.name == name)]
        if (found := next((revision for revision in held if revision.version == version), None)) is None:
            there = ", ".join(str(each) for each in sorted({revision.version for revision in held})) or "none"
            raise VersionError(
                f"version {version} of adapter {name!r}, from which the delta starts, is not held here: {there}",
                next_step="Publish the whole adapter, or the delta from what is here.",
            )
        return found

    def commit(self, revision: Revision) -> None:
        """List it, as the newest of its name."""
        self._held.setdefault(revision.name, []).append(revision)

    def revert(self, revision: Revision) -> bool:
        """Undo the last `commit`, which not all ranks or engines made; whether there was one to undo. The revision
        before it is the newest again, and this one goes when no client has it in use."""
        held = self._held.get(revision.name, [])
        if not held or held[-1] != revision:
            return False
        self._retire([held.pop()])
        if not held:
            del self._held[revision.name]
        return True

    def unload(self, name: str) -> None:
        """List no revision of `name` any more. Raises `AdapterNotFound` when there is none."""
        if name not in self._held:
            known = ", ".join(sorted(self._held)) or "none"
            raise AdapterNotFound(f"no adapter {name!r} is loaded", next_step=f"Loaded are: {known}.")
        self._retire(self._held.pop(name))

    def listed(self) -> list[Revision]:
        """What new requests can have, the newest of each name last."""
        return [revision for held in self._held.values() for revision in held[-1 - self._keep :]]

    def report(self, client: int, clients: int, in_use: Collection[int]) -> None:
        """Client number `client` of `clients` may hand out the revisions with the ids `in_use`, and no others until it
        has the answer to this report; or they are in flight for it."""
        self._clients = clients
        for name, held in self._held.items():
            self._shown[name] = held[-1].version
            self._retire(held[: -1 - self._keep])
            self._held[name] = held[-1 - self._keep :]
        for revision, users in self._retired.items():
            if revision.id in in_use:
                users.add(client)
            else:
                users.discard(client)

    def free(self) -> list[Revision]:
        """Those that nobody can want again: forgotten here, for the caller to free."""
        free = [revision for revision, users in self._retired.items() if not users]
        for revision in free:
            del self._retired[revision]
        return free

    def status(self) -> list[dict[str, Any]]:
        """One entry for each adapter: its name, its newest version, all versions that can be pinned."""
        versions: dict[str, list[int]] = {}
        for revision in self.listed():
            versions.setdefault(revision.name, []).append(revision.version)
        return [{"name": name, "version": each[-1], "versions": each} for name, each in versions.items()]

    def spent(self) -> dict[str, int]:
        """The newest version that each name has, or had when it was listed."""
        newest = {name: held[-1].version for name, held in self._held.items()}
        return newest | {name: max(version, newest.get(name, version)) for name, version in self._shown.items()}

    def _retire(self, revisions: Collection[Revision]) -> None:
        # Any client may have it in its list until it reports again.
        for revision in revisions:
            self._retired[revision] = set(range(self._clients))
