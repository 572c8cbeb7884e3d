"""Parameters that a model's loader computes: found out, loaded by it while staging, and as exact as all others."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
import torch

from support.staging import Layer
from weightwire.engines.control import refuse_left_over
from weightwire.engines.vllm import computed
from weightwire.engines.vllm.computed import Group, batched
from weightwire.engines.vllm.copy_plan import Plan
from weightwire.engines.vllm.layout import Slot
from weightwire.engines.vllm.places import alone
from weightwire.engines.vllm.rebuilt import HostCopy, Keeping, Rebuilt
from weightwire.engines.vllm.recording import record
from weightwire.engines.vllm.spare import Spare
from weightwire.engines.vllm.target import _Staged
from weightwire.errors import BusyError, MissingTensor, NonFinite, ShapeMismatch, UnknownTensor, UnsupportedError
from weightwire.receiver import Receiver
from weightwire.sources.tensors import TensorSource
from weightwire.target import Staging
from weightwire.updates.boxes import Box
from weightwire.updates.delta import encode
from weightwire.updates.digest import scan
from weightwire.updates.manifest import Manifest

SHAPES = {"plain": (4, 6), "log": (5, 3), "joined": (4, 6), "turned": (6, 4), "heads": (8, 6), "mixed": (4, 2)}
COMPUTED = ["heads.weight", "joined.weight", "log.weight", "mixed.weight", "turned.weight"]


class Model(torch.nn.Module):
    """What loaders of vLLM's models do: one weight is a plain copy, of the others each is something else."""

    def __init__(self, device: str, packs: bool = False) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            setattr(self, name, Layer(shape, device, packs))
        self.plain.weight.weight_loader = self.load_plain

    @staticmethod
    def load_plain(parameter: torch.nn.Parameter, tensor: torch.Tensor) -> None:
        parameter.data.copy_(tensor)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        halves: dict[str, torch.Tensor] = {}
        for name, tensor in weights:
            if name in ("joined.left", "joined.right"):
                halves[name] = tensor
                if len(halves) == 2:
                    whole = torch.cat([halves["joined.left"], halves["joined.right"]], dim=1)
                    self.joined.weight.data.copy_(whole)
            else:
                getattr(self, f"_load_{name.partition('.')[0]}")(name, tensor)

    def _load_plain(self, name: str, tensor: torch.Tensor) -> None:
        self.plain.weight.weight_loader(self.plain.weight, tensor)

    def _load_log(self, name: str, tensor: torch.Tensor) -> None:
        # As vLLM's `composed_weight_loader` does for the A of Mamba.
        self.log.weight.data.copy_(tensor)
        self.log.weight.data.copy_(-torch.exp(self.log.weight.float()))

    def _load_turned(self, name: str, tensor: torch.Tensor) -> None:
        self.turned.weight.data.copy_(tensor.t())

    def _load_heads(self, name: str, tensor: torch.Tensor) -> None:
        self.heads.weight.data.copy_(tensor.view(4, 2, 6).transpose(0, 1).reshape(8, 6))

    def _load_mixed(self, name: str, tensor: torch.Tensor) -> None:
        if name == "mixed.k":
            self.mixed.weight.data[2:].copy_(tensor)
        else:
            self.mixed.weight.data[:2].copy_(2 * tensor)


