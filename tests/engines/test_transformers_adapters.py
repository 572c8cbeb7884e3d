"""LoRA adapters in a Transformers model of this process: the same outputs as from PEFT's own files, bit for bit."""

from __future__ import annotations

import builtins
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

import weightwire as ww
from support import same, snapshot, tiny, weights_for
from weightwire.engines import transformers_adapters
from weightwire.engines.transformers import ModuleTarget
from weightwire.revisions import Revision
from weightwire.sources.base import spec_of
from weightwire.updates.manifest import Adapter, Manifest

pytestmark = pytest.mark.usefixtures("shm_root", "no_threads_left")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
CONFIGS = {"qwen3": transformers.Qwen3Config, "llama": transformers.LlamaConfig}


def model_of(family: str = "qwen3", dtype: torch.dtype = torch.float32, *, tied: bool = False) -> Any:
    """The same weights at every call."""
    torch.manual_seed(0)
    config = CONFIGS[family](**SIZES, tie_word_embeddings=tied)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def trained(model: Any, seed: int, **settings: Any) -> Any:
    """A PEFT model around `model`, whose adapter has learned something."""
    settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **settings}
    policy = peft.get_peft_model(model, peft.LoraConfig(**settings))
    train(policy, seed)
    return policy


def train(policy: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def saved(policy: Any, folder: Path) -> Path:
    policy.save_pretrained(folder, save_embedding_layers=False)
    return folder


def parts(folder: Path) -> tuple[dict[str, torch.Tensor], str]:
    """What `adapters.load` wants of a folder."""
    return load_file(folder / "adapter_model.safetensors"), (folder / "adapter_config.json").read_text()


def outputs(model: Any, ids: torch.Tensor = IDS) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    return logits, model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)


