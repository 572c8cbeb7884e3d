"""An adapter that is being sealed on the receiver's thread while the engine's own thread looks whether it is."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from weightwire.engines.vllm import adapters


class Matrices:
    """As vLLM's weights of one module: who scales them once, does not scale them again."""

    def __init__(self) -> None:
        self.lora_a, self.lora_b, self.scaling = torch.ones(1), torch.ones(1), 2.0
        self.entered, self.go_on = threading.Event(), threading.Event()

    def optimize(self) -> None:
        if self.scaling != 1:
            self.lora_b *= self.scaling
            self.entered.set()
            assert self.go_on.wait(30)
            self.scaling = 1


def done(value: Any) -> Future[Any]:
    job: Future[Any] = Future()
    job.set_result(value)
    return job


def test_it_enters_the_engine_only_once_it_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_is_made_of", lambda *_: True)
    matrices, entered = Matrices(), []
    built = SimpleNamespace(loras={"q_proj": matrices})
    staged = object.__new__(adapters._Staged)
    vars(staged).update(
        _early=done(SimpleNamespace(flat=[], given={}, device=torch.device("cpu"))), _building=done(built), _lent={},
        _finite=False, _specs=[], _dtype=torch.float32, _built=None, _revision=None,
        _binding=SimpleNamespace(template=None),
        _on_host=adapters._OnHost([]),
        _store=SimpleNamespace(enter=lambda *_: (entered.append(matrices.scaling), ({}, ""))[1]),
    )  # fmt: skip
    sealing = threading.Thread(target=staged.seal, args=([],))
    sealing.start()
    assert matrices.entered.wait(30)
    staged.check(0.0)
    assert entered == []
    matrices.go_on.set()
    sealing.join()
    staged.check(0.0)
    assert entered == [1]
    assert matrices.lora_b.item() == 2.0