def weights(seed: int) -> dict[str, torch.Tensor]:
    shapes = {
        "joined.left": (4, 2), "plain.weight": (4, 6), "log.weight": (5, 3), "turned.weight": (4, 6),
        "heads.weight": (8, 6), "joined.right": (4, 4), "mixed.q": (2, 2), "mixed.k": (2, 2),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def manifest_of(sent: Mapping[str, torch.Tensor], **how: Any) -> Manifest:
    return Manifest(version=1, tensors=tuple(TensorSource(dict(sent)).metadata()), **how)


class Rank:
    """One rank on a CPU: a live model, its twin, and what `VllmTarget` keeps for them."""

    def __init__(self, model: type[Model] = Model, packs: bool = False) -> None:
        self.live, self.twin, self.model = model("cpu", packs), model("meta"), model
        self.empty = dict(self.twin.named_parameters())
        self.slots = [Slot(layer, {"weight": f"{name}.weight"}, packs) for name, layer in self.live.named_children()]
        self.spare, self.packer = Spare(), ThreadPoolExecutor(1)

    def begin(self, manifest: Manifest, slots: list[Slot] | None = None) -> _Staged:
        slots = slots or [slot.fresh() for slot in self.slots]
        return _Staged(manifest, record(self.twin, manifest), self.twin, slots, self.packer, self.spare)

    def publish(self, sent: Mapping[str, torch.Tensor], run: int = 5, **how: Any) -> _Staged:
        staged = self.begin(manifest_of(sent, **how))
        fill(staged, sent, run)
        commit(staged, sent)
        staged.discard()
        return staged

    def holds(self, sent: Mapping[str, torch.Tensor]) -> bool:
        """Whether the live model is what one that was loaded with these weights is."""
        fresh = self.model("cpu")
        fresh.load_weights(sent.items())
        return all(
            torch.equal(slot.current("weight", SHAPES[name]), fresh.get_parameter(f"{name}.weight"))
            for name, slot in zip(SHAPES, self.slots, strict=True)
        )

    def is_tidy(self) -> bool:
        """Whether the twin is as it was, without any data."""
        now = dict(self.twin.named_parameters())
        return all(now[name] is parameter and parameter.is_meta for name, parameter in self.empty.items())


def fill(staged: Staging, sent: Mapping[str, torch.Tensor], run: int = 5, *, last_first: bool = False) -> None:
    runs = [(n, k * run, part) for n, t in enumerate(sent.values()) for k, part in enumerate(t.reshape(-1).split(run))]
    for number, start, part in reversed(runs) if last_first else runs:
        # It is only lent.
        data = part.clone()
        staged.write(number, start, data)
        data.fill_(float("nan"))


def stage(staged: Staging, sent: Mapping[str, torch.Tensor], run: int = 5) -> None:
    fill(staged, sent, run)
    staged.seal([scan(tensor) for tensor in sent.values()])


def commit(staged: Staging, sent: Mapping[str, torch.Tensor]) -> None:
    staged.seal([scan(tensor) for tensor in sent.values()])
    assert staged.check(float("inf"))
    staged.commit()
    assert set(staged.proof().values()) <= {"read back", "asked"}


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computed, "_BATCH_BYTES", 0)


@pytest.fixture(params=[False, True], ids=["plain", "packs"])
def rank(request: pytest.FixtureRequest) -> Iterator[Rank]:
    made = Rank(packs=request.param)
    yield made
    made.packer.shutdown()


# -- the plan ----------------------------------------------------------------------------------------------------------


def plan_of(model: type[Model], sent: Mapping[str, torch.Tensor], **how: Any) -> Plan:
    return record(model("meta"), manifest_of(sent, **how))


def test_a_plan_says_what_is_computed_from_what() -> None:
    plan = plan_of(Model, weights(1))
    assert plan.computed == [
        Group(("log.weight",), (2,)),
        Group(("turned.weight",), (3,)),
        Group(("heads.weight",), (4,)),
        Group(("joined.weight",), (0, 5)),
        Group(("mixed.weight",), (6, 7)),
    ]
    assert [[copy.parameter for copy in copies] for copies in plan.copies] == [[], ["plain.weight"], *[[]] * 6]
    assert list(plan.runs) == ["plain.weight"]
    assert plan.takes == [[Box((0,) * tensor.dim(), tuple(tensor.shape))] for tensor in weights(1).values()]


def test_small_groups_are_loaded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, specs = plan_of(Model, weights(1)).computed, manifest_of(weights(1)).tensors
    sizes = [sum(specs[number].nbytes for number in group.tensors) for group in groups]
    monkeypatch.setattr(computed, "_BATCH_BYTES", sizes[0] + sizes[1] + 1)
    joined = batched(groups, specs)
    assert joined[0] == Group(("log.weight", "turned.weight"), (2, 3))
    assert [name for group in joined for name in group.parameters] == [n for g in groups for n in g.parameters]


