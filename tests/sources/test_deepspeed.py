"""A real DeepSpeed on the CPU, over gloo, in two processes: ZeRO-1 to 3."""

import copy
import os
import signal
import time

import pytest
import torch

import weightwire as ww
from support.models import same
from support.ranks import Model, bits, default_group_works, reads_frugally, reads_like
from weightwire.errors import SourceError, UnsupportedError
from weightwire.sources import find
from weightwire.updates.adapter import plain_config
from weightwire.updates.digest import scan

pytestmark = pytest.mark.slow

SOON = 20.0
SLOW = 120.0
TOKENS = torch.tensor([[1, 2, 3, 4, 5]])


# -- on every rank -----------------------------------------------------------------------------------------------------


def zero(model, stage, size, *, rate=0.01, **settings):
    """What `deepspeed.initialize` makes of a model, on gloo."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": size,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 10},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **settings,
    }
    optimizer = torch.optim.AdamW(trained, lr=rate)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def full_state(engine):
    """A copy of the whole state, gathered by DeepSpeed itself."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: tensor.detach().clone() for name, tensor in engine.module.state_dict().items()}


def language_model(dtype=torch.float32, *, tied=True):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 33, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "head_dim": 10}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=tied)).to(dtype)


def step(engine):
    engine.backward(engine(input_ids=TOKENS, labels=TOKENS).loss)
    engine.step()


# -- reading -----------------------------------------------------------------------------------------------------------


def reads(_, size, stage):
    torch.manual_seed(0)
    engine = zero(Model(), stage, size)
    source = find(engine, timeout=SOON)
    assert type(source).__name__ == "DeepSpeedSource"
    before = full_state(engine)
    reads_like(source, before)
    assert source.aliases == {"head.weight": "embed.weight"}

    # Small parameters, such as the gate's bias, stay gathered from here on.
    engine.backward(engine(torch.tensor([[1, 2, 3]])).sum())
    reads_like(source, before)
    engine.step()
    after = full_state(engine)
    assert not torch.equal(after["up.weight"], before["up.weight"])
    reads_like(source, after)
    source.ranks.close()
    for module in [torch.compile(engine, backend="eager")] + [engine.module] * (stage == 3):
        found = find(module, timeout=SOON)
        reads_like(found, after)
        found.ranks.close()
    default_group_works(size)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_reads_as_the_full_model_before_and_after_a_step(trainer_lab, stage):
    trainer_lab(reads, 2, stage=stage, seconds=120.0)


def test_zero_3_on_more_ranks_than_some_parameters_have_elements(trainer_lab):
    trainer_lab(reads, 3, stage=3, seconds=120.0)


