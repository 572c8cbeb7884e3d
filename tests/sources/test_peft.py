import contextlib
import json
import shutil
from unittest import mock

import peft
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import weightwire as ww
from weightwire.engines.transformers import ModuleTarget
from weightwire.errors import ManifestError, MissingTensor, ShapeMismatch, SourceError, UnknownTensor, UnsupportedError
from weightwire.sources import find
from weightwire.sources.base import LocalSource
from weightwire.sources.checkpoint import CheckpointSource
from weightwire.sources.peft import AdapterFolderSource, AdapterSource, PeftSource
from weightwire.sources.tensors import ModuleSource, TensorSource
from weightwire.updates.adapter import PREFIX, plain_config
from weightwire.updates.digest import scan

pytestmark = [
    # PEFT says so whenever it saves an adapter of an embedding, and of every model that is not on the Hub.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]

SOON = 10.0
TARGETS = ["q_proj", "down_proj"]


def base_model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


def lora(r=4, **more):
    return peft.LoraConfig(**({"r": r, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | more))


def trained(model):
    """No longer as it began, where every B is zero."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return model


def adapted(adapter="default", **config):
    return trained(peft.get_peft_model(base_model(), lora(**config), adapter_name=adapter))


def reads(source):
    tensors = {}
    for number, spec in enumerate(source.metadata()):
        tensors[spec.name] = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
        flat = tensors[spec.name].reshape(-1)
        assert source.read(number, 0, flat) == scan(flat)
    source.release()
    return tensors


def same(tensors, others):
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype
        assert torch.equal(tensor, others[name]), name


def saved_state(model, adapter="default"):
    return peft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


# -- a module ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "config"),
    [
        ("default", {}),
        ("policy", {"use_rslora": True}),
        ("q_proj", {"target_modules": "all-linear"}),
        ("lora_A", {"target_modules": ["embed_tokens", "lm_head"]}),
        ("weight", {"rank_pattern": {"layers.1.mlp.down_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
        ("a+b", {"target_modules": r".*layers\.0.*_proj", "init_lora_weights": "gaussian"}),
    ],
)
def test_a_peft_model_is_read_under_the_names_that_peft_saves(adapter, config):
    model = adapted(adapter, **config)
    source = find(model, timeout=SOON)
    assert type(source) is PeftSource
    assert source.ranks is None
    same(reads(source), saved_state(model, adapter))
    assert source.lora == plain_config(model.peft_config[adapter])
    assert source.aliases == {}


def test_it_is_read_anew_and_so_is_its_config():
    model = adapted()
    source = PeftSource(model)
    before = reads(source)
    trained(model).peft_config["default"].lora_alpha = 32
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert source.lora["lora_alpha"] == 8
    after = reads(source)
    same(after, saved_state(model))
    assert not any(torch.equal(after[name], before[name]) for name in after)
    assert source.lora["lora_alpha"] == 32


def test_dtypes_are_those_of_the_adapter():
    model = adapted().to(torch.bfloat16)
    assert {spec.dtype for spec in PeftSource(model).metadata()} == {"bfloat16"}


def test_the_active_adapter_of_several_or_the_one_that_is_named():
    model = adapted("first")
    model.add_adapter("second", lora(r=2, target_modules=["q_proj"]))
    trained(model)
    assert all(parameter.abs().sum() for name, parameter in model.named_parameters() if "second" in name)
    for adapter, rank in (("first", 4), ("second", 2)):
        same(reads(PeftSource(model, adapter)), saved_state(model, adapter))
        model.set_adapter(adapter)
        source = find(model, timeout=SOON)
        same(reads(source), saved_state(model, adapter))
        assert source.lora["r"] == rank


def test_a_name_is_found_by_what_peft_hung_up_not_by_what_modules_are_called():
    model = base_model()
    model.model.layers[0].policy = torch.nn.Linear(4, 4)
    model = trained(peft.get_peft_model(model, lora(target_modules=["policy"]), adapter_name="other"))
    model.add_adapter("policy", lora(target_modules=["policy"]))
    for adapter in ("other", "policy"):
        assert [spec.name for spec in PeftSource(model, adapter).metadata()] == [
            f"{PREFIX}model.layers.0.policy.lora_A.weight",
            f"{PREFIX}model.layers.0.policy.lora_B.weight",
        ]


def test_which_adapter_must_be_clear():
    model = adapted("first")
    model.add_adapter("second", lora())
    with pytest.raises(SourceError, match=r"there is no adapter 'third'\. There are: 'first', 'second'"):
        PeftSource(model, "third")
    model.base_model.set_adapter(["first", "second"])
    with pytest.raises(SourceError, match=r"2 adapters are active: 'first', 'second'\. Name one"):
        find(model, timeout=SOON)
    with pytest.raises(SourceError, match="Linear has no PEFT adapters"):
        PeftSource(torch.nn.Linear(2, 2))


def test_an_adapter_that_is_taken_away():
    model = adapted("first")
    model.add_adapter("second", lora())
    source = PeftSource(model, "second")
    model.delete_adapter("second")
    with pytest.raises(SourceError, match="there is no adapter 'second'"):
        source.metadata()


def test_a_model_of_transformers_with_an_adapter_of_its_own():
    model = base_model()
    model.add_adapter(lora(use_rslora=True), "policy")
    source = find(trained(model), timeout=SOON)
    assert type(source) is PeftSource
    same(reads(source), {PREFIX + name: tensor for name, tensor in saved_state(model, "policy").items()})
    assert source.lora["use_rslora"] is True
    # Names, and what is in them, are those of the same adapter in PEFT's own model.
    assert [spec.name for spec in source.metadata()] == [spec.name for spec in PeftSource(adapted()).metadata()]


def test_a_model_that_was_adapted_in_place():
    model = trained(peft.inject_adapter_in_model(lora(), base_model(), "policy"))
    with pytest.raises(SourceError, match=r"0 adapters are active: none\. Name one: .* There are: 'policy'"):
        find(model, timeout=SOON)
    same(
        reads(PeftSource(model, "policy")),
        {PREFIX + name: tensor for name, tensor in saved_state(model, "policy").items()},
    )


def test_without_its_adapter_it_is_a_whole_model_again():
    model = adapted().unload()
    model.peft_config = {"default": lora()}
    source = find(model, timeout=SOON)
    assert type(source) is ModuleSource
    assert source.lora is None


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:peft.utils.warning.PeftWarning")
@pytest.mark.parametrize(
    ("config", "error", "what"),
    [
        ({"use_dora": True}, UnsupportedError, "DoRA"),
        ({"lora_bias": True}, UnsupportedError, "biases"),
        ({"bias": "all"}, UnsupportedError, "biases"),
        ({"modules_to_save": ["lm_head"]}, UnsupportedError, "whole modules"),
        ({"trainable_token_indices": [1, 2]}, UnsupportedError, "trained tokens"),
        ({"init_lora_weights": "pissa"}, UnsupportedError, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "olora"}, UnsupportedError, "init_lora_weights is 'olora'"),
        ({"alora_invocation_tokens": [1]}, UnsupportedError, "activated LoRA"),
    ],
)
def test_what_is_more_than_lora_is_refused_at_once(config, error, what):
    model = adapted(**config)
    with pytest.raises(error, match=what):
        find(model, timeout=SOON)
    if not config.keys() & {"bias", "init_lora_weights", "alora_invocation_tokens"}:
        # Even if the config did not say so.
        setattr(model.peft_config["default"], next(iter(config)), None)
        with pytest.raises((UnsupportedError, UnknownTensor)):
            find(model, timeout=SOON)


def test_other_methods_than_lora_are_refused():
    model = peft.get_peft_model(base_model(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ManifestError, match="not the config of a LoRA adapter"):
        find(model, timeout=SOON)


def test_a_model_without_data():
    with pytest.raises(SourceError, match=r"lora_A.weight' is on the meta device"):
        find(adapted().to("meta"), timeout=SOON)


# -- a mapping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["saved", "live", "unwrapped", "unwrapped and live"])
def test_a_mapping_under_any_names_that_peft_gives(names):
    model = adapted("policy", target_modules=["q_proj", "embed_tokens"])
    saved = saved_state(model, "policy")
    tensors = saved
    if "live" in names:
        tensors = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
    if "unwrapped" in names:
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    source = AdapterSource(tensors, model.peft_config["policy"])
    same(reads(source), saved)
    assert source.lora == plain_config(model.peft_config["policy"])
    assert source.aliases == {}
    assert find(source, timeout=SOON) is source


def test_a_mapping_keeps_tensors_that_are_one():
    a, b = torch.ones(4, 6), torch.ones(6, 4)
    tensors = {f"{PREFIX}{m}.lora_{s}.weight": t for m in ("up", "down") for s, t in (("A", a), ("B", b))}
    assert reads(AdapterSource(tensors, {"r": 4, "lora_alpha": 8})).keys() == tensors.keys()


def test_a_mapping_of_what_is_no_adapter():
    model = adapted("policy")
    config, saved = model.peft_config["policy"], saved_state(model, "policy")
    last = list(saved)[-1]
    with pytest.raises(MissingTensor, match=last):
        AdapterSource({name: tensor for name, tensor in saved.items() if name != last}, config)
    with pytest.raises(ShapeMismatch, match="has rank 4, and the config says 2"):
        AdapterSource(saved, {"r": 2, "lora_alpha": 4})
    with pytest.raises(UnknownTensor, match=r"'lm_head.weight' is no tensor of a LoRA adapter"):
        AdapterSource(saved | {"lm_head.weight": torch.zeros(1)}, config)
    with pytest.raises(UnknownTensor, match=r"'base_model.model.model.embed_tokens.weight' is no tensor"):
        AdapterSource(model.state_dict(), config)
    with pytest.raises(ManifestError, match="has no tensors"):
        AdapterSource({}, config)
    with pytest.raises(SourceError, match="expected names and tensors"):
        AdapterSource(saved | {"more": None}, config)
    with pytest.raises(SourceError, match=f"two tensors would be '{last}'"):
        AdapterSource(saved | {last.removeprefix(PREFIX): saved[last]}, config)


def test_a_mapping_of_two_adapters():
    model = adapted("first")
    model.add_adapter("second", lora(target_modules=["v_proj"]))
    tensors = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
    with pytest.raises(SourceError, match=r"of 2 adapters: 'first', 'second'\. Pass those of one"):
        AdapterSource(tensors, lora())


# -- on disk -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("adapter", ["default", "policy"])
def test_a_saved_folder_is_what_the_module_was(tmp_path, adapter):
    model = adapted(adapter, target_modules=["q_proj", "embed_tokens"], rank_pattern={"q_proj": 2})
    live = PeftSource(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    folder = tmp_path if adapter == "default" else tmp_path / adapter
    for path in (folder, str(folder), folder / "adapter_model.safetensors"):
        source = find(path, timeout=SOON)
        assert type(source) is AdapterFolderSource
        assert sorted(source.metadata(), key=str) == sorted(live.metadata(), key=str)
        same(reads(source), reads(live))
        assert source.lora["rank_pattern"] == {"q_proj": 2}
        assert sorted(source.lora["target_modules"]) == live.lora["target_modules"]


def test_a_folder_that_transformers_saved(tmp_path):
    model = base_model()
    model.add_adapter(lora())
    trained(model).save_pretrained(tmp_path)
    same(reads(find(tmp_path, timeout=SOON)), reads(find(model, timeout=SOON)))


def test_a_file_with_its_config_inside(folder, tmp_path):
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    file = tmp_path / "policy.safetensors"
    # Beside it lies that of another.
    (tmp_path / "adapter_config.json").write_text('{"r": 64}')
    save_file(tensors, file, metadata={"adapter_config": json.dumps(config)})
    source = find(file, timeout=SOON)
    assert type(source) is AdapterFolderSource
    same(reads(source), tensors)
    assert source.lora == config

    save_file(tensors, file, metadata={"adapter_config": "{"})
    with pytest.raises(SourceError, match=r"the metadata of .*policy.safetensors: .* no JSON object"):
        find(file, timeout=SOON)


def test_a_folder_is_looked_up_anew(folder):
    source = find(folder, timeout=SOON)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    source.metadata()
    assert source.lora["lora_alpha"] == 99
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 2}))
    with pytest.raises(ShapeMismatch, match="the config says 2"):
        source.metadata()


def test_a_pickled_adapter_is_not_read(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(SourceError, match=r"It has adapter_model.bin, but pickle is never read"):
        find(folder, timeout=SOON)


def test_a_folder_without_tensors(folder):
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"has no adapter_model.safetensors\. Pass the folder that PEFT's"):
        find(folder, timeout=SOON)


def test_a_folder_of_several_adapters(tmp_path):
    adapted("policy").save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=r"It has the adapters policy: pass the path of one"):
        find(tmp_path, timeout=SOON)


def test_a_file_without_a_config(folder):
    (folder / "adapter_config.json").unlink()
    for path in (folder, folder / "adapter_model.safetensors"):
        with pytest.raises(SourceError, match=r"has no adapter_config in its metadata, and .*json cannot be read"):
            find(path, timeout=SOON)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": NaN}'])
def test_a_config_that_is_none(folder, text):
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(SourceError, match=r"adapter_config.json: the adapter's config is no JSON object"):
        find(folder, timeout=SOON)


def test_an_adapter_among_a_model_must_be_said(folder):
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(SourceError, match=r"has both adapter_config.json and model.safetensors\. Pass the path"):
        find(folder, timeout=SOON)
    assert type(find(folder / "model.safetensors", timeout=SOON)) is CheckpointSource
    assert type(find(folder / "adapter_model.safetensors", timeout=SOON)) is AdapterFolderSource


def test_a_model_that_holds_adapters_further_down_is_a_model(folder):
    save_file({"w": torch.zeros(1)}, folder.parent / "model.safetensors")
    source = find(folder.parent, timeout=SOON)
    assert type(source) is CheckpointSource
    assert source.lora is None


def test_embeddings_saved_along_are_told_how_to_leave_out(tmp_path):
    adapted(target_modules=["embed_tokens"]).save_pretrained(tmp_path)
    with pytest.raises(UnknownTensor, match=r"base_layer.weight' .* save_embedding_layers=False"):
        find(tmp_path, timeout=SOON)


def test_no_such_folder(folder):
    shutil.rmtree(folder)
    for make in (AdapterFolderSource, lambda path: find(path, timeout=SOON)):
        with pytest.raises(SourceError, match=r"there is no .*adapter\."):
            make(folder)


def test_whole_models_have_no_config():
    assert LocalSource.lora is CheckpointSource.lora is TensorSource({}).lora is None


# -- on several ranks --------------------------------------------------------------------------------------------------


def wrapped(_, size):
    assert size == 1
    model = adapted("policy")
    saved = saved_state(model, "policy")
    ddp = torch.nn.parallel.DistributedDataParallel
    for module in (
        torch.compile(model, backend="eager"),
        ddp(model),
        ddp(torch.compile(model, backend="eager")),
        torch.compile(ddp(model), backend="eager"),
    ):
        source = find(module, timeout=SOON)
        assert type(source) is PeftSource
        same(reads(source), saved)
    model.base_model.model.model.layers[0] = torch.compile(model.base_model.model.model.layers[0], backend="eager")
    same(reads(find(model, timeout=SOON)), saved)


def test_what_wraps_a_module_is_no_matter(peft_lab):
    peft_lab(wrapped, 1, seconds=120.0)


def sharded_model(adapter="policy", **config):
    from torch.distributed.fsdp import fully_shard

    model = adapted(adapter, **config)
    full = {name: tensor.clone() for name, tensor in saved_state(model, adapter).items()}
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model, full


def reads_together(source, full):
    """On rank 0 every tensor is the full one; on all, the scans add up to its scan."""
    specs = source.metadata()
    assert {spec.name: spec.shape for spec in specs} == {name: tuple(tensor.shape) for name, tensor in full.items()}
    for number, spec in enumerate(specs):
        out = torch.zeros(spec.numel, device="cpu" if source.ranks.rank == 0 else "meta")
        read = source.read(number, 0, out)
        assert source.ranks.total([read]) == [scan(full[spec.name])]
        if source.ranks.rank == 0:
            assert torch.equal(out.reshape(spec.shape), full[spec.name])
    source.release()


@contextlib.contextmanager
def nothing_gathered():
    from torch.distributed.tensor import DTensor

    def gather(*_, **__):
        raise AssertionError("a tensor was gathered")

    with contextlib.ExitStack() as stack:
        for owner, name in ((DTensor, "full_tensor"), (DTensor, "redistribute"), (dist, "all_gather_into_tensor")):
            stack.enter_context(mock.patch.object(owner, name, gather))
        yield


def fsdp(*_):
    from torch.distributed.tensor import DTensor

    model, full = sharded_model(target_modules=["q_proj", "down_proj", "embed_tokens"], rank_pattern={"q_proj": 3})
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    with nothing_gathered():
        source = find(model, timeout=SOON)
        assert type(source).__name__ == "FsdpPeftSource"
        assert source.lora == plain_config(model.peft_config["policy"])
        reads_together(source, full)

    # A step later the same source has the new weights.
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    tokens = torch.tensor([[1, 2, 3, 4]])
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    state = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
    after = {name.replace(".policy", ""): tensor.full_tensor() for name, tensor in state.items()}
    assert not any(torch.equal(after[name], full[name]) for name in full)
    with nothing_gathered():
        reads_together(source, after)
    source.ranks.close()


def refused(rank, _):
    from weightwire.sources.fsdp import FsdpPeftSource

    model, full = sharded_model()
    with pytest.raises(SourceError, match=r"rank 0: there is no adapter 'other'\. There are: 'policy'"):
        FsdpPeftSource(model, "other", timeout=SOON)
    with pytest.raises(SourceError, match="rank 0: Linear has no PEFT adapters"):
        FsdpPeftSource(torch.nn.Linear(2, 2), timeout=SOON)
    # Of one rank alone.
    if rank == 1:
        model.peft_config["policy"].use_dora = True
    with pytest.raises(UnsupportedError, match="rank 1: no engine can be given DoRA exactly"):
        find(model, timeout=SOON)
    model.peft_config["policy"].use_dora = False
    source = find(model, timeout=SOON)
    reads_together(source, full)
    source.ranks.close()


def test_fsdp2_on_two_ranks_reads_as_the_full_adapter_and_never_gathers(peft_lab):
    peft_lab(fsdp, 2, seconds=120.0)


def test_what_cannot_be_read_is_refused_on_all_ranks(peft_lab):
    peft_lab(refused, 2, seconds=120.0)


def deltas(rank, _):
    model, full = sharded_model()
    engine, twin = (ww.TransformersEngine(base_model(), name=name) for name in ("here", "twin"))
    said = []
    with ww.Publisher(model, engine if rank == 0 else None, baseline="host", deadline=120.0) as publisher:
        for version in range(1, 4):
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.detach().to_local().view(-1)[version::40] += 1
            receipt = publisher.publish(version)
            said.append(receipt.why)
            state = {name: tensor.full_tensor() for name, tensor in model.state_dict().items() if ".lora_" in name}
            if rank == 0:
                whole = ww.Engines([twin]).adapters.load("policy", state, model.peft_config["policy"])
                assert receipt.engines["here"].held == whole.engines["twin"].held
                assert receipt.engines["here"].digests == whole.engines["twin"].digests
        assert [why[:6] for why in said] == ["whole:", "delta:", "delta:"]
        assert receipt.nbytes < sum(tensor.nbytes for tensor in full.values())
        # What is spread is not cast by the trainer.
        publisher._means.choices.clear()
        with mock.patch.object(ModuleTarget, "adapter_dtype", "bfloat16"):
            why = publisher.publish(4).why
    assert why == "whole: here holds adapters in bfloat16, and this is sent as float32"


def test_of_an_adapter_that_is_spread_over_ranks_each_encodes_what_it_holds(peft_lab):
    peft_lab(deltas, 2, seconds=240.0)
