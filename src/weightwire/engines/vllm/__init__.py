"""vLLM, 0.26 to 0.32: stock, with this package's plugins.

`plugin` is what vLLM loads. In a worker: `worker` answers calls, `target` holds the model, over `skeleton` (an empty
twin of it), `copy_plan` (where each element goes), `recording` (how that is found out), `computed` (what its own loader
must make) and `layout` (how each module takes new weights); `sleep` knows whether that is in memory, and `broadcast`
takes what OpenRLHF's worker interface brings. In the API server: `server`, `gate`, and `host`, which `local` uses too.
`adapters` is where a worker keeps LoRA adapters, `names` how requests find them. `compat` lists every private name that
this leans on.
"""

from typing import Any

__all__ = ["lora_request"]


def __getattr__(name: str) -> Any:
    if name != "lora_request":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from weightwire.engines.vllm.names import lora_request

    return lora_request
