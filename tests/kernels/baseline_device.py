"""A trainer's baseline on its GPU: what it encodes leads to what was published, also after other deltas."""

import pytest
import torch
from tests.kernels.device import DEVICE

from weightwire import baseline_device, chain
from weightwire.baseline_device import DeviceBaseline
from weightwire.engines.vllm.spare import uses
from weightwire.errors import NonFinite, UnsupportedError, VerificationError
from weightwire.sources.tensors import TensorSource
from weightwire.updates import delta_cuda
from weightwire.updates.boxes import Box, Part
from weightwire.updates.delta import decode, join, parse
from weightwire.updates.digest import scan


@pytest.fixture(autouse=True)
def anywhere(few_rows, monkeypatch):
    monkeypatch.setattr(baseline_device, "_DEVICES", {DEVICE.type})
    monkeypatch.setattr(baseline_device, "_ELEMENTS", 100)  # several batches
    monkeypatch.setattr(delta_cuda, "CHANGES", 6)


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(1)
    made = {"a": torch.randn(8, 9, generator=generator).bfloat16(), "b": torch.randn(70, generator=generator)}
    return {name: tensor.to(DEVICE) for name, tensor in {**made, "none": torch.zeros(0), "one": torch.ones(())}.items()}


def started(tensors):
    source = TensorSource(tensors)
    baseline = DeviceBaseline(source)
    baseline.start(tuple(source.metadata()))
    baseline.finish(1, [scan(tensor.cpu()) for tensor in tensors.values()])
    assert baseline.version == 1
    return baseline


def unread(*arguments):
    raise AssertionError("it looks at the parameters themselves")


def test_versions_follow_each_other(tensors, monkeypatch):
    monkeypatch.setattr(chain, "_SHARE", 100)  # so small are these
    baseline = started(tensors)
    behind = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
    engine = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
    for version in (2, 3):
        tensors["a"][version, ::3] *= -1.5
        tensors["b"][version::30] += 1
        look = baseline.look(unread)
        assert 0 < look.density < 0.2
        deltas = baseline.encode(unread, look, finite=True)
        baseline.wait()
        if version == 3:  # after one of which little had changed, all is compared at once
            assert look.density == sum(delta.count for delta in deltas) / baseline.numel
        for (name, live), delta in zip(engine.items(), deltas, strict=True):
            decode(name, parse(name, delta.data.cpu()), live).apply(live)
            assert torch.equal(live, tensors[name].cpu())
        baseline.advance(version, deltas)
        assert baseline.version == version
    none = baseline.encode(unread, finite=True)
    assert [delta.count for delta in none] == [0, 0, 0, 0]
    baseline.wait()
    steps, composed = baseline.chain.since(1, none)
    assert steps == 3
    for (name, live), delta in zip(behind.items(), composed, strict=True):
        decode(name, delta, live).apply(live)
        assert torch.equal(live, tensors[name].cpu())
    assert baseline.look(unread).density == 0


def test_tensors_are_compared_where_they_are_now(tensors, monkeypatch):
    """Also those of a trainer that has moved them since; and in the meantime none is held."""
    monkeypatch.setattr(baseline_device, "_ELEMENTS", 1000)  # all together
    baseline = started(tensors)
    held = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
    for version in (2, 3, 4, 5):
        if version != 3:  # then they are where they were
            tensors["a"] = tensors["a"].clone()
            baseline._source = TensorSource(tensors)
        before = uses(tensors["a"])
        tensors["a"][version, ::3] *= -1.5
        deltas = baseline.encode(unread, baseline.look(unread), finite=True)
        baseline.wait()
        for (name, old), delta in zip(held.items(), deltas, strict=True):
            decode(name, parse(name, delta.data.cpu()), old).apply(old)
            assert torch.equal(old, tensors[name].cpu())
        baseline.advance(version, deltas)
        baseline._source.release()
        assert uses(tensors["a"]) == before


def test_an_engine_that_missed_a_delta_is_brought_on_by_one(tensors, monkeypatch):
    monkeypatch.setattr(chain, "_SHARE", 100)  # a delta's own header is more than such tensors
    baseline = started(tensors)
    engine = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
    tensors["a"][2, ::3] *= -1.5
    baseline.advance(2, baseline.encode(unread, finite=True))
    tensors["b"][2::30] += 1
    deltas = baseline.encode(unread, finite=True)
    baseline.wait()
    steps, deltas = baseline.chain.since(1, deltas)
    for (name, live), delta in zip(engine.items(), deltas, strict=True):
        decode(name, parse(name, delta.data.cpu()), live).apply(live)
        assert torch.equal(live, tensors[name].cpu())
    assert steps == 2
    baseline.start(tuple(TensorSource(tensors).metadata()))
    assert baseline.chain.nbytes == 0