def test_a_tensor_that_comes_alone_is_asked_about() -> None:
    # As OpenRLHF's trainers send them.
    spec = manifest_of(weights(1)).tensors[2]
    plan = record(Model("meta"), alone(spec))
    assert (plan.takes, plan.covered["log.weight"]) == ([[Box((0, 0), (5, 3))]], 15)


class InPlace(Model):
    def _load_plain(self, name: str, tensor: torch.Tensor) -> None:
        scaled = tensor.double()
        scaled.mul_(2)
        self.plain.weight.data.copy_(scaled)


class Rounded(Model):
    def _load_plain(self, name: str, tensor: torch.Tensor) -> None:
        self.plain.weight.data.copy_(tensor.half())

    def _load_turned(self, name: str, tensor: torch.Tensor) -> None:
        self.turned.weight.data.t().copy_(tensor.bfloat16().float())


class Between(Model):
    """One weight is computed from what was loaded into another."""

    def _load_plain(self, name: str, tensor: torch.Tensor) -> None:
        super()._load_plain(name, tensor)
        self.joined.weight.data.copy_(self.plain.weight + 1)


class AndCopied(Model):
    """A tensor that one weight is computed from is copied into another as it is."""

    def _load_turned(self, name: str, tensor: torch.Tensor) -> None:
        super()._load_turned(name, tensor)
        self.plain.weight.data.copy_(tensor)


class Into(Model):
    def _load_turned(self, name: str, tensor: torch.Tensor) -> None:
        space = torch.empty(4, 6, device=tensor.device)
        torch.mul(tensor, 3, out=space)
        self.turned.weight.data.t().copy_(space)


class InPieces(Model):
    """From a part of a larger tensor, as with tensor parallelism."""

    def _load_turned(self, name: str, tensor: torch.Tensor) -> None:
        self.turned.weight.data.copy_(-tensor.float()[4:8].t())


def without(*names: str, **others: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights(2).items() if name not in names} | others


@pytest.mark.parametrize(
    ("model", "sent"),
    [
        (InPlace, weights(2)),
        (Rounded, weights(2)),
        (Between, without("joined.left", "joined.right")),
        (AndCopied, without("plain.weight")),
        (Into, weights(2)),
        (InPieces, without("turned.weight") | {"turned.weight": torch.randn(12, 6)}),
    ],
)
def test_other_ways_to_compute(model: type[Model], sent: dict[str, torch.Tensor]) -> None:
    rank = Rank(model)
    rank.publish(sent)
    assert rank.holds(sent)
    assert rank.is_tidy()


def test_what_another_parameter_is_computed_from_is_loaded_with_it() -> None:
    plan = plan_of(Between, without("joined.left", "joined.right"))
    assert Group(("joined.weight", "plain.weight"), (0,)) in plan.computed


def test_of_a_tensor_that_is_too_large_no_rank_takes_the_rest() -> None:
    # Also where a loader computes: it is asked what of a tensor it reads.
    manifest = manifest_of(without("turned.weight") | {"turned.weight": torch.randn(12, 6)})
    takes = record(InPieces("meta"), manifest).takes
    assert takes[-1] == [Box((4, 0), (4, 6))]
    others = [[(0,), (4,)], [(8,), (4,)]]
    rest = [[*takes[:-1], [Box((first, 0), (rows, 6))]] for (first,), (rows,) in others]
    refuse_left_over(manifest, [takes, *rest])
    with pytest.raises(ShapeMismatch, match=r"turned.weight has 72 elements, of which the model takes 48"):
        refuse_left_over(manifest, [takes, rest[0]])


