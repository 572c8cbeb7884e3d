"""What a real accelerate prepares is the source that it would be without accelerate, under the same names.

FSDP2 is not among these: accelerate shards on accelerators only, in place, by the same `fully_shard` as test_fsdp.py.
"""

import pytest
import torch

from support.ranks import Model, default_group_works, reads_like
from weightwire.errors import UnsupportedError
from weightwire.sources import find
from weightwire.sources.base import spec_of

pytestmark = pytest.mark.slow

SOON = 20.0
TOKENS = torch.tensor([[1, 2, 3]])


def model_and_optimizer():
    torch.manual_seed(0)
    model = Model()
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def whole(source):
    """Every tensor of a source that is whole in this process, and its aliases."""
    read = {}
    for number, spec in enumerate(source.metadata()):
        read[spec.name] = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
        source.read(number, 0, read[spec.name].view(-1))
    return read | {alias: read[name] for alias, name in source.aliases.items()}


def equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert spec_of(name, found[name]) == spec_of(name, tensor)
        assert torch.equal(found[name], tensor), name


def in_one_process(*_):
    from accelerate import Accelerator
    from accelerate.utils import TorchDynamoPlugin

    model, optimizer = model_and_optimizer()
    full = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accelerator = Accelerator(cpu=True, dynamo_plugin=TorchDynamoPlugin(backend="eager"))
    prepared, optimizer = accelerator.prepare(model, optimizer)
    assert any("_orig_mod" in name for name in prepared._modules)
    source = find(prepared, timeout=SOON)
    assert type(source).__name__ == "ModuleSource"
    equal(whole(source), full)
    accelerator.backward(prepared(TOKENS).sum())
    optimizer.step()
    after = whole(source)
    assert not torch.equal(after["up.weight"], full["up.weight"])
    equal(after, model.state_dict())


def test_a_compiled_model_of_one_process(trainer_lab):
    trainer_lab(in_one_process, 1, seconds=120.0)


def replicated(_, size):
    from accelerate import Accelerator

    model, optimizer = model_and_optimizer()
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    assert type(prepared).__name__ == "DistributedDataParallel"
    source = find(prepared, timeout=SOON)
    # Every rank has everything, so that rank 0 can publish without the others.
    assert type(source).__name__ == "ModuleSource"
    assert source.ranks is None
    for module in (prepared, torch.compile(prepared, backend="eager")):
        equal(whole(find(module, timeout=SOON)), model.state_dict())
    accelerator.backward(prepared(TOKENS + accelerator.process_index).sum())
    optimizer.step()
    equal(whole(source), model.state_dict())
    default_group_works(size)


def test_a_model_that_ddp_replicates_over_two_processes(trainer_lab):
    trainer_lab(replicated, 2, seconds=120.0)


def with_deepspeed(_, size):
    import deepspeed
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import InitProcessGroupKwargs

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    model, optimizer = model_and_optimizer()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )
    prepared, optimizer = accelerator.prepare(model, optimizer)
    source = find(prepared, timeout=SOON)
    assert type(source).__name__ == "DeepSpeedSource"
    for _ in range(2):
        accelerator.backward(prepared(TOKENS).sum())
        optimizer.step()
        with deepspeed.zero.GatheredParameters(list(prepared.parameters())):
            full = {name: tensor.detach().clone() for name, tensor in prepared.module.state_dict().items()}
        reads_like(source, full)
    default_group_works(size)


def test_a_model_that_deepspeed_cuts_over_two_processes(trainer_lab):
    trainer_lab(with_deepspeed, 2, seconds=120.0)


def first_fsdp(_, size):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(Model(), device_id=torch.device("cpu"))
    with pytest.raises(UnsupportedError, match=r"first version of FSDP.*fully_shard.*fsdp_version=2"):
        find(model, timeout=SOON)
    default_group_works(size)


def test_the_first_fsdp_is_refused_before_it_could_wait_for_other_ranks(trainer_lab):
    trainer_lab(first_fsdp, 2, seconds=120.0)
