"""Run as a script, with malloc as `weightwire serve` sets it: twenty updates of a model. Prints the bytes of its
weights and, of each update, the most private memory that this process had beyond what it had before the first.

    python staging_memory.py packs|plain
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from support.staging import Updates

_LAYER = [(1024, 512), (512, 512), (1536, 512), (512, 768)]


def private() -> int:
    """Bytes of memory that no other process shares."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon:")).split()[1])


def main(kind: str) -> None:
    torch.set_num_threads(1)
    # What is compiled and imported, and what libraries keep, is no part of an update.
    small = Updates([(64, 64), (32, 64)], kind == "packs")
    update(small)
    small.close()
    updates = Updates([(4096, 512), *(_LAYER * 8)], kind == "packs")
    start = private()
    peaks = [update(updates) - start for _ in range(20)]
    updates.close()
    print(json.dumps({"weights": sum(tensor.nbytes for tensor in updates.weights.values()), "peaks": peaks}))


def update(updates: Updates) -> int:
    for tensor in updates.weights.values():
        tensor.mul_(1.5)
    seen = [0]
    staged = updates.begin()

    def watch() -> None:
        wait(staged._ready)  # so that runs are alike
        seen.append(private())

    updates.write(staged, watch)
    updates.commit(staged)
    seen.append(private())
    staged.proof()
    staged.discard()
    return max(*seen, private())


if __name__ == "__main__":
    main(*sys.argv[1:])
