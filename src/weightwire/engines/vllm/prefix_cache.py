"""Forget what is cached of old weights, while requests in flight go on with what they have. In vLLM's engine core.

vLLM resets its prefix cache when nothing is in flight, or takes from the requests in flight what they have computed,
and they compute it again: exact, but with many long requests it costs more than the whole update. Here they keep it,
and nobody finds it: the hashes of their blocks, on which those of all later blocks stand, become nobody else's.
"""

from __future__ import annotations

import hashlib
from typing import Any

__all__ = ["pause_apart", "set_apart"]

_APART = "apart from requests that began after an update"


def pause_apart(core: Any) -> Any:
    """`core.pause_scheduler("keep")`, which is answered when nothing is under way. The step that is may still cache
    blocks, but only of requests set apart: from here on no other begins."""
    paused = core.pause_scheduler("keep", False)
    manager = core.scheduler.kv_cache_manager
    for request in core.scheduler.running:
        set_apart(request)
    # vLLM forgets everything or, if a block is in use, nothing: it is told that none is.
    pool = manager.block_pool
    pool.get_num_free_blocks = lambda: pool.num_gpu_blocks - 1
    try:
        if not manager.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")
    finally:
        del pool.get_num_free_blocks
    return paused


def set_apart(request: Any) -> None:
    """Let no other request have the hashes of this one's blocks, neither those it has nor those to come."""
    request.block_hashes[:] = [hashlib.sha256(_APART.encode() + known).digest() for known in request.block_hashes]
    if not request.block_hashes:  # the first one begins the chain
        request.cache_salt = f"{request.cache_salt or ''} {_APART} {request.request_id}"