def changed_while_gathered(rank, size):
    import deepspeed

    engine = zero(language_model(), 3, size)
    source = find(engine, timeout=SOON)
    own = dict(engine.module.named_parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    # As a trainer does that merges an adapter for a while: what is written is not in the partitions yet.
    with deepspeed.zero.GatheredParameters(list(own.values()), modifier_rank=0):
        if rank == 0:
            with torch.no_grad():
                own[name].mul_(2)
        specs = source.metadata()
        number = [spec.name for spec in specs].index(name)
        out = torch.empty(own[name].numel())
        read = source.ranks.total([source.read(number, 0, out)])
        if rank == 0:
            assert torch.equal(out.view(own[name].shape), own[name])
            assert read == [scan(own[name].detach())]
    reads_like(source, full_state(engine))


def test_a_parameter_that_was_changed_while_it_is_gathered_is_read_as_it_is_now(trainer_lab):
    trainer_lab(changed_while_gathered, 2, seconds=120.0)


# -- publishing --------------------------------------------------------------------------------------------------------


def publishes(rank, size, stage, dtype):
    dtype = getattr(torch, dtype)
    mixed = {"bf16": {"enabled": True}} if dtype == torch.bfloat16 else {}
    model = language_model()
    served = ww.TransformersEngine(language_model(dtype, tied=stage != 2), name="here")
    engine = zero(model, stage, size, **mixed)
    with ww.Publisher(engine, served if rank == 0 else None, bucket_bytes=4096, deadline=SOON) as publisher:
        seen = []
        for version in (1, 2):
            step(engine)
            receipt = publisher.publish(version)
            full = full_state(engine)
            assert (receipt.version, receipt.kind) == (version, "dense")
            if rank == 0:
                assert same(served.model, full)
                assert full["lm_head.weight"].dtype == dtype
                assert set(receipt.engines["here"].proven.values()) == {"read back"}
            seen.append(full["model.norm.weight"])
        assert not torch.equal(*seen)
        explained = publisher.explain()
        assert explained.source == "DeepSpeedSource"
    default_group_works(size)


def publishes_deltas(rank, size, stage):
    engine = zero(language_model(), stage, size, rate=1e-6, bf16={"enabled": True})
    served = ww.TransformersEngine(language_model(torch.bfloat16), name="here")
    kinds = []
    with ww.Publisher(engine, served if rank == 0 else None, baseline="host", deadline=SLOW) as publisher:
        for version in range(4):
            step(engine)
            kinds.append(publisher.publish(version).kind)
            full = full_state(engine)
            assert rank or same(served.model, full)
    assert kinds[0] == "dense"
    assert kinds[2:] == ["delta", "delta"], kinds
    default_group_works(size)


@pytest.mark.parametrize("stage", [2, 3])
def test_each_rank_of_zero_3_encodes_its_own_partitions(trainer_lab, stage):
    trainer_lab(publishes_deltas, 2, stage=stage, seconds=2 * SLOW)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_serves_what_each_step_made_bit_for_bit(trainer_lab, stage, dtype):
    trainer_lab(publishes, 2, stage=stage, dtype=dtype, seconds=120.0)


def adapts(rank, size, stage):
    import deepspeed
    import peft

    model = peft.get_peft_model(
        language_model(), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False), "mine"
    )
    engine = zero(model, stage, size)
    served = ww.TransformersEngine(language_model(), name="here")
    fresh = language_model()
    with ww.Publisher(engine, served if rank == 0 else None, adapter="policy", deadline=SOON) as publisher:
        assert type(publisher._means.source).__name__ == "DeepSpeedPeftSource"
        for version in (1, 2):
            step(engine)
            receipt = publisher.publish(version)
            assert (receipt.kind, receipt.tensors) == ("adapter", 8)
            assert publisher._means.source.lora == plain_config(model.peft_config["mine"])
            with deepspeed.zero.GatheredParameters(list(model.parameters())), torch.no_grad():
                state = {name: t.clone() for name, t in model.state_dict().items() if ".lora_" in name}
            if rank == 0:
                expected = peft.get_peft_model(language_model(), model.peft_config["mine"], "mine").eval()
                expected.load_state_dict(state, strict=False)
                with torch.no_grad(), served.adapter("policy"):
                    logits = served.model(input_ids=TOKENS).logits
                with torch.no_grad():
                    assert torch.equal(bits(logits), bits(expected(input_ids=TOKENS).logits))
                    assert not torch.equal(logits, fresh(input_ids=TOKENS).logits)
    default_group_works(size)


@pytest.mark.parametrize("stage", [2, 3])
def test_an_adapter_is_published_without_its_base(trainer_lab, stage):
    trainer_lab(adapts, 2, stage=stage, seconds=120.0)


# -- failures ----------------------------------------------------------------------------------------------------------