class Halves(Model):
    """A rank's half of what is computed from all of a tensor, and of two."""

    number = 0

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        weights = dict(weights)
        if "joined.left" in weights:
            whole = torch.cat([weights.pop("joined.left"), weights.pop("joined.right")], dim=1)
            self.joined.weight.data.copy_(whole.narrow(0, 4 * self.number, 4))
        super().load_weights(weights.items())

    def _load_heads(self, name: str, tensor: torch.Tensor) -> None:
        turned = torch.cat([tensor.view(-1, 2, 6)[:, 1], tensor.view(-1, 2, 6)[:, 0]]).neg_()
        self.heads.weight.data.copy_(turned.narrow(0, 8 * self.number, 8))


class OtherHalves(Halves):
    number = 1


@pytest.mark.parametrize("name", ["heads.weight", "joined.left", "joined.right"])
def test_nor_of_one_that_is_sliced_after_it_was_computed(name: str) -> None:
    rows = {"heads.weight": (16, 6), "joined.left": (8, 2), "joined.right": (8, 4)}
    manifest = manifest_of(weights(1) | {each: torch.randn(shape) for each, shape in rows.items()})
    takes = [record(model("meta"), manifest).takes for model in (Halves, OtherHalves)]
    refuse_left_over(manifest, takes)
    number = [spec.name for spec in manifest.tensors].index(name)
    others = [boxes if n == number else [Box((0,), (1000,))] for n, boxes in enumerate(takes[0])]
    with pytest.raises(ShapeMismatch, match=name):
        refuse_left_over(manifest, [others])


class Looks(Model):
    def _load_log(self, name: str, tensor: torch.Tensor) -> None:
        self.log.weight.data.copy_(tensor / tensor.abs().max().item())


class Indexed(Model):
    def _load_log(self, name: str, tensor: torch.Tensor) -> None:
        self.log.weight.data[torch.arange(5, device=tensor.device)] = tensor


class FromNothing(Model):
    def _load_log(self, name: str, tensor: torch.Tensor) -> None:
        self.log.weight.data.copy_(torch.ones(5, 3, device=tensor.device))


class Ordered(Model):
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        weights = dict(weights)
        assert "plain.weight" in weights
        super().load_weights(weights.items())


