"""A module of this process as an engine: what it takes, what it refuses, and what it does when a commit fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import weightwire as ww
from support import same, snapshot, tiny, weights_for

pytestmark = pytest.mark.usefixtures("shm_root", "no_threads_left")


@pytest.fixture
def engine_of() -> Iterator[Callable[[torch.nn.Module], ww.TransformersEngine]]:
    made: list[ww.TransformersEngine] = []

    def make(module: torch.nn.Module) -> ww.TransformersEngine:
        made.append(ww.TransformersEngine(module, name="here"))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def publish(weights: Any, engine: Any, version: int = 1, **options: Any) -> ww.Receipt:
    with ww.Publisher(weights, engine) as publisher:
        return publisher.publish(version, **options)


def refused(
    weights: Any, engine: ww.TransformersEngine, kind: type[ww.WeightwireError], match: str, **options: Any
) -> None:
    """Publishing raises, changes nothing, leaves the engine free, and the next good publish succeeds."""
    old = snapshot(engine.model)
    with pytest.raises(kind, match=match) as caught:
        publish(weights, engine, 1, **options)
    assert type(caught.value) is kind
    assert caught.value.engine == "here"
    assert same(engine.model, old)
    assert (engine.status().state, engine.status().version) == ("idle", None)
    good = weights_for(engine.model, 99)
    publish(good, engine, 1)
    assert same(engine.model, good)


class Tied(torch.nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(32, 16)
        self.head = torch.nn.Linear(16, 32, bias=False)
        if tied:
            self.head.weight = self.embed.weight


# -- what fits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_arrives_bit_for_bit(engine_of: Any, dtype: torch.dtype) -> None:
    engine = engine_of(tiny(dtype))
    publish(new := weights_for(engine.model, 1), engine)
    assert same(engine.model, new)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_is_cast_as_torch_casts_it(engine_of: Any, dtype: torch.dtype) -> None:
    engine = engine_of(tiny(dtype))
    new = weights_for(engine.model, 1, torch.float32)
    receipt = publish(new, engine)
    assert same(engine.model, {name: tensor.to(dtype) for name, tensor in new.items()})
    assert set(receipt.engines["here"].proven.values()) == {"read back"}


def test_odd_shapes_and_buffers_arrive(engine_of: Any) -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scalar = torch.nn.Parameter(torch.tensor(1.0))
            self.nothing = torch.nn.Parameter(torch.empty(0, 3))
            self.turned = torch.nn.Parameter(torch.zeros(5, 3).t())
            self.norm = torch.nn.BatchNorm1d(3)
            self.register_buffer("flags", torch.zeros(5, dtype=torch.bool))
            self.register_buffer("ids", torch.zeros(2, 2, dtype=torch.int64))

    engine = engine_of(Odd())
    new = weights_for(engine.model, 1)
    new["flags"] = torch.tensor([True, False, True, True, False])
    new["ids"] = torch.tensor([[2**62 + 1, -1], [0, 5]])
    new["norm.num_batches_tracked"] = torch.tensor(7)
    publish(new, engine)
    assert same(engine.model, new)


def test_a_partial_update_leaves_the_rest(engine_of: Any) -> None:
    engine = engine_of(tiny())
    expected = snapshot(engine.model)
    expected["1.bias"] = torch.arange(16.0)
    receipt = publish({"1.bias": expected["1.bias"]}, engine, partial=True)
    assert same(engine.model, expected)
    assert receipt.engines["here"].proven == {"1.bias": "read back"}


# -- tied weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", [True, False])
@pytest.mark.parametrize("here", [True, False])
def test_tied_and_untied_sides_understand_each_other(engine_of: Any, trainer: bool, here: bool) -> None:
    engine, source = engine_of(Tied(tied=here)), Tied(tied=trainer)
    if not trainer:
        # As in a checkpoint that lists both: two tensors, one value.
        source.head.weight.data.copy_(source.embed.weight.data)
    receipt = publish(source, engine)
    assert receipt.tensors == (1 if trainer else 2)
    assert same(engine.model, snapshot(source))
    assert (engine.model.head.weight is engine.model.embed.weight) == here


def test_two_different_tensors_cannot_go_into_one(engine_of: Any) -> None:
    engine, source = engine_of(Tied(tied=True)), Tied(tied=False)
    with torch.no_grad():
        source.head.weight[0, 0] += 1
    refused(source, engine, ww.VerificationError, "embed.weight and head.weight are one tensor here")


def test_an_alias_must_fit_too(engine_of: Any) -> None:
    engine, source = engine_of(Tied(tied=False)), Tied(tied=True)
    engine.model.head = torch.nn.Linear(16, 8, bias=False)
    old = snapshot(engine.model)
    with pytest.raises(ww.ShapeMismatch, match=r"head\.weight"):
        publish(source, engine)
    assert same(engine.model, old)


# -- what does not fit ---------------------------------------------------------------------------------------------


def test_a_name_the_model_does_not_have(engine_of: Any) -> None:
    engine = engine_of(tiny())
    refused({**weights_for(engine.model, 1), "2.weight": torch.zeros(1)}, engine, ww.UnknownTensor, r"no 2\.weight")


def test_a_parameter_nobody_sent(engine_of: Any) -> None:
    engine = engine_of(tiny())
    weights = weights_for(engine.model, 1)
    del weights["1.bias"]
    refused(weights, engine, ww.MissingTensor, r"nothing was sent for 1\.bias .*partial=True")


@pytest.mark.parametrize("shape", [(15,), (17,), (16, 1), (4, 4), (), (0,)])
def test_a_wrong_shape(engine_of: Any, shape: tuple[int, ...]) -> None:
    engine = engine_of(tiny())
    weights = {**weights_for(engine.model, 1), "0.bias": torch.zeros(shape)}
    refused(weights, engine, ww.ShapeMismatch, r"0\.bias is float32 \(16,\) here")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.uint8])
def test_a_dtype_that_is_not_a_float_is_not_cast(engine_of: Any, dtype: torch.dtype) -> None:
    engine = engine_of(tiny())
    weights = {**weights_for(engine.model, 1), "0.bias": torch.ones(16, dtype=dtype)}
    refused(weights, engine, ww.ShapeMismatch, r"0\.bias is float32 \(16,\) here, .* was announced")


def test_no_room_for_the_staged_copy(engine_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(tiny())
    old, weights = snapshot(engine.model), weights_for(engine.model, 1)
    needed = sum(tensor.nbytes for tensor in weights.values())
    with monkeypatch.context() as patch:
        patch.setattr(engine.receiver._target, "room", lambda: needed - 1)
        with pytest.raises(ww.RoomError, match=f"needs {needed} bytes on rank 0, {needed - 1} may be used"):
            publish(weights, engine)
        assert same(engine.model, old)
        patch.setattr(engine.receiver._target, "room", lambda: needed)
        publish(weights, engine)
    assert same(engine.model, weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf_are_refused_unless_asked_for(engine_of: Any, value: float, dtype: torch.dtype) -> None:
    engine = engine_of(tiny(dtype))
    weights = weights_for(engine.model, 1)
    weights["1.weight"][3, 5] = value
    refused(weights, engine, ww.NonFinite, r"NaN or Inf in 1\.weight \(1 of 256\)")
    publish(weights, engine, 2, finite=False)
    assert same(engine.model, weights)


def test_an_overflow_in_the_cast_is_no_finite_weight(engine_of: Any) -> None:
    engine = engine_of(tiny(torch.float16))
    weights = weights_for(engine.model, 1, torch.float32)
    weights["0.weight"][0, 0] = 70_000.0
    refused(weights, engine, ww.NonFinite, r"0\.weight overflowed in the cast")
    publish(weights, engine, 2, finite=False)
    assert engine.model.state_dict()["0.weight"][0, 0] == float("inf")


# -- beside generation ---------------------------------------------------------------------------------------------


class Generates(torch.nn.Module):
    """Its output tells whether weights changed while it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(8))
        self.entered, self.leave = threading.Event(), threading.Event()

    def forward(self) -> torch.Tensor:
        return self.weight.detach().clone()

    def generate(self) -> tuple[torch.Tensor, torch.Tensor]:
        before = self()
        self.entered.set()
        self.leave.wait(60)
        return before, self()