def refused(rank, size):
    engine = zero(language_model(), 3, size)
    source = find(engine, timeout=SOON)
    odd = engine.module.model.layers[1].mlp.up_proj.weight
    name = "model.layers.1.mlp.up_proj.weight"

    def says(what):
        with pytest.raises(UnsupportedError, match=f"rank 1: .*'{name}'.*{what}"):
            source.metadata()

    # Of one rank alone; the other says the same.
    part, here = odd.ds_tensor, rank == 1
    if here:
        odd.allreduce = False
    says("is an expert's")
    if here:
        del odd.allreduce
        odd.tensor_model_parallel = True
    says("tensor parallelism")
    if here:
        odd.tensor_model_parallel = False
        part.ds_quant_scale = torch.ones(1)
    says("quantised|disk")
    if here:
        del part.ds_quant_scale
        # As DeepSpeed leaves it when it has moved the rest to a disk.
        odd.ds_tensor = part.new_empty(1)
        odd.ds_tensor.ds_numel = part.ds_numel
    says("disk")
    odd.ds_tensor = part
    reads_like(source, full_state(engine))


def test_what_cannot_be_read_exactly_is_refused_by_name_on_all_ranks(trainer_lab):
    trainer_lab(refused, 2, seconds=120.0)


class Broken:
    def __getitem__(self, place):
        raise RuntimeError("the memory of this rank is gone")


def breaks(rank, size):
    engine = zero(language_model(), 3, size)
    served = ww.TransformersEngine(language_model(), name="here")
    source = find(engine, timeout=SOON)
    metadata = source.metadata
    with ww.Publisher(source, served if rank == 0 else None, bucket_bytes=4096, deadline=SOON) as publisher:
        publisher.publish(1)
        before = copy.deepcopy(served.model.state_dict())

        def spoiled():
            specs = metadata()
            if rank == 1:
                source._held[7] = source._held[7]._replace(local=Broken())
            return specs

        source.metadata = spoiled
        step(engine)
        started = time.monotonic()
        with pytest.raises(SourceError, match=r"rank 1: '.*' could not be read: RuntimeError: the memory of this"):
            publisher.publish(2)
        assert time.monotonic() - started < SOON
        if rank == 0:
            assert same(served.model, before)
            assert served.status().version == 1
        source.metadata = metadata
        publisher.publish(2)
        full = full_state(engine)
        assert rank != 0 or same(served.model, full)
    default_group_works(size)


def test_a_rank_that_cannot_read_is_an_error_on_all_and_the_next_publish_is_whole(trainer_lab):
    trainer_lab(breaks, 2, seconds=120.0)


def dies(rank, size):
    engine = zero(language_model(), 3, size)
    served = ww.TransformersEngine(language_model(), name="here")
    source = find(engine, timeout=SOON)
    with ww.Publisher(source, served if rank == 0 else None, bucket_bytes=4096, deadline=SOON) as publisher:
        publisher.publish(1)
        before = copy.deepcopy(served.model.state_dict())
        if rank == 1:
            source.ranks.send = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(SourceError, match="waited in vain"):
            publisher.publish(2)
        assert time.monotonic() - started < SOON
        assert same(served.model, before)
        assert served.status().state == "idle"


def test_a_rank_killed_in_the_middle_of_a_publish_is_an_error_and_the_old_version_serves(trainer_lab):
    trainer_lab(dies, 2, dies={1}, seconds=120.0)


# -- memory ------------------------------------------------------------------------------------------------------------


def frugal(rank, size):
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    module = torch.nn.Module()
    # 200 MB, in parameters of which each is larger than many buckets.
    for number in range(4):
        weight = torch.full((5000, 5000), float(number + 1), dtype=torch.bfloat16)
        module.register_parameter(f"w{number}", torch.nn.Parameter(weight, requires_grad=False))
    deepspeed.zero.Init(
        module=module, config_dict_or_path={"train_batch_size": size, "zero_optimization": {"stage": 3}}
    )
    assert all(parameter.numel() == 0 for parameter in module.parameters())
    source = find(module, timeout=SOON)
    specs = source.metadata()
    assert [spec.shape for spec in specs] == [(5000, 5000)] * 4

    def check(number, out):
        assert bool((out == number + 1).all())

    reads_frugally(source, rank, check)


def test_no_rank_grows_by_more_than_a_few_buckets(trainer_lab):
    trainer_lab(frugal, 2, seconds=120.0)