class Counting(Model):
    """It computes something only when it is given everything."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.weights = dict(weights)
        super().load_weights(self.weights.items())

    def _load_log(self, name: str, tensor: torch.Tensor) -> None:
        self.log.weight.data.copy_(tensor * 2 if len(self.weights) > 2 else tensor)


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (Looks, "the loader of log.weight looks at its elements"),
        (Indexed, r"the loader of log.weight does more than can be followed \(aten.index_put_"),
        (FromNothing, "the loader of log.weight does more than can be followed"),
        (Ordered, "log.weight cannot be loaded without the rest"),
        (Counting, "log.weight is loaded otherwise with the rest than without it"),
    ],
)
def test_what_is_refused_by_name(model: type[Model], error: str) -> None:
    with pytest.raises(UnsupportedError, match=error):
        plan_of(model, weights(1))


def test_what_was_not_sent_and_what_is_not_known() -> None:
    with pytest.raises(MissingTensor, match=r"nothing was sent for mixed.weight"):
        plan_of(Model, without("mixed.k"))
    with pytest.raises(UnknownTensor, match=r"no place for joined.left"):
        plan_of(Model, without("joined.right"))


# -- the staged copy ---------------------------------------------------------------------------------------------------


def test_an_updated_model_is_one_that_was_loaded(rank: Rank) -> None:
    for seed, run in ((1, 3), (2, 1000), (3, 7)):
        staged = rank.publish(weights(seed), run)
        assert sorted(staged.computed) == COMPUTED
        assert rank.holds(weights(seed))
        assert rank.is_tidy()


def test_in_whatever_order_it_arrives(rank: Rank) -> None:
    staged, sent = rank.begin(manifest_of(weights(4))), weights(4)
    fill(staged, sent, last_first=True)
    commit(staged, sent)
    assert rank.holds(sent)


def test_what_is_cast_on_its_way_is_cast_by_the_loader(rank: Rank) -> None:
    sent = {name: tensor.to(torch.bfloat16) for name, tensor in weights(4).items()}
    rank.publish(sent)
    assert rank.holds(sent)


def test_all_that_is_kept_is_counted() -> None:
    rank, sent = Rank(), weights(1)
    parameters = sum(parameter.nbytes for parameter in rank.live.parameters())
    kept = sum(tensor.nbytes for name, tensor in sent.items() if name != "plain.weight")
    assert rank.begin(manifest_of(sent)).nbytes == parameters + kept


def test_memory_that_was_staged_in_is_used_again() -> None:
    rank = Rank()
    total = sum(parameter.nbytes for parameter in rank.live.parameters())
    for seed in (1, 2, 3):
        rank.publish(weights(seed))
        assert rank.spare.nbytes == total
    staged = rank.begin(manifest_of(weights(4)))
    fill(staged, dict(list(weights(4).items())[:3]))
    staged.discard()  # between the two halves of what is joined
    assert not staged._ingredients._tensors
    assert rank.spare.nbytes == total
    assert rank.holds(weights(3))


class Fails(Model):
    def _load_heads(self, name: str, tensor: torch.Tensor) -> None:
        if not tensor.is_meta:
            raise ValueError("not these heads")
        super()._load_heads(name, tensor)


def test_a_loader_that_fails_is_named_and_nothing_has_changed() -> None:
    rank = Rank(Fails)
    before = {name: tensor.detach().clone() for name, tensor in rank.live.named_parameters()}
    staged = rank.begin(manifest_of(weights(1)))
    with pytest.raises(UnsupportedError, match=r"loader failed to make heads.weight: ValueError\('not these heads'\)"):
        fill(staged, weights(1))
    staged.discard()
    assert rank.is_tidy()
    assert all(torch.equal(tensor, before[name]) for name, tensor in rank.live.named_parameters())


class Full(Model):
    def _load_heads(self, name: str, tensor: torch.Tensor) -> None:
        if not tensor.is_meta:
            raise torch.OutOfMemoryError
        super()._load_heads(name, tensor)


def test_a_loader_that_runs_out_of_memory_is_not_one_that_fails() -> None:
    rank = Rank(Full)
    with pytest.raises(torch.OutOfMemoryError):  # of which the receiver makes a RoomError
        fill(rank.begin(manifest_of(weights(1))), weights(1))
    assert rank.is_tidy()


def test_what_becomes_infinite_in_the_loader_is_refused(rank: Rank) -> None:
    sent = weights(1) | {"log.weight": torch.full((5, 3), 100.0)}
    staged = rank.begin(manifest_of(sent))
    with pytest.raises(NonFinite, match=r"log.weight is not finite"):
        stage(staged, sent)
    staged.discard()
    if not rank.slots[0].packs:
        rank.publish(sent, finite=False)
        assert rank.holds(sent)


class Slow(Model):
    entered, go_on = threading.Event(), threading.Event()

    def _load_log(self, name: str, tensor: torch.Tensor) -> None:
        if not tensor.is_meta:
            self.entered.set()
            assert self.go_on.wait(30)
        super()._load_log(name, tensor)


def test_an_update_may_begin_while_the_loader_runs_for_one_that_was_aborted() -> None:
    rank, sent = Rank(Slow), weights(1)
    staged = rank.begin(manifest_of(sent))
    with ThreadPoolExecutor(2) as pool:
        filling = pool.submit(fill, staged, sent)
        assert Slow.entered.wait(30)
        with pytest.raises(BusyError, match="still running"):
            rank.begin(manifest_of(sent))
        other = _Staged(
            manifest_of(sent), staged._plan, rank.twin, [slot.fresh() for slot in rank.slots], rank.packer, rank.spare
        )
        assert all(parameter.is_meta for parameter in other._twin.values())
        Slow.go_on.set()
        filling.result()
        other = rank.begin(manifest_of(sent))
    staged.discard()
    fill(other, sent)
    commit(other, sent)
    assert rank.holds(sent)


class Captured(Model):
    """A loader that has taken its parameter along, and writes to that whatever stands in its place."""

    def __init__(self, device: str, packs: bool = False) -> None:
        super().__init__(device, packs)
        own = self.turned.weight
        self.write = lambda tensor: own.data.copy_(tensor.t() * 1)

    def _load_turned(self, name: str, tensor: torch.Tensor) -> None:
        self.write(tensor)


class Gap(Model):
    """As many elements as the parameter has, some of them twice."""

    def _load_turned(self, name: str, tensor: torch.Tensor) -> None:
        turned = tensor.t() * 1
        half = len(turned) // 2 + 1
        self.turned.weight.data[:half].copy_(turned[:half])
        self.turned.weight.data[1 : 1 + len(turned) - half].copy_(turned[half:])


@pytest.mark.parametrize("model", [Captured, Gap])
def test_a_loader_that_does_not_fill_what_stands_in_its_parameters_place_is_refused(model: type[Model]) -> None:
    rank = Rank(model)
    rank.spare.keep(torch.full(SHAPES["turned"], 7.0))
    with pytest.raises((UnsupportedError, MissingTensor), match="turned"):
        rank.publish(weights(2))


class Attributed(Model):
    def _load_log(self, name: str, tensor: torch.Tensor) -> None:
        assert self.log.weight.own == "kept"
        assert type(self.log.weight) is Own
        super()._load_log(name, tensor)

    def __init__(self, device: str, packs: bool = False) -> None:
        super().__init__(device, packs)
        parameter = self.log.weight
        parameter.__class__ = Own
        parameter.own = "kept"


class Own(torch.nn.Parameter):
    """As vLLM's parameters, which know how they are loaded."""


