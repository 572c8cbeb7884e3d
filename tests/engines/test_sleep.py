"""What a worker knows of its own sleep. The real thing needs a GPU; vLLM's CPU worker is told, and keeps everything."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from weightwire.engines.vllm.sleep import Sleep
from weightwire.errors import StateError


class Worker:
    """The two methods, and what they were called with."""

    def __init__(self, device: str = "cuda") -> None:
        self.device = torch.device(device)
        self.calls: list[Any] = []
        self.fails = False

    def sleep(self, level: int = 1) -> None:
        self.calls.append(level)
        if self.fails:
            raise RuntimeError("injected")

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.calls.append(tags)
        if self.fails:
            raise RuntimeError("injected")


def watched(worker: Worker) -> tuple[Sleep, list[str]]:
    lost: list[str] = []
    return Sleep(worker, lost.append), lost


def refused(sleep: Sleep) -> bool:
    try:
        sleep.refuse_update()
    except StateError as error:
        return "Wake it up first" in str(error)
    return False


def test_updates_are_refused_from_sleep_to_wake_up() -> None:
    worker = Worker()
    sleep, lost = watched(worker)
    assert not refused(sleep)
    assert not sleep.partly
    worker.sleep(level=1)
    assert refused(sleep)
    worker.wake_up(tags=None)
    assert not refused(sleep)
    assert not sleep.partly
    assert worker.calls == [1, None]
    assert lost == []


def test_with_the_weights_awake_an_update_is_welcome() -> None:
    worker = Worker()
    sleep, _ = watched(worker)
    worker.sleep()
    worker.wake_up(["kv_cache"])
    assert refused(sleep)
    worker.sleep()
    worker.wake_up(["weights"])
    assert not refused(sleep)
    assert sleep.partly
    worker.wake_up(["kv_cache"])
    assert not sleep.partly


def test_what_fails_half_way_is_not_awake() -> None:
    worker = Worker()
    sleep, _ = watched(worker)
    worker.fails = True
    with pytest.raises(RuntimeError, match="injected"):
        worker.sleep(level=1)
    assert refused(sleep)
    with pytest.raises(RuntimeError, match="injected"):
        worker.wake_up()
    assert refused(sleep)


def test_the_deeper_sleep_loses_the_weights() -> None:
    worker = Worker()
    _, lost = watched(worker)
    worker.sleep(level=2)
    assert lost == ["sleep(level=2) discarded the weights"]


def test_a_cpu_loses_nothing() -> None:
    worker = Worker("cpu")
    sleep, lost = watched(worker)
    worker.sleep(level=2)
    assert refused(sleep)
    assert lost == []


def test_an_engine_that_slept_before_is_known_by_its_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    data = {1: SimpleNamespace(tag="weights", is_asleep=True), 2: SimpleNamespace(tag="kv_cache", is_asleep=False)}
    allocator = SimpleNamespace(instance=SimpleNamespace(pointer_to_data=data))
    monkeypatch.setitem(sys.modules, "vllm.device_allocator.cumem", SimpleNamespace(CuMemAllocator=allocator))
    worker = Worker()
    sleep, _ = watched(worker)
    assert refused(sleep)
    worker.wake_up(["weights"])
    assert not refused(sleep)
    allocator.instance = None
    assert not refused(watched(Worker())[0])


@pytest.mark.parametrize(("device", "expected"), [("cuda", ["let go", 1, "let go", 2]), ("cpu", [1, 2])])
def test_what_is_only_kept_is_let_go_of_before_memory_is_freed(device: str, expected: list[Any]) -> None:
    worker = Worker(device)
    Sleep(worker, lambda reason: None, lambda: worker.calls.append("let go"))
    worker.sleep(level=1)
    worker.sleep(level=2)
    assert worker.calls == expected
