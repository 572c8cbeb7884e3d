"""Whole models into live parameters by the copy plan: from buckets by one launch each, and again from kept tables; and
by a model's own loader, where it computes."""

import threading

import msgspec
import pytest
import torch
from tests.kernels.device import DEVICE
from tests.kernels.device_delta import Rank, weights

from weightwire.engines.vllm.copy_plan import Copy, Plan
from weightwire.engines.vllm.device import DeviceStaging, Held, Tables
from weightwire.engines.vllm.device_delta import DeviceDelta
from weightwire.engines.vllm.recording import record
from weightwire.errors import NonFinite, UnsupportedError, VerificationError
from weightwire.sources.tensors import TensorSource
from weightwire.updates.boxes import Box
from weightwire.updates.buckets import cut
from weightwire.updates.digest import scan
from weightwire.updates.manifest import Manifest, TensorSpec


@pytest.fixture(scope="module")
def rank(few_rows):
    return Rank(weights(1))


def buckets(manifest, full):
    for bucket in cut(manifest):
        data = torch.zeros(bucket.nbytes, dtype=torch.uint8)
        for piece in bucket.pieces:
            part = list(full.values())[piece.tensor].reshape(-1)[piece.start : piece.start + piece.count]
            data[piece.offset : piece.offset + part.nbytes] = part.view(torch.uint8)
        yield bucket, data.to(DEVICE)


def taken(rank, full, tables, how, **manifest):
    manifest = Manifest(version=1, tensors=rank.specs, **manifest)
    staging = DeviceStaging(manifest, rank.plan, rank.places(), DEVICE, tables, Held())
    how(staging, manifest, full)
    staging.seal([scan(tensor) for tensor in full.values()])
    staging.commit()
    assert set(staging.proof()) == set(rank.live)
    staging.discard()


def by_buckets(staging, manifest, full):
    kept = [*buckets(manifest, full)]  # in memory of their own, which is not handed out twice
    for bucket, data in kept:
        staging.write_bucket(bucket, data)


def by_parts(staging, manifest, full):
    """Every piece where it is to stay, if it has a place; gives the names of those that have one."""
    placed = []
    for bucket, data in buckets(manifest, full):
        parts = []
        for piece, own in zip(bucket.pieces, staging.places(bucket), strict=True):
            parts.append(piece.within(data.clone()) if own is None else own.copy_(piece.within(data)))
            if own is not None:
                placed.append(manifest.tensors[piece.tensor].name)
        data.zero_()  # nothing is left to be copied from there
        staging.write_parts(bucket, parts)
    return placed


@pytest.mark.parametrize("mode", ["copy", "none"])
def test_a_piece_that_stays_in_one_piece_comes_to_its_place_by_itself(rank, mode):
    tables, found = Tables(), []
    for seed in (12, 13, 14):
        taken(rank, weights(seed), tables, lambda *args: found.append(by_parts(*args)), staging=mode)
        assert rank.holds(weights(seed))
    assert found == [["whole", "scalar"]] * 3


def test_a_tensor_that_goes_to_two_parameters_comes_to_one_of_them(few_rows):
    spec, wanted = TensorSpec(name="w", dtype="bfloat16", shape=(3, 4)), torch.randn(3, 4).bfloat16()
    whole = Box((0, 0), (3, 4))
    plan = Plan([[Copy(whole, "turned", 0, (1, 3)), Copy(whole, "one", 4, (4, 1)), Copy(whole, "other", 0, (4, 1))]])
    live = {"turned": (4, 3), "one": (4, 4), "other": (3, 4)}
    live = {name: torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE) for name, shape in live.items()}
    manifest = Manifest(version=1, tensors=(spec,))
    places = {name: [tensor] for name, tensor in live.items()}
    staging = DeviceStaging(manifest, plan, places, DEVICE, Tables(), Held())
    assert by_parts(staging, manifest, {"w": wanted}) == ["w"]
    staging.seal([scan(wanted)])
    staging.commit()
    staging.proof()
    for there in (live["turned"].T, live["one"][1:], live["other"]):
        assert torch.equal(there.cpu(), wanted)


def test_what_is_cast_has_no_place():
    rank = Rank(weights(15))
    spec = msgspec.structs.replace(rank.specs[0], dtype="float32")
    manifest = Manifest(version=1, tensors=(spec, *rank.specs[1:]))
    staging = DeviceStaging(manifest, rank.plan, rank.places(), DEVICE, Tables(), Held())
    assert staging.places(cut(manifest)[0])[0] is None