def test_a_loader_finds_the_parameters_that_it_knows() -> None:
    rank = Rank(Attributed)
    rank.publish(weights(5))
    assert rank.holds(weights(5))


class Tied(Model):
    """Two modules share a weight that is computed, and a third is loaded under a further name."""

    def __init__(self, device: str, packs: bool = False) -> None:
        super().__init__(device, packs)
        self.heads.weight = self.joined.weight = self.log.weight

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            if name == "further":
                self.turned.weight.data.copy_(tensor[:, :1].expand(-1, 4)[:1].repeat(6, 1) * 2)
            else:
                getattr(self, f"_load_{name.partition('.')[0]}")(name, tensor)

    def _load_log(self, name: str, tensor: torch.Tensor) -> None:
        self.joined.weight.data.copy_(tensor * 3)
        self.heads.weight.data.add_(1)


def test_shared_parameters_and_further_names() -> None:
    sent = {name: weights(6)[name] for name in ("plain.weight", "log.weight", "mixed.q", "mixed.k")}
    rank = Rank(Tied)
    for slot in rank.slots:
        if slot.module in (rank.live.heads, rank.live.joined):
            slot.parameters = {"weight": "log.weight"}
    rank.publish(sent, aliases={"further": "log.weight"})
    fresh = Tied("cpu")
    fresh.load_weights([*sent.items(), ("further", sent["log.weight"])])
    assert all(torch.equal(tensor, rank.live.get_parameter(name)) for name, tensor in fresh.named_parameters())
    assert rank.live.heads.weight is rank.live.log.weight
    assert rank.is_tidy()


def test_a_part_of_a_model_with_all_that_a_parameter_is_computed_from(rank: Rank) -> None:
    old, new = weights(1), weights(2)
    rank.publish(old)
    part = {name: new[name] for name in ("log.weight", "joined.right", "joined.left")}
    staged = rank.publish(part, partial=True)
    assert sorted(staged.computed) == ["joined.weight", "log.weight"]
    assert rank.holds(old | part)