def equal(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def injected(model: torch.nn.Module) -> set[str]:
    """The names of all adapters in PEFT's layers."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return {name for layer in layers for name in layer._get_available_adapters()}


@pytest.fixture
def served() -> Iterator[Callable[..., tuple[Any, Any]]]:
    """A model and the engine around it, each time it is called."""
    made: list[ww.TransformersEngine] = []

    def start(model: Any = None) -> tuple[Any, Any]:
        made.append(ww.TransformersEngine(model_of() if model is None else model, name="here"))
        return made[-1].model, made[-1]

    yield start
    for engine in made:
        engine.close()


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[..., Path]:
    """Saves an adapter that was trained on `model_of()`."""

    def make(seed: int, **settings: Any) -> Path:
        return saved(trained(model_of(), seed, **settings), tmp_path / f"adapter-{seed}")

    return make


def reference(folder: Path, *arguments: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return outputs(peft.PeftModel.from_pretrained(model_of(*arguments, **more), folder))


def load(engine: Any, folder: Path, version: int | None = None, name: str = "policy") -> Any:
    receipt = ww.Engines([engine]).adapters.load(name, *parts(folder), version=version)
    return receipt.engines["here"]


# -- the same as PEFT --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 1, "lora_alpha": 1},
        {"r": 8, "lora_alpha": 32, "target_modules": ATTENTION},
        {"r": 8, "lora_alpha": 4, "target_modules": MLP},
        {"r": 8, "lora_alpha": 16, "use_rslora": True, "lora_dropout": 0.5},
        {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 3}},
        {"r": 3, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"r": 2, "target_modules": ATTENTION, "layers_to_transform": [1]},
    ],
    ids=["r1", "attention", "mlp", "rslora", "patterns", "embeddings", "one-layer"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_outputs_are_those_of_peft(
    served: Any, tmp_path: Path, family: str, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    folder = saved(trained(model_of(family, dtype), 1, **settings), tmp_path / "adapter")
    expected, base = reference(folder, family, dtype), outputs(model_of(family, dtype))
    model, engine = served(model_of(family, dtype))

    receipt = load(engine, folder, 7)

    assert (receipt.adapter, receipt.kind, receipt.pause) == ("policy@7", "adapter", 0.0)
    assert set(receipt.proven.values()) == {"read back"}
    assert len(receipt.proven) == receipt.tensors // 2
    assert len(receipt.held) == 1
    assert equal(outputs(model), base)
    with engine.adapter("policy") as label:
        assert label == "policy@7"
        assert equal(outputs(model), expected)
    assert not equal(expected, base)
    assert equal(outputs(model), base)


def test_a_narrower_adapter_is_that_of_peft(served: Any, folder_of: Any, tmp_path: Path) -> None:
    policy = trained(model_of(), 1)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    folder = saved(policy, tmp_path / "adapter")
    model, engine = served()
    load(engine, folder)
    with engine.adapter("policy"):
        assert equal(outputs(model), reference(folder))


@pytest.mark.parametrize("reads", ["whole", "a folder"])
def test_what_an_engine_would_cast_is_sent_cast(
    served: Any, folder_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: str
) -> None:
    policy = trained(model_of(), 1)
    folder = saved(policy, tmp_path / "wide")
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    expected = reference(saved(policy, tmp_path / "narrow"))
    whole = ww.Publisher(folder, served()[1]).publish(1)
    monkeypatch.setattr(ModuleTarget, "adapter_dtype", "bfloat16")
    model, engine = served()
    with ww.Publisher(folder if reads == "a folder" else trained(model_of(), 1), engine) as publisher:
        receipt = publisher.publish(1)
    assert receipt.nbytes * 2 == whole.nbytes
    with engine.adapter("policy"):
        assert equal(outputs(model), expected)


def test_an_engine_that_casts_otherwise_than_it_did_takes_nothing_that_was_cast_for_it(
    served: Any, folder_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = served()
    monkeypatch.setattr(ModuleTarget, "adapter_dtype", "bfloat16")
    with ww.Publisher(folder_of(1), engine) as publisher:
        narrow = publisher.publish(1)
        monkeypatch.setattr(ModuleTarget, "adapter_dtype", "float32")
        with pytest.raises(ww.UnsupportedError, match=r"cast to bfloat16, .* in float32.*Publish again"):
            publisher.publish(2)
        assert publisher.publish(2).nbytes == 2 * narrow.nbytes


def test_engines_that_cast_to_different_dtypes_are_sent_what_there_is(
    served: Any, folder_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = [served()[1] for _ in range(2)]
    engines[1].name = "there"
    monkeypatch.setattr(engines[0]._host.receiver._target, "adapter_dtype", "bfloat16")
    whole = ww.Publisher(folder_of(1), engines[1]).publish(1)
    assert ww.Publisher(folder_of(1), engines).publish(2).nbytes == whole.nbytes
    assert ww.Publisher(folder_of(1), engines[0]).publish(3).nbytes * 2 == whole.nbytes


def test_tied_embeddings_stay_tied(served: Any, tmp_path: Path) -> None:
    model, engine = served(model_of(tied=True))
    base = outputs(model)
    folder = saved(trained(model_of(tied=True), 1, target_modules=["q_proj"]), tmp_path / "adapter")
    load(engine, folder)
    tensors = {f"base_model.model.model.embed_tokens.lora_embedding_{side}": t for side, t in embedding().items()}
    ww.Engines([engine]).adapters.load("other", tensors, {"r": 2, "lora_alpha": 2, "target_modules": ["embed_tokens"]})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert equal(outputs(model), base)
    with engine.adapter("other"):
        assert not equal(outputs(model), base)
    with engine.adapter("policy"):
        assert equal(outputs(model), reference(folder, tied=True))


def embedding() -> dict[str, torch.Tensor]:
    return {"A": torch.ones(2, SIZES["vocab_size"]), "B": torch.randn(SIZES["hidden_size"], 2)}


def test_a_trainer_publishes_its_peft_model(served: Any, tmp_path: Path) -> None:
    model, engine = served()
    policy = trained(model_of(), 0, r=4)
    with ww.Publisher(policy, engine) as publisher:
        for version in (1, 2):
            train(policy, version)
            assert publisher.publish(version).engines["here"].adapter == f"policy@{version}"
            with engine.adapter("policy"):
                assert equal(outputs(model), reference(saved(policy, tmp_path / f"{version}")))


def test_the_digest_of_what_is_held_tells_adapters_apart(served: Any, folder_of: Any) -> None:
    _, engine = served()
    first, second = folder_of(1), folder_of(2)
    held = [load(engine, folder).held for folder in (first, second, first)]
    assert held[0] == held[2] != held[1]


# -- the base model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_the_base_model_is_as_it_was(served: Any, folder_of: Any, training: bool) -> None:
    folder = folder_of(1, lora_dropout=0.5)
    model, engine = served()
    model.train(training)
    model.lm_head.requires_grad_(False)
    frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    base, random = outputs(model), torch.get_rng_state()
    load(engine, folder)
    assert torch.equal(torch.get_rng_state(), random)
    assert {module.training for module in model.modules()} == {training}
    with engine.adapter("policy"):
        assert not equal(outputs(model), base)
    assert equal(outputs(model), base)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) not in frozen and ".lora_" not in name)
    assert "peft_config" not in vars(model)


def test_a_dense_update_between_two_versions(served: Any, folder_of: Any) -> None:
    first, second = folder_of(1), folder_of(2, r=4, target_modules=ATTENTION)
    model, engine = served()
    load(engine, first, 1)
    other = model_of()
    other.load_state_dict(new := weights_for(other, 5))
    with ww.Publisher(new, engine) as publisher:
        receipt = publisher.publish(3).engines["here"]
    assert set(receipt.proven) == set(new)
    load(engine, second, 2)
    assert equal(outputs(model), outputs(other))
    for name, folder in (("policy@1", first), ("policy", second)):
        wanted = model_of()
        wanted.load_state_dict(new)
        with engine.adapter(name):
            assert equal(outputs(model), outputs(peft.PeftModel.from_pretrained(wanted, folder)))
    with pytest.raises(ww.MissingTensor), ww.Publisher({"lm_head.weight": new["lm_head.weight"]}, engine) as publisher:
        publisher.publish(4)


def test_unloading_the_last_and_closing_give_the_module_back(folder_of: Any) -> None:
    folder, model = folder_of(1), model_of()
    before, modules = snapshot(model), [(name, type(module)) for name, module in model.named_modules()]
    with ww.Engines([ww.TransformersEngine(model, name="here")]) as engines:
        load(engines[0], folder)
        assert not same(model, before)
        engines.adapters.unload("policy")
        assert same(model, before)
        load(engines[0], folder, 2)
    assert same(model, before)
    assert [(name, type(module)) for name, module in model.named_modules()] == modules


# -- names, and how long they last -------------------------------------------------------------------------------------


def test_pins_and_retirement(served: Any, folder_of: Any) -> None:
    folders = {version: folder_of(version) for version in range(1, 6)}
    expected = {version: reference(folder) for version, folder in folders.items()}
    model, engine = served()
    adapters = ww.Engines([engine]).adapters
    for version, folder in folders.items():
        load(engine, folder)
        for pinned in range(max(1, version - 2), version + 1):
            with engine.adapter(f"policy@{pinned}"):
                assert equal(outputs(model), expected[pinned])
        with engine.adapter("policy") as label:
            assert label == f"policy@{version}"
            assert equal(outputs(model), expected[version])
        assert len(injected(model)) <= 3
    assert adapters.list() == {"here": [{"name": "policy", "version": 5, "versions": [3, 4, 5]}]}
    with pytest.raises(ww.AdapterNotFound, match=r"no adapter .policy@2. is loaded\. Loaded are: policy, policy@3"):
        with engine.adapter("policy@2"):
            pass
    adapters.unload("policy")
    assert adapters.list() == {"here": []}
    with pytest.raises(ww.AdapterNotFound, match="Loaded are: none"), engine.adapter("policy"):
        pass
    with pytest.raises(ww.AdapterNotFound, match="no adapter 'policy' is loaded"):
        adapters.unload("policy")
    assert injected(model) == set()


def test_connect_takes_the_model_itself(folder_of: Any) -> None:
    folder, model = folder_of(1), model_of()
    with ww.connect(model) as engines:
        engines.adapters.load("policy", *parts(folder))
        with engines[0].adapter("policy"):
            assert equal(outputs(model), reference(folder))


def test_blocks_are_nested_and_names_are_apart(served: Any, folder_of: Any) -> None:
    first, second = folder_of(1, target_modules=ATTENTION), folder_of(2, target_modules=MLP)
    model, engine = served()
    base = outputs(model)
    load(engine, first, name="a.b")
    load(engine, second, name="c")
    with engine.adapter("a.b"):
        with engine.adapter("c@1"):
            assert equal(outputs(model), reference(second))
        assert equal(outputs(model), reference(first))
        with pytest.raises(ZeroDivisionError), engine.adapter("c"):
            _ = 1 / 0
        assert equal(outputs(model), reference(first))
    assert equal(outputs(model), base)


def test_thirty_versions_in_a_row_do_not_grow(served: Any) -> None:
    model, engine = served()
    policy = trained(model_of(), 0, r=2)
    with ww.Publisher(policy, engine) as publisher:
        for version in range(1, 31):
            train(policy, version)
            publisher.publish(version)
            assert len(injected(model)) == min(version, 3)
    expected = outputs(policy)
    with engine.adapter("policy@30"):
        assert equal(outputs(model), expected)


def test_a_revision_in_use_is_not_freed(served: Any, folder_of: Any) -> None:
    folder = folder_of(1)
    model, engine = served()
    load(engine, folder)
    expected = reference(folder)
    with engine.adapter("policy"):
        unloading = threading.Thread(target=ww.Engines([engine]).adapters.unload, args=("policy",))
        unloading.start()
        unloading.join(60)
        assert not unloading.is_alive()
        assert equal(outputs(model), expected)
        with pytest.raises(ww.AdapterNotFound), engine.adapter("policy"):
            pass
        assert equal(outputs(model), expected)
    load(engine, folder, name="other")
    assert len(injected(model)) == 1


def test_an_update_waits_for_the_end_of_a_block(served: Any, folder_of: Any) -> None:
    first, second = folder_of(1), folder_of(2)
    model, engine = served()
    load(engine, first)
    expected = reference(first)
    with engine.adapter("policy"):
        loading = threading.Thread(target=load, args=(engine, second))
        loading.start()
        loading.join(0.5)
        assert loading.is_alive()
        assert engine._host.receiver.status()["state"] == "staging"
        assert equal(outputs(model), expected)
        with pytest.raises(ww.UsageError, match="Leave the block first"):
            load(engine, second)
    loading.join(60)
    with engine.adapter("policy"):
        assert equal(outputs(model), reference(second))


def test_a_revision_dropped_while_the_model_is_busy_goes_later(served: Any, folder_of: Any) -> None:
    model, engine = served()
    load(engine, folder_of(1))
    with engine.adapter("policy"):
        # What nobody does: a revision goes that is listed still.
        engine._host.adapters.drop(engine._host.names["policy"])
        assert len(injected(model)) == 1
    assert injected(model) == set()
    with pytest.raises(ww.AdapterNotFound), engine.adapter("policy"):
        pass


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.fixture
def serving(served: Any, folder_of: Any) -> Iterator[tuple[Any, Any]]:
    """A model and its engine with `policy@5`, which must still be served as it was at the end, and the base as well."""
    folder = folder_of(5)
    model, engine = served()
    base, expected = outputs(model), reference(folder)
    load(engine, folder, 5)
    yield model, engine
    assert equal(outputs(model), base)
    with engine.adapter("policy") as label:
        assert (label, equal(outputs(model), expected)) == ("policy@5", True)
    assert engine.status().adapters == [{"name": "policy", "version": 5, "versions": [5]}]
    assert len(injected(model)) == 1
    load(engine, folder)
    with engine.adapter("policy@6"):
        assert equal(outputs(model), expected)


def begin(engine: Any, tensors: Mapping[str, torch.Tensor], config: dict[str, Any]) -> None:
    """What a source would refuse already."""
    specs = tuple(spec_of(name, tensor) for name, tensor in tensors.items())
    manifest = Manifest(version=6, kind="adapter", adapter=Adapter(name="policy", config=config), tensors=specs)
    engine.begin(manifest, holder="test", lease=60.0, timeout=60.0)


def pair(module: str, inputs: int, outputs: int, r: int = 2) -> dict[str, torch.Tensor]:
    name = f"base_model.model.{module}"
    return {f"{name}.lora_A.weight": torch.ones(r, inputs), f"{name}.lora_B.weight": torch.ones(outputs, r)}


PLAIN = {"r": 2, "lora_alpha": 2}
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "config", "kind", "match"),
    [
        (pair("model.layers.7.self_attn.q_proj", 64, 64), PLAIN, ww.UnknownTensor, r"no Linear .*layers\.7.*\(1 of"),
        (pair("model.norm", 64, 64), PLAIN, ww.UnknownTensor, r"model\.norm"),
        (pair("model.layers.0", 64, 64), PLAIN, ww.UnknownTensor, r"model\.layers\.0 "),
        (pair(Q_PROJ, 63, 64), PLAIN, ww.ShapeMismatch, r"lora_A.weight is \(2, 63\), .* takes \(2, 64\)"),
        (pair(Q_PROJ, 64, 32), PLAIN, ww.ShapeMismatch, r"lora_B.weight is \(32, 2\), .* takes \(64, 2\)"),
        (pair("model.embed_tokens", 32, 64), PLAIN, ww.ShapeMismatch, "takes no such tensor"),
        (pair(Q_PROJ, 64, 64), {**PLAIN, "r": 3}, ww.ShapeMismatch, "the config says 3"),
        (pair(Q_PROJ, 64, 64), {**PLAIN, "use_dora": True}, ww.UnsupportedError, "DoRA"),
    ],
)
def test_what_does_not_fit(serving: Any, tensors: Any, config: Any, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match) as caught:
        begin(serving[1], tensors, config)
    assert type(caught.value) is kind


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf(serving: Any, folder_of: Any, value: float) -> None:
    tensors, config = parts(folder_of(6))
    name = sorted(tensors)[3]
    tensors[name][0, 0] = value
    with pytest.raises(ww.NonFinite, match=f"{name} \\(1 of"):
        ww.Engines([serving[1]]).adapters.load("policy", tensors, config, version=6)


@pytest.mark.parametrize("version", [4, 5])
def test_an_old_version(serving: Any, folder_of: Any, version: int) -> None:
    with pytest.raises(ww.VersionError, match="Load version 6 or higher"):
        load(serving[1], folder_of(6), version)


def test_dora_is_refused_where_it_is_read(serving: Any) -> None:
    with pytest.raises(ww.UnsupportedError, match="DoRA"):
        ww.Publisher(trained(model_of(), 1, use_dora=True), serving[1]).publish(6)


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("again", ["update_layer", "_move_adapter_to_device_of_base_layer"])
def test_an_injection_that_fails_half_way(
    serving: Any, folder_of: Any, monkeypatch: pytest.MonkeyPatch, after: int, again: str
) -> None:
    model, engine = serving
    folder, calls, sound = folder_of(6), [], getattr(peft.tuners.lora.LoraLayer, again)

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) > after:
            raise RuntimeError("no memory for this")
        return sound(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(peft.tuners.lora.LoraLayer, again, failing)
        with pytest.raises(ww.EngineError, match="no memory for this"):
            load(engine, folder, 6)
    assert len(calls) == after + 1
    assert len(injected(model)) == 1


def test_the_very_first_injection_fails(served: Any, folder_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, (model, engine) = folder_of(1), served()
    before = snapshot(model)
    monkeypatch.setattr(transformers_adapters, "_fill", lambda live, tensors: 1 / 0)
    with pytest.raises(ww.EngineError, match="ZeroDivisionError"):
        load(engine, folder)
    assert same(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_is_read_back_must_be_what_was_sent(serving: Any, folder_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = transformers_adapters.scan

    def drifting(tensor: torch.Tensor) -> Any:
        # Of the live parameter and of what was sent in turn.
        monkeypatch.setattr(transformers_adapters, "scan", scan)
        return scan(tensor + 1e-3)

    monkeypatch.setattr(transformers_adapters, "scan", drifting)
    with pytest.raises(ww.VerificationError, match="was read back and is not what was sent"):
        load(serving[1], folder_of(6), 6)


def test_a_sealed_one_that_is_aborted(serving: Any, folder_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine = serving
    with monkeypatch.context() as patch:
        patch.setattr(engine._host.receiver, "_ops", {**engine._host.receiver._ops, "commit": lambda id: 1 / 0})
        with pytest.raises(ww.EngineError, match="commit failed"):
            load(engine, folder_of(6), 6)
    engine.status()
    assert len(injected(model)) == 1


def test_a_model_with_adapters_of_its_own(served: Any, folder_of: Any) -> None:
    folder = folder_of(1)
    policy = trained(model_of(), 2)
    _, engine = served(policy.get_base_model())
    expected = outputs(policy)
    with pytest.raises(ww.UnsupportedError, match="PEFT adapters of its own"):
        load(engine, folder)
    assert equal(outputs(policy), expected)


def test_an_adapter_for_any_module(served: Any) -> None:
    model, engine = served(tiny())
    x = torch.randn(3, 16)
    with torch.no_grad():
        base = model(x)
        ww.Engines([engine]).adapters.load("policy", pair("1", 16, 16), {"r": 2, "lora_alpha": 6})
        assert torch.equal(model(x), base)
        with engine.adapter("policy"):
            difference = model(x) - base
    torch.testing.assert_close(difference, model[0](x).sum(-1, keepdim=True).expand(3, 16) * 2 * 3)


def test_without_peft_it_says_what_to_install(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, engine = served(tiny())
    sound = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "peft":
            raise ImportError(name)
        return sound(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ww.UnsupportedError, match=r"pip install 'weightwire\[peft\]'"):
        begin(engine, pair("1", 16, 16), PLAIN)


def test_dropping_what_never_was(served: Any) -> None:
    model, engine = served(tiny())
    before = snapshot(model)
    engine._host.adapters.drop(Revision("policy", 1, 1))
    assert same(model, before)


def test_no_engines_is_an_error_that_says_so() -> None:
    with pytest.raises(ww.UsageError, match="no engines"):
        ww.connect([]).adapters.load("policy", pair(Q_PROJ, 16, 16), PLAIN)


def test_an_object_that_was_never_connected_has_no_adapters() -> None:
    with pytest.raises(ww.AdapterNotFound, match="Loaded are: none"):
        ww.vllm.lora_request(object(), "policy")
