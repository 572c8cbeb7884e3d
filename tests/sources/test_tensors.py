import pathlib
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

from weightwire.errors import SourceError, UsageError
from weightwire.sources import find
from weightwire.sources.checkpoint import CheckpointSource
from weightwire.sources.peft import AdapterSource
from weightwire.sources.tensors import ModuleSource, TensorSource, state_of
from weightwire.updates.digest import scan


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(5, 3)
        self.mid = torch.nn.Linear(3, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("scratch", torch.ones(2), persistent=False)


def read(source, number, start, length):
    spec = source.metadata()[number]
    out = torch.empty(length, dtype=getattr(torch, spec.dtype))
    return out, source.read(number, start, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.float8_e5m2])
def test_runs_of_a_tensor(dtype):
    whole = torch.randn(4, 6).to(dtype)
    for tensor in (whole, whole.t(), whole[:, 1:3], whole[1]):
        source = TensorSource({"w": tensor})
        for start, length in ((0, tensor.numel()), (1, 1), (2, tensor.numel() - 3)):
            out, scanned = read(source, 0, start, length)
            wanted = tensor.reshape(-1)[start : start + length]
            assert torch.equal(out.view(torch.uint8), wanted.contiguous().view(torch.uint8))
            assert scanned == scan(wanted.contiguous(), start)


def test_a_module_lists_tied_weights_once_and_is_read_anew():
    model = Tied()
    source = find(model, timeout=1.0)
    assert isinstance(source, ModuleSource)
    assert source.ranks is None
    names = [spec.name for spec in source.metadata()]
    assert names == ["kept", "embed.weight", "mid.weight", "mid.bias"]
    assert source.aliases == {"head.weight": "embed.weight"}

    with torch.no_grad():
        model.mid.bias.fill_(3.0)
    assert read(source, 3, 0, 3)[0].tolist() == [3.0] * 3
    # Replaced, not written to: the next publish sees the new one, and that nothing is tied any more.
    model.mid.bias = torch.nn.Parameter(torch.full((3,), 4.0))
    model.head.weight = torch.nn.Parameter(model.embed.weight.detach().clone())
    assert read(source, 3, 0, 3)[0].tolist() == [4.0] * 3
    assert source.aliases == {}
    assert len(source.metadata()) == 5


def wrapped(_, size):
    assert size == 1
    plain = list(state_of(Tied()))
    assert "head.weight" in plain
    inside = Tied()
    inside.mid = torch.compile(inside.mid, backend="eager")
    for module in (
        torch.compile(Tied(), backend="eager"),
        torch.nn.parallel.DistributedDataParallel(Tied()),
        torch.nn.parallel.DistributedDataParallel(torch.compile(Tied(), backend="eager")),
        torch.compile(torch.nn.parallel.DistributedDataParallel(Tied()), backend="eager"),
        inside,
    ):
        assert list(state_of(module)) == plain


def test_what_wraps_a_module_does_not_change_its_names(lab):
    lab(wrapped, 1)


def test_what_is_said_of_a_tensor_is_what_it_is_now():
    module = torch.nn.Linear(3, 2, bias=False)
    source = ModuleSource(module)
    first = [*source.metadata()]
    assert source.metadata()[0] is first[0]  # not made again
    source.release()
    module.weight.data = torch.zeros(4, 5, dtype=torch.float16)
    (spec,) = source.metadata()
    assert (spec.name, spec.dtype, spec.shape, spec.nbytes) == ("weight", "float16", (4, 5), 40)


@pytest.mark.parametrize("tensors", [{"w": torch.zeros(2), "v": 3}, {1: torch.zeros(2)}, {"w": None}])
def test_only_names_and_tensors(tensors):
    with pytest.raises(SourceError, match="expected names and tensors"):
        find(tensors, timeout=1.0)


class Elsewhere(torch.Tensor):
    """Stands for memory that is elsewhere, as a DTensor does."""

    @staticmethod
    def __new__(cls, *shape):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device="cpu")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(str(func))


@pytest.mark.parametrize("config", [None, {"r": 2, "lora_alpha": 2}])
def test_what_stands_for_memory_that_is_elsewhere_is_refused(config):
    # Their addresses are alike, so that they would be taken for one tensor, and read at that.
    named = {"model.q.lora_A.weight": Elsewhere(2, 4), "model.q.lora_B.weight": Elsewhere(4, 2)}
    with pytest.raises(SourceError, match="Elsewhere that has no memory of its own") as refused:
        TensorSource(named) if config is None else AdapterSource(named, config)
    assert "full_tensor" in refused.value.next_step
    assert TensorSource({"w": torch.zeros(0)}).metadata()[0].shape == (0,)


def test_meta_tensors_have_no_data():
    with pytest.raises(SourceError, match=r"'kept' is on the meta device"):
        find(Tied().to("meta"), timeout=1.0)
    with pytest.raises(SourceError, match="'w' is on the meta device"):
        find({"w": torch.empty(2, device="meta")}, timeout=1.0)


class Own:
    """A source of the user's own."""

    aliases, ranks = {}, None

    def metadata(self):
        return []

    def read(self, tensor, start, out):
        raise NotImplementedError


def test_find_takes_every_kind(tmp_path):
    own = Own()
    assert find(own, timeout=1.0) is own
    for built in (TensorSource({}), ModuleSource(Tied())):
        assert find(built, timeout=1.0) is built
    assert isinstance(find({"w": torch.zeros(1)}, timeout=1.0), TensorSource)
    assert isinstance(find(OrderedDict(w=torch.zeros(1)), timeout=1.0), TensorSource)
    assert isinstance(find(Tied(), timeout=1.0), ModuleSource)
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    for path in (tmp_path, str(tmp_path)):
        assert isinstance(find(path, timeout=1.0), CheckpointSource)


@pytest.mark.parametrize("thing", [None, 3, [torch.zeros(1)], torch.zeros(1), b"path", pathlib, torch.nn.Linear])
def test_find_says_what_it_was_given_and_what_it_takes(thing):
    with pytest.raises(UsageError, match=r"is no source of weights\. Pass a torch\.nn\.Module, a mapping"):
        find(thing, timeout=1.0)