class Twice(Model):
    def _load_mixed(self, name: str, tensor: torch.Tensor) -> None:
        half = self.mixed.weight.data[:2] if name == "mixed.q" else self.mixed.weight.data[2:]
        half.copy_(tensor)
        half.copy_(-half.exp())


def test_what_is_written_twice_is_not_more_than_it_is() -> None:
    with pytest.raises(UnsupportedError, match=r"mixed.weight is computed from more than was sent"):
        plan_of(Twice, {"mixed.q": weights(2)["mixed.q"]}, partial=True)


def test_a_part_of_what_a_parameter_is_computed_from() -> None:
    new = weights(2)
    with pytest.raises(UnsupportedError, match=r"mixed.weight is computed from more than was sent, which is mixed.q"):
        plan_of(Model, {"mixed.q": new["mixed.q"]}, partial=True)
    with pytest.raises(UnknownTensor, match=r"no place for joined.left.*What is loaded together is sent together"):
        plan_of(Model, {"joined.left": new["joined.left"]}, partial=True)
    # Of its slices alone it is known where they go.
    assert plan_of(Model, {"mixed.k": new["mixed.k"]}, partial=True).computed == []


def test_a_delta_goes_through_the_loader_too_and_is_undone(rank: Rank) -> None:
    old, new = weights(1), weights(1)
    for tensor in new.values():
        tensor.view(-1)[3] += 1
    manifest = manifest_of(old, keep=True)
    host = HostCopy(manifest.tensors)
    kept = Keeping(rank.begin(manifest), host)
    fill(kept, old)
    commit(kept, old)
    assert sorted(kept.computed) == COMPUTED
    kept.discard()
    deltas = [encode(name, old[name], new[name]).data for name in old]
    encoded = tuple(data.numel() for data in deltas)
    of = msgspec.structs.replace(manifest, version=2, kind="delta", base_version=1, encoded=encoded)
    slots = [slot.fresh() for slot in rank.slots]
    delta = Rebuilt(of, rank.begin(manifest, slots), slots, host)
    for number, data in enumerate(deltas):
        delta.write(number, 0, data)
    commit(delta, dict(enumerate(deltas)))
    assert rank.holds(new)
    assert sorted(delta.computed) == COMPUTED
    delta.undo()
    delta.discard()
    assert rank.holds(old)


class Target:
    """`target.Target` of a rank."""

    adapter_dtype = None

    def __init__(self, rank: Rank) -> None:
        self.prepare = rank.begin

    def room(self) -> int:
        return 1 << 30


def test_a_receiver_says_what_was_computed() -> None:
    rank, sent = Rank(), weights(7)

    def fetch(address: str, arrivals: Any) -> Iterator[tuple[int, torch.Tensor]]:
        for bucket in arrivals.buckets:
            data = torch.zeros(bucket.nbytes, dtype=torch.uint8)
            for piece in bucket.pieces:
                run = list(sent.values())[piece.tensor].reshape(-1)[piece.start : piece.start + piece.count]
                data[piece.offset : piece.offset + run.nbytes] = run.contiguous().view(torch.uint8)
            yield bucket.index, data

    receiver = Receiver(Target(rank), fetch, background=False)  # type: ignore[arg-type]
    receiver.begin("u", manifest_of(sent), "test", 60.0, "shm:u")
    receiver.seal("u", [scan(tensor).digest.hex() for tensor in sent.values()])
    receiver.poll("u", linger=1.0)
    receiver.commit("u")
    proof: Any = receiver.proof("u")
    assert sorted(proof["computed"]) == COMPUTED
    assert set(proof["proven"]) == {f"{name}.weight" for name in SHAPES}
    assert rank.holds(sent)


def test_what_is_taken_whole_is_not_said_by_boxes() -> None:
    manifest = manifest_of(weights(1))
    assert plan_of(Model, weights(1)).takes_of(manifest.tensors) is None
    larger = without("turned.weight") | {"turned.weight": torch.randn(12, 6)}
    plan = plan_of(InPieces, larger)
    assert plan.takes_of(manifest_of(larger).tensors) == plan.takes
