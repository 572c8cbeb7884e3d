"""weightwire: new weights from a training process into running LLM inference engines, as one verified step.

>>> import torch, weightwire as ww
>>> engines = ww.connect(ww.TransformersEngine(torch.nn.Linear(2, 2, bias=False), name="here"))
>>> receipt = ww.Publisher({"weight": torch.ones(2, 2)}, engines).publish(version=1)
>>> receipt.version, receipt.engines["here"].proven
(1, {'weight': 'read back'})
"""

import importlib
from typing import TYPE_CHECKING, Any

from weightwire.errors import *  # noqa: F403
from weightwire.errors import __all__ as _errors

if TYPE_CHECKING:
    import weightwire.engines.vllm as vllm
    from weightwire.connection import Engines, connect
    from weightwire.engines.transformers import TransformersEngine
    from weightwire.publisher import Publisher
    from weightwire.updates.receipt import EngineReceipt, Receipt

WORKER_EXTENSION = "weightwire.engines.vllm.worker.WorkerExtension"
"""For `LLM(..., worker_extension_cls=...)` where the plugin is not loaded (`VLLM_PLUGINS` leaves it out), or
where a trainer speaks OpenRLHF's worker interface."""

# Looked up on first use: every vLLM process imports this package, and most of them need none of it.
_HOMES = {
    "Engines": "weightwire.connection",
    "connect": "weightwire.connection",
    "TransformersEngine": "weightwire.engines.transformers",
    "Publisher": "weightwire.publisher",
    "EngineReceipt": "weightwire.updates.receipt",
    "Receipt": "weightwire.updates.receipt",
}

__all__ = [
    "WORKER_EXTENSION", "EngineReceipt", "Engines", "Publisher", "Receipt", "TransformersEngine", "connect", "vllm"
]  # fmt: skip
__all__ += _errors


def __getattr__(name: str) -> Any:
    if name == "vllm":
        return importlib.import_module("weightwire.engines.vllm")
    if name not in _HOMES:
        raise AttributeError(f"module 'weightwire' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
