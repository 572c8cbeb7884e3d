"""vLLM, 0.26 to 0.32: stock, with this package's plugins.

`plugin` is what vLLM loads. In a worker: `worker` answers calls, `target` holds the model, over `skeleton` (an empty
twin of it), `copy_plan` (where each element goes) and `layout` (how each module takes new weights). In the API server:
`server`, `gate`, and `host`, which `local` uses too. `compat` lists every private name that this leans on.
"""
