"""A worker extension for tests: ways to make a real worker fail."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch

from weightwire.engines.vllm.worker import WorkerExtension


class FaultyWorker(WorkerExtension):
    def fail_next_commit(self, rank: int) -> None:
        """The next commit on one rank fails, after its first module, or on a GPU all of it, has been changed."""
        from weightwire.engines.vllm import device, target

        worker = self
        staged: Any = device.DeviceStaging if worker.device.type == "cuda" else target._Staged  # type: ignore[attr-defined]
        commit = staged.commit

        def fail(this: Any) -> None:
            staged.commit = commit
            if worker.rank == rank:  # type: ignore[attr-defined]
                if staged is target._Staged:
                    this._slots[0].commit()
                else:
                    commit(this)
                raise RuntimeError("injected")
            commit(this)

        staged.commit = fail

    def fail_next_delta(self, rank: int) -> None:
        """The next delta's commit into live parameters on a GPU fails on one rank, after all of it was written."""
        from weightwire.engines.vllm.device_delta import DeviceDelta

        worker = self
        commit = DeviceDelta.commit

        def fail(this: DeviceDelta) -> None:
            DeviceDelta.commit = commit  # type: ignore[method-assign]
            commit(this)
            if worker.rank == rank:  # type: ignore[attr-defined]
                raise RuntimeError("injected")

        DeviceDelta.commit = fail  # type: ignore[method-assign]

    def fail_next_adapter(self, rank: int, step: str) -> None:
        """The next adapter's staged copy fails at `step` (write_bucket, lend, seal, check, commit) on one rank."""
        from weightwire.engines.vllm import adapters

        worker = self
        staged = adapters._Staged
        original = getattr(staged, step)

        def fail(this: adapters._Staged, *args: Any) -> Any:
            setattr(staged, step, original)
            if worker.rank == rank:  # type: ignore[attr-defined]
                raise RuntimeError("injected")
            return original(this, *args)

        setattr(staged, step, fail)

    def adapter_loads(self, label: str) -> int:
        """How often vLLM has loaded a revision here."""
        return int(self._store().loads.get(f"weightwire:{label}", 0))

    def adapters_held(self) -> list[int]:
        """How many revisions are held here, how many of ours are in vLLM's own cache, and whether the next one's model
        is made by the pattern of the first."""
        store = self._store()
        cached = sum(id >= 1 << 20 for id in store._manager.list_adapters())
        return [len(store._sent), cached, int(store._binding[1].template is not None)]

    def _store(self) -> Any:
        return self._weightwire_ends.receiver._target.adapters  # type: ignore[attr-defined]

    def spoil_next_packing(self) -> None:
        """The next module that is packed gets a packing of other weights than were staged."""
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        pack = UnquantizedLinearMethod.process_weights_after_loading

        def spoil(method: UnquantizedLinearMethod, layer: torch.nn.Module) -> None:
            UnquantizedLinearMethod.process_weights_after_loading = pack
            layer.weight = torch.nn.Parameter(layer.weight * 2, requires_grad=False)
            pack(method, layer)

        UnquantizedLinearMethod.process_weights_after_loading = spoil

    def watch_products(self) -> None:
        """Note on which threads packings are asked."""
        from weightwire.engines.vllm import layout

        self.asking_threads: set[str] = set()
        ask = layout._ask

        def watched(module: torch.nn.Module, columns: list[int]) -> torch.Tensor:
            self.asking_threads.add(threading.current_thread().name)
            return ask(module, columns)

        layout._ask = watched

    def watched_threads(self) -> list[str]:
        return [threading.main_thread().name, *sorted(self.asking_threads)]

    def limit_staging(self, nbytes: int) -> None:
        os.environ["WEIGHTWIRE_STAGING_LIMIT"] = str(nbytes)

    def lift_limit(self) -> None:
        os.environ.pop("WEIGHTWIRE_STAGING_LIMIT", None)

    def process_id(self) -> int:
        return os.getpid()