def test_what_was_published_last_may_come_from_elsewhere(tensors):
    source = TensorSource(tensors)
    baseline = DeviceBaseline(source)
    base = [torch.zeros_like(tensor).view(-1).cpu() for tensor in tensors.values()]
    baseline.start(tuple(source.metadata()))
    for number, tensor in enumerate(base):
        baseline.write(number, 0, tensor)
    baseline.finish(7, [scan(tensor) for tensor in base])
    assert baseline.version == 7
    assert [delta.count for delta in baseline.encode(unread, finite=True)] == [72, 70, 0, 1]


def test_weights_that_change_meanwhile_are_no_base(tensors):
    source = TensorSource(tensors)
    baseline = DeviceBaseline(source)
    baseline.start(tuple(source.metadata()))
    scans = [scan(tensor.cpu()) for tensor in tensors.values()]
    tensors["a"][0, 0] += 1
    baseline.finish(1, scans)
    assert baseline.version is None


def test_a_harmed_copy_and_nan_are_noticed(tensors):
    baseline = started(tensors)
    tensors["b"][3] = float("nan")
    with pytest.raises(NonFinite, match="NaN or Inf in b"):
        baseline.encode(unread, finite=True)
    assert baseline.encode(unread, finite=False)[1].count == 1
    baseline._tensors[0][5] += 1
    with pytest.raises(VerificationError, match="a: what was published last is no longer what is kept of it"):
        baseline.encode(unread, finite=False)


def test_what_is_not_on_a_gpu_is_refused_by_name(tensors, monkeypatch):
    tensors["a"] = tensors["a"].T
    with pytest.raises(UnsupportedError, match="baseline='device': a is on"):
        DeviceBaseline(TensorSource(tensors))
    monkeypatch.setattr(baseline_device, "_DEVICES", {"cuda"})
    with pytest.raises(UnsupportedError, match="baseline='device': w is on cpu"):
        DeviceBaseline(TensorSource({"w": torch.zeros(3)}))


class Spread:
    """One rank's half of each tensor, of two: the first rows, or the others."""

    def __init__(self, rank, whole, cut=0):
        self.ranks, self._whole, self._cut = rank, whole, cut

    def own(self):
        return {name: tensor[self.part(tensor).slices()] for name, tensor in self._whole.items()}

    def part(self, tensor):
        size = tensor.shape[self._cut]
        start, stop = [0, size // 3, size][self.ranks :][:2]
        first, shape = [0] * tensor.dim(), list(tensor.shape)
        first[self._cut], shape[self._cut] = start, stop - start
        return Cut(tuple(tensor.shape), Box(tuple(first), tuple(shape)))


class Cut(Part):
    def slices(self):
        return tuple(slice(a, a + n) for a, n in zip(*self.box, strict=True))


def test_ranks_encode_their_own_parts_and_nothing_else(tensors):
    whole = {name: tensor for name, tensor in tensors.items() if tensor.dim()} | {"row": torch.ones(1, 5).to(DEVICE)}
    specs = tuple(TensorSource(whole).metadata())
    sources = [Spread(rank, whole) for rank in range(2)]
    parts = [[source.part(whole[spec.name]) for spec in specs] for source in sources]
    baselines = [DeviceBaseline(source) for source in sources]
    for baseline, mine in zip(baselines, parts, strict=True):
        baseline.start(specs, tuple(mine))
        baseline.finish(1, baseline.take_own(unread))
        assert baseline.version == 1
    engine = {name: tensor.cpu().clone() for name, tensor in whole.items()}
    for version in (2, 3):
        whole["a"][version::2, ::3] *= -1.5
        whole["b"][version::30] += 1
        own = [baseline.encode(unread, finite=True) for baseline in baselines]
        for baseline in baselines:
            baseline.wait()
        for n, spec in enumerate(specs):
            delta = join(spec.name, [(mine[n], deltas[n]) for mine, deltas in zip(parts, own, strict=True)])
            decode(spec.name, parse(spec.name, delta.data), engine[spec.name]).apply(engine[spec.name])
            assert torch.equal(engine[spec.name], whole[spec.name].cpu()), spec
        for baseline, deltas in zip(baselines, own, strict=True):
            baseline.advance(version, deltas)
            assert baseline.chain.nbytes == 0  # of parts no steps are kept
    assert baselines[0].refusal(specs, tuple(parts[1])) is not None


def test_what_is_cut_along_an_inner_dimension_is_refused_by_name(tensors):
    whole = {"a": tensors["a"]}
    source = Spread(0, whole, cut=1)
    with pytest.raises(UnsupportedError, match="baseline='device': a is cut along an inner dimension"):
        DeviceBaseline(source).start(tuple(TensorSource(whole).metadata()), (source.part(whole["a"]),))
