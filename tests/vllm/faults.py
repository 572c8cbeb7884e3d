"""A worker extension for tests: ways to make a real worker fail."""

from __future__ import annotations

import os

from weightwire.engines.vllm.worker import WorkerExtension


class FaultyWorker(WorkerExtension):
    def fail_next_commit(self, rank: int) -> None:
        """The next commit on one rank fails, after the first of its modules has been changed."""
        from weightwire.engines.vllm import target

        worker = self
        staged = target._Staged
        commit = staged.commit

        def fail(this: target._Staged) -> None:
            staged.commit = commit
            if worker.rank == rank:  # type: ignore[attr-defined]
                this._slots[0].commit()
                raise RuntimeError("injected")
            commit(this)

        staged.commit = fail

    def limit_staging(self, nbytes: int) -> None:
        os.environ["WEIGHTWIRE_STAGING_LIMIT"] = str(nbytes)

    def lift_limit(self) -> None:
        os.environ.pop("WEIGHTWIRE_STAGING_LIMIT", None)

    def process_id(self) -> int:
        return os.getpid()