def test_a_commit_waits_for_what_is_being_generated(engine_of: Any) -> None:
    model = Generates()
    engine = engine_of(model)
    outputs: list[Any] = []
    generating = threading.Thread(target=lambda: outputs.extend(model.generate()))
    generating.start()
    assert model.entered.wait(60)
    publishing = threading.Thread(target=publish, args=({"weight": torch.ones(8)}, engine))
    publishing.start()
    try:
        publishing.join(0.5)
        assert publishing.is_alive()
        assert torch.equal(model.weight, torch.zeros(8))
    finally:
        model.leave.set()
        generating.join(60)
        publishing.join(60)
    assert torch.equal(outputs[0], torch.zeros(8))
    assert torch.equal(outputs[1], torch.zeros(8))
    assert torch.equal(model(), torch.ones(8))


def test_a_poisoned_model_does_not_generate(engine_of: Any) -> None:
    model = Generates()
    model.leave.set()
    engine = engine_of(model)
    prepare = engine.receiver._target.prepare

    def broken(manifest: Any) -> Any:
        staging = prepare(manifest)
        staging.commit = lambda: 1 / 0
        return staging

    engine.receiver._target.prepare = broken
    with pytest.raises(ww.PoisonedError, match="ZeroDivisionError"):
        publish({"weight": torch.ones(8)}, engine)
    for call in (model, model.generate):
        with pytest.raises(ww.PoisonedError, match="Publish a complete update to heal it"):
            call()
    del engine.receiver._target.prepare
    publish({"weight": torch.full((8,), 2.0)}, engine)
    assert torch.equal(model.generate()[0], torch.full((8,), 2.0))


