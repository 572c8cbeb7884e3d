"""The names under which requests find adapters, in one process that makes requests (an API server, or a trainer's own).

vLLM looks a model's name up in a table and sends the `LoRARequest` that it finds along with the request. So a name
moves to a new revision by one assignment there, and whoever was given the old one keeps it. Each revision has a request
object of its own; as long as anybody in this process holds that object, its revision is in use.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import MutableMapping, Sequence
from typing import Any

import msgspec

from weightwire.engines.vllm.adapters import path_of
from weightwire.errors import AdapterNotFound
from weightwire.revisions import Revision

__all__ = ["Names", "lora_request", "names_of"]


class Names:
    """`table` is vLLM's own, or a new one; the process is client number `client` of `clients` of the same engine."""

    def __init__(self, table: MutableMapping[str, Any] | None = None, client: int = 0, clients: int = 1) -> None:
        self.table: MutableMapping[str, Any] = {} if table is None else table
        self.client = client
        self.clients = clients
        self._ours: set[str] = set()
        self._requests: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    async def in_use(self) -> dict[str, Any]:
        """The arguments of `Receiver.adapters`: what may be handed out here, or is held by somebody."""
        return {"client": self.client, "clients": self.clients, "in_use": list(self._requests)}

    async def list(self, revisions: Sequence[Revision]) -> None:
        """Put these into the table, each by its label, and the last of a name by the name alone, too."""
        entries: dict[str, Any] = {}
        for revision in revisions:
            request = self._requests.get(revision.id)
            if request is None:
                request = self._requests[revision.id] = _make_request(revision)
            entries[revision.label] = entries[revision.name] = request
        self.table.update(entries)
        for gone in self._ours - entries.keys():
            self.table.pop(gone, None)
        self._ours = set(entries)


def names_of(llm: Any) -> Names:
    """Those of an `LLM` or `AsyncLLM` in this process, the same for all who connect to it."""
    if not hasattr(llm, "_weightwire_names"):
        llm._weightwire_names = Names()
    return llm._weightwire_names  # type: ignore[no-any-return]


def lora_request(llm: Any, name: str) -> Any:
    """vLLM's `LoRARequest` for an adapter that was loaded into this `LLM` or `AsyncLLM`: `policy` is the newest
    revision now, `policy@7` that one. Its revision is kept for as long as the object is. Raises `AdapterNotFound`."""
    names: Names | None = getattr(llm, "_weightwire_names", None)
    table = {} if names is None else names.table
    if name not in table:
        raise AdapterNotFound(
            f"no adapter {name!r} is loaded", next_step=f"Loaded are: {', '.join(sorted(table)) or 'none'}."
        )
    return table[name]


def _make_request(revision: Revision) -> Any:
    # Its own name, by which vLLM's prefix cache tells revisions apart, and which outputs bear.
    return _request_type()(lora_name=revision.label, lora_int_id=revision.id, lora_path=path_of(revision))


@functools.cache
def _request_type() -> Any:
    """vLLM's `LoRARequest`, the same on the wire, but such that holders of one can be noticed."""
    from vllm.lora.request import LoRARequest

    def reduce(request: Any) -> tuple[Any, ...]:
        # Where vLLM copies or sends one between its own processes, it becomes a plain one.
        return LoRARequest, msgspec.structs.astuple(request)

    return msgspec.defstruct("Request", [], bases=(LoRARequest,), weakref=True, namespace={"__reduce__": reduce})
