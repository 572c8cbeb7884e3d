"""Run as a script: a hundred updates of one engine, by two ways. Prints the GPU memory in use after the tenth and after
the last, in bytes, for each transport.

    python hundred.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import models
import torch
from exactness import generate, start

import weightwire as ww


def main(folder: str) -> None:
    model = models.new_model("qwen3", tied=False, seed=1)
    llm = start(models.save(model, Path(folder) / "model"), "bfloat16", 1, False)
    engines = ww.connect(llm)
    source = model.to("cuda", torch.bfloat16)
    results = {}
    version = 0
    for transport in ("cuda-ipc", "shm"):
        used = []
        with ww.Publisher(source, engines, transport=transport) as publisher:
            for number in range(1, 101):
                version += 1
                with torch.no_grad():
                    for parameter in source.parameters():
                        parameter.mul_(1.001)
                publisher.publish(version, deadline=60)
                if number in (10, 100):
                    generate(llm)
                    torch.cuda.synchronize()
                    free, total = torch.cuda.mem_get_info()
                    used.append(total - free)
        results[transport] = used
    llm.llm_engine.engine_core.shutdown()
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