def test_weights_that_are_not_what_was_sent_poison(engine_of: Any) -> None:
    model = Generates()
    model.leave.set()
    engine = engine_of(model)
    prepare = engine.receiver._target.prepare

    def drifting(manifest: Any) -> Any:
        staging = prepare(manifest)
        commit = staging.commit

        def commit_and_drift() -> None:
            commit()
            model.weight.data[3] += 1e-6

        staging.commit = commit_and_drift
        return staging

    engine.receiver._target.prepare = drifting
    with pytest.raises(ww.PoisonedError, match="weight was read back from the live model and is not what was sent"):
        publish({"weight": torch.ones(8)}, engine)
    assert engine.status().state == "poisoned"
    with pytest.raises(ww.PoisonedError):
        model.generate()
    del engine.receiver._target.prepare
    publish({"weight": torch.ones(8)}, engine, 2)
    assert torch.equal(model.generate()[0], torch.ones(8))


def test_closing_gives_the_model_back_as_it_was() -> None:
    model = Generates()
    model.leave.set()
    plain = dict(vars(model))
    with ww.connect(ww.TransformersEngine(model)):
        assert "generate" in vars(model)
    assert vars(model).keys() == plain.keys()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    model.generate()


def test_connect_knows_a_transformers_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    with ww.connect(model) as engines:
        new = {name: tensor + 1 for name, tensor in snapshot(model).items() if name != "lm_head.weight"}
        publish({**new, "lm_head.weight": new["transformer.wte.weight"]}, engines)
        assert same(model, {**new, "lm_head.weight": new["transformer.wte.weight"]})
        assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (1, 4)


@pytest.mark.parametrize("thing", [5, object(), torch.nn.Linear, {"a": 1}])
def test_connect_says_what_it_takes(thing: Any) -> None:
    with pytest.raises(ww.UsageError, match="Pass a URL, an LLM"):
        ww.connect(thing)


def test_the_same_engine_twice_is_refused(engine_of: Any) -> None:
    engine = engine_of(tiny())
    with pytest.raises(ww.UsageError, match="the same engine twice"):
        ww.connect([engine, engine])
