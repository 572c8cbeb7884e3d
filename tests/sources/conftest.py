import importlib.util
from pathlib import Path

import pytest

# What trainers are made of, and what DeepSpeed imports at its first use only, which would be in each rank.
TRAINERS = (
    "accelerate",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "peft",
    "transformers.models.qwen3.modeling_qwen3",
    "weightwire.sources.deepspeed",
)


@pytest.fixture(scope="session")
def new_lab():
    spec = importlib.util.spec_from_file_location("weightwire_lab", Path(__file__).with_name("lab.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def labs(*modules):
        lab = module.Lab(*modules)
        yield lab
        lab.close()

    return labs


@pytest.fixture(scope="session")
def lab(new_lab):
    yield from new_lab()


@pytest.fixture(scope="session")
def trainer_lab(new_lab):
    yield from new_lab(*TRAINERS)


@pytest.fixture(scope="session")
def peft_lab(new_lab):
    yield from new_lab("peft")
