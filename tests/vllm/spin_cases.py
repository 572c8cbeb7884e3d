"""Waiting asleep, on vLLM's own message queues: a script, which prints the name of each case that held."""

from __future__ import annotations

import threading
from typing import Any

from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc

from weightwire.engines.vllm import plugin, spin

writer = MessageQueue(1, 1)
reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
condition = reader._spin_condition
before = {key: value for key, value in vars(condition).items() if key != "last_read"}


def connect() -> None:
    ready = threading.Thread(target=writer.wait_until_ready)
    ready.start()
    reader.wait_until_ready()
    ready.join()


def as_before() -> bool:
    return {key: value for key, value in vars(condition).items() if key != "last_read"} == before


def spins_of_waiting(seconds: float = 0.4) -> int:
    """How often a reader that waits looks without having slept. Counted, since time says little on a busy machine."""
    yields = 0
    sched_yield = shm_broadcast.sched_yield

    def counted() -> None:
        nonlocal yields
        yields += 1
        sched_yield()

    condition.record_read()  # as after a message: for a second from now on it spins
    shm_broadcast.sched_yield = counted
    try:
        timer = threading.Timer(seconds, writer.enqueue, ["done"])
        timer.start()
        assert reader.dequeue(timeout=60) == "done"
        timer.join()
    finally:
        shm_broadcast.sched_yield = sched_yield
    return yields


def sleeps() -> None:
    assert spins_of_waiting() > 0
    with spin.sleeping([reader]):
        assert spins_of_waiting() == 0
        assert not as_before()
        for number in range(200):  # in quick succession, none is missed
            writer.enqueue(number)
            assert reader.dequeue(timeout=60) == number
    assert as_before()


def restores_after_failures() -> None:
    try:
        with spin.sleeping([reader]):
            reader.dequeue(timeout=0.1)
        raise SystemExit("its own deadline no longer counts")
    except TimeoutError:
        assert as_before()

    class Executor:
        response_mqs = (reader,)

        def collective_rpc(self, method: str, fail: bool) -> None:
            self.slept = not as_before()
            if fail:
                raise RuntimeError(method)

    Executor.collective_rpc = spin._asking(Executor.collective_rpc)  # type: ignore[method-assign]
    executor = Executor()
    for method, slept in (("__weightwire__", True), ("execute_model", False)):
        executor.collective_rpc(method, fail=False)
        assert executor.slept is slept
        assert as_before()
        try:
            executor.collective_rpc(method, fail=True)
            raise SystemExit("a failure was swallowed")
        except RuntimeError:
            assert executor.slept is slept
            assert as_before()


def worker_wakes() -> None:
    class Worker:
        rpc_broadcast_mq = reader

        def _execute_worker_rpc(self, rpc_request: Any) -> None:
            assert as_before()  # while it runs, whatever it is

    Worker._execute_worker_rpc = spin._answering(Worker._execute_worker_rpc)  # type: ignore[method-assign]
    worker = Worker()
    for _ in range(2):
        worker._execute_worker_rpc(("__weightwire__", (), {}, None))
        assert not as_before()
    worker._execute_worker_rpc(("execute_model", (), {}, None))
    assert as_before()


def wraps_once() -> None:
    plugin.register()
    first = MultiprocExecutor.collective_rpc, WorkerProc._execute_worker_rpc
    assert all("__weightwire__" in vars(method) for method in first)
    plugin.register()
    assert (MultiprocExecutor.collective_rpc, WorkerProc._execute_worker_rpc) == first
    del MultiprocExecutor.collective_rpc, WorkerProc._execute_worker_rpc
    spin.install()  # of another vLLM: nothing to wrap, and no error
    assert "collective_rpc" not in vars(MultiprocExecutor)


if __name__ == "__main__":
    connect()
    for case in (sleeps, restores_after_failures, worker_wakes, wraps_once):
        case()
        print("HELD", case.__name__, flush=True)