def test_buckets_of_several_pieces_go_where_they_belong(rank):
    tables = Tables()
    for seed in (2, 3, 4):
        taken(rank, weights(seed), tables, by_buckets)
        assert rank.holds(weights(seed))


def test_the_same_places_are_made_ready_once(rank, monkeypatch):
    """An allocator gives out the same memory again and again, as torch's does on a GPU."""
    memory, full = torch.empty(1 << 16, dtype=torch.uint8, device=DEVICE), weights(5)
    monkeypatch.setattr(torch, "empty", lambda size, **how: memory[:size])
    manifest = Manifest(version=1, tensors=rank.specs)
    kept = [*buckets(manifest, full)]
    tables = Tables()

    def again(staging, manifest, full):
        for bucket, data in kept:
            staging.write_bucket(bucket, data)

    taken(rank, full, tables, again)
    ready = (tables.copies, tables.live, tables.parts, *tables.buckets.values())
    rank.live["whole"].zero_()
    taken(rank, full, tables, again)
    assert rank.holds(full)
    assert all(
        a is b for a, b in zip(ready, (tables.copies, tables.live, tables.parts, *tables.buckets.values()), strict=True)
    )


def test_what_is_cast_is_written_piece_by_piece():
    full = weights(6)
    rank = Rank(full)
    wide = {name: tensor.float() for name, tensor in full.items()}
    specs = tuple(msgspec.structs.replace(spec, dtype="float32") for spec in rank.specs)
    rank.specs, rank.live = specs, {name: 0 * tensor + 7 for name, tensor in rank.live.items()}
    taken(rank, wide, Tables(), by_buckets)
    assert rank.holds(full)


def test_what_is_lent_can_be_copied_first(rank):
    full = weights(7)

    def copied(staging, manifest, full):
        assert not staging.copy_all(room=100)
        assert staging.copy_all(room=1 << 20)
        by_buckets(staging, manifest, full)

    taken(rank, full, Tables(), copied, staging="lent")
    assert rank.holds(full)


def test_another_digest_than_what_is_live_is_noticed(rank):
    full, other = weights(8), weights(9)
    manifest = Manifest(version=1, tensors=rank.specs)
    staging = DeviceStaging(manifest, rank.plan, rank.places(), DEVICE, Tables(), Held())
    by_buckets(staging, manifest, full)
    staging.seal([scan(tensor) for tensor in other.values()])
    staging.commit()
    with pytest.raises(VerificationError, match="whole"):
        staging.proof()


class Computing(torch.nn.Module):
    """One weight is a copy; one is computed from another tensor, one is joined from what the first is a copy of and a
    third tensor."""

    def __init__(self, device):
        super().__init__()
        self.plain, self.log, self.joined = (
            torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)
            for shape, dtype in (((4, 6), torch.bfloat16), ((5,), torch.float32), ((4, 9), torch.bfloat16))
        )

    def load_weights(self, weights):
        halves = {}
        for name, tensor in weights:
            if name == "log":
                self.log.data.copy_(-torch.exp(tensor.float()))
                continue
            if name == "plain":
                self.plain.data.copy_(tensor)
            halves[name] = tensor
            if len(halves) == 2:
                self.joined.data.copy_(torch.cat([halves["plain"], halves["other"]], dim=1))


class ComputingRank:
    def __init__(self):
        self.live, self.twin, self.held = Computing(DEVICE), Computing("meta"), Held()
        self.tables, self.plans = Tables(), {}

    @staticmethod
    def weights(seed, dtype=torch.bfloat16):
        generator = torch.Generator().manual_seed(seed)
        shapes = {"plain": (4, 6), "log": (5,), "other": (4, 3)}
        return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}

    def begin(self, full, **how):
        manifest = Manifest(version=1, tensors=tuple(TensorSource(full).metadata()), **how)
        plan = self.plans.setdefault(manifest.tensors, record(self.twin, manifest))
        live = {name: [parameter.detach()] for name, parameter in self.live.named_parameters()}
        return manifest, DeviceStaging(manifest, plan, live, DEVICE, self.tables, self.held, self.twin)

    def end(self, staging, full):
        staging.seal([scan(tensor) for tensor in full.values()])
        staging.commit()
        proof = staging.proof()
        staging.discard()
        return proof

    def holds(self, full):
        fresh = Computing(DEVICE)
        fresh.load_weights(full.items())
        return all(torch.equal(p, self.live.get_parameter(name)) for name, p in fresh.named_parameters())


