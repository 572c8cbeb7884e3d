"""Runs a function of a test file as every rank of a gloo world, in processes of their own.

Run as a script it is a server: it imports torch once and forks ranks for each job, a JSON line on its standard input.
Every job has a deadline, after which what is left of it is killed.
"""

import gc
import importlib
import importlib.util
import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path


class Lab:
    """The tests' side: `lab(function, ranks)`; `dies` are the ranks that are meant to end by SIGKILL. `modules` are
    imported once, for all ranks."""

    def __init__(self, *modules):
        self._server = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            text=True,
            start_new_session=True,
        )

    def __call__(self, function, ranks, *, dies=(), seconds=60.0, **arguments):
        job = {"file": function.__code__.co_filename, "function": function.__name__, "arguments": arguments}
        print(json.dumps(job | {"ranks": ranks, "seconds": seconds}), file=self._server.stdin, flush=True)
        # The first job waits for the server's imports too.
        ready, _, _ = select.select([self._server.stdout], [], [], seconds + 60)
        assert ready, "the lab does not answer"
        ended = json.loads(self._server.stdout.readline())
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(ended) if error is not None]
        assert not errors, "\n".join(errors)
        assert [code for code, _ in ended] == [-9 if rank in dies else 0 for rank in range(ranks)]

    def close(self):
        self._server.stdin.close()
        try:
            self._server.wait(10)
        except subprocess.TimeoutExpired:
            # With the ranks that it forked.
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
        self._server.stdout.close()


def serve():
    answers = os.fdopen(os.dup(1), "w")
    # What ranks and libraries print must not get between the answers.
    os.dup2(2, 1)
    _import_once(sys.argv[1:])
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), file=answers, flush=True)


def _import_once(modules):
    names = (
        "pytest",
        "support.ranks",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "weightwire.engines.transformers",
        "weightwire.publisher",
        "weightwire.sources.fsdp",
    )
    # torch imports the last only when it first needs it, which would be in every rank.
    for name in (*names, "torch._dynamo", *modules):
        importlib.import_module(name)
    import torch

    from weightwire.updates.delta import DELTA_DTYPES, decode, encode, parse

    # Compiles them, and the digest.
    for dtype in DELTA_DTYPES:
        old, new = torch.zeros(2, 2, dtype=dtype)
        new[1] = 1
        decode("w", parse("w", encode("w", old, new).data), old).apply(old)
    if "deepspeed" in sys.modules:
        # It finds out what it could compile, which takes a while; and this it would compile, and gloo does without.
        sys.modules["deepspeed"].ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # torch.compile's table of all of torch, which takes a second.
    torch._dynamo.trace_rules.get_torch_obj_rule_map()
    # Else each rank's garbage collector looks through all that, and copies its pages.
    gc.collect()
    gc.freeze()


def _run(job):
    with tempfile.TemporaryDirectory() as folder:
        fork = multiprocessing.get_context("fork")
        ranks = [fork.Process(target=_be_rank, args=(job, rank, folder)) for rank in range(job["ranks"])]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + job["seconds"]
        ended = []
        for rank, process in enumerate(ranks):
            process.join(max(0.0, deadline - time.monotonic()))
            late = process.is_alive()
            if late:
                process.kill()
                process.join()
            report = Path(folder, f"error-{rank}")
            error = report.read_text() if report.exists() else None
            ended.append([process.exitcode, f"not done after {job['seconds']} s" if late else error])
        return ended


def _be_rank(job, rank, folder):
    try:
        import torch.distributed as dist

        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("error", category)
            # As in pyproject.toml: torch warns of torch.
            warnings.filterwarnings("ignore", category=category, module=r"torch\.")
        # What a launcher such as torchrun sets.
        ranks = str(job["ranks"])
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        store = dist.FileStore(f"{folder}/store", job["ranks"])
        dist.init_process_group("gloo", store=store, rank=rank, world_size=job["ranks"])
        spec = importlib.util.spec_from_file_location("in_lab", job["file"])
        module = importlib.util.module_from_spec(spec)
        sys.modules["in_lab"] = module
        spec.loader.exec_module(module)
        getattr(module, job["function"])(rank, job["ranks"], **job["arguments"])
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
    # Without the destructors of groups, which may wait for ranks that have died.
    os._exit(0)


if __name__ == "__main__":
    serve()
