"""`weightwire demo`: reinforcement learning on one small machine, every step of it served by a running engine.

Read `run.py` first, then `train.py`: the loop that a trainer writes is all there. `serving.py` says what the loop needs
of an engine; `server.py` and `completions.py` are that for vLLM, `local.py` for a Transformers model in this process.
`task.py` and `model.py` are what is learned and by whom, `prove.py` is the proof at the end; `progress.py`, `report.py`
and `charts.py` show it.
"""