def by_lending(staging, manifest, full):
    lent = [tensor.to(DEVICE) for tensor in full.values()]
    for number, tensor in enumerate(lent):
        staging.lend(number, tensor)
    return lent


def by_runs(staging, manifest, full):
    for number, tensor in enumerate(full.values()):
        for start in range(0, tensor.numel(), 4):
            staging.write(number, start, tensor.reshape(-1)[start : start + 4].to(DEVICE))


@pytest.mark.parametrize(
    ("how", "staging"), [(by_buckets, "copy"), (by_runs, "copy"), (by_lending, "lent"), (by_lending, "copy")]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_a_loader_computes_is_staged_and_read_back(few_rows, how, staging, dtype):
    rank = ComputingRank()
    for seed in (1, 2):
        full = rank.weights(seed, dtype)
        manifest, staged = rank.begin(full, staging=staging)
        kept = how(staged, manifest, full)
        assert sorted(staged.computed) == ["joined", "log"]
        assert rank.end(staged, full) == dict.fromkeys(("plain", "log", "joined"), "read back")
        assert rank.holds(full)
        assert all(parameter.is_meta for parameter in rank.twin.parameters())
        del kept


@pytest.mark.parametrize("queues", [True, False])
def test_a_commit_is_waited_for_where_the_engine_may_not_come_behind_it(rank, monkeypatch, queues):
    manifest, full, finished = Manifest(version=1, tensors=rank.specs), weights(21), []
    staging = DeviceStaging(manifest, rank.plan, rank.places(), DEVICE, Tables(), Held(), queues=queues)
    by_buckets(staging, manifest, full)
    staging.seal([scan(tensor) for tensor in full.values()])
    monkeypatch.setattr(DeviceStaging, "finish", lambda self: finished.append("waited"))
    staging.commit()
    assert len(finished) == (not queues)
    staging.proof()
    assert len(finished) == 1 + (not queues)
    staging.discard()
    assert len(finished) == 2 + (not queues)


def test_a_commit_from_another_thread_than_the_engines_is_waited_for(rank, monkeypatch):
    manifest, full, finished = Manifest(version=1, tensors=rank.specs), weights(22), []
    staging = DeviceStaging(manifest, rank.plan, rank.places(), DEVICE, Tables(), Held(), queues=True)
    by_buckets(staging, manifest, full)
    staging.seal([scan(tensor) for tensor in full.values()])
    monkeypatch.setattr(DeviceStaging, "finish", lambda self: finished.append("waited"))
    thread = threading.Thread(target=staging.commit)
    thread.start()
    thread.join()
    assert finished == ["waited"]


def test_what_is_lent_needs_memory_for_what_is_computed_alone(few_rows):
    rank = ComputingRank()
    sizes = {kind: rank.begin(rank.weights(1), staging=kind)[1].nbytes for kind in ("copy", "lent")}
    assert sizes == {"copy": 3 * 256, "lent": 2 * 256}


def test_a_computed_parameter_that_is_not_what_was_staged_is_noticed(few_rows):
    rank, full = ComputingRank(), ComputingRank.weights(1)
    manifest, staging = rank.begin(full)
    by_buckets(staging, manifest, full)
    staging.seal([scan(tensor) for tensor in full.values()])
    staging.commit()
    rank.live.joined.data[2, 3] += 1
    with pytest.raises(VerificationError, match="joined"):
        staging.proof()


def test_what_becomes_infinite_in_the_loader_is_refused(few_rows):
    rank, full = ComputingRank(), ComputingRank.weights(1)
    full["log"][2] = 200
    manifest, staging = rank.begin(full)
    by_buckets(staging, manifest, full)
    with pytest.raises(NonFinite, match="log"):
        staging.seal([scan(tensor) for tensor in full.values()])


def test_without_a_staged_copy_and_by_deltas_nothing_is_computed(few_rows):
    rank, full = ComputingRank(), ComputingRank.weights(1)
    with pytest.raises(UnsupportedError, match=r"log is computed by the model's loader.*without staging='none'"):
        rank.begin(full, staging="none")
    manifest, staging = rank.begin(full)
    by_buckets(staging, manifest, full)
    rank.end(staging, full)
    of = msgspec.structs.replace(manifest, version=2, kind="delta", base_version=1, encoded=(1, 1, 1))
    with pytest.raises(UnsupportedError, match=r"log is computed by the model's loader.*kind='dense'"):
        DeviceDelta(of, rank.plans[manifest.tensors], {}, DEVICE, rank.held)
