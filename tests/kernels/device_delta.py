"""Deltas into live parameters by the copy plan: slices, fused matrices, and back, bit for bit."""

import copy

import pytest
import torch
from tests.kernels.device import DEVICE

from weightwire.engines.vllm.copy_plan import Copy, Plan
from weightwire.engines.vllm.device import DeviceStaging, Held, Tables
from weightwire.engines.vllm.device_delta import DeviceDelta
from weightwire.errors import NonFinite, ShapeMismatch, UnsupportedError, VerificationError, VersionError
from weightwire.updates.boxes import Box
from weightwire.updates.buckets import cut
from weightwire.updates.delta import encode
from weightwire.updates.digest import scan
from weightwire.updates.manifest import Manifest, TensorSpec

pytestmark = pytest.mark.usefixtures("few_rows")
SHAPES = {
    "whole": (6, 8),
    "q": (4, 10),
    "k": (2, 10),
    "columns": (5, 12),
    "rows": (8, 6),
    "turned": (4, 3),
    "scalar": (),
}
DTYPES = {name: torch.float32 if name in ("rows", "scalar") else torch.bfloat16 for name in SHAPES}
# What one of two tensor-parallel ranks takes of each, and where it puts it.
COPIES = {
    "whole": [Copy(Box((0, 0), (6, 8)), "whole", 0, (8, 1))],
    "q": [Copy(Box((2, 0), (2, 10)), "fused", 0, (10, 1))],
    "k": [Copy(Box((1, 0), (1, 10)), "fused", 20, (10, 1))],
    "columns": [Copy(Box((0, 6), (5, 6)), "columns", 0, (6, 1))],
    "rows": [Copy(Box((4, 0), (4, 6)), "rows", 6, (6, 1))],  # a first row that nothing is loaded into
    "turned": [Copy(Box((0, 0), (4, 3)), "turned", 0, (1, 4))],
    "scalar": [Copy(Box((), ()), "scalar", 0, ())],
}
LIVE = {"whole": (6, 8), "fused": (3, 10), "columns": (5, 6), "rows": (5, 6), "turned": (3, 4), "scalar": ()}


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(DTYPES[name]) for name, shape in SHAPES.items()}


def step(old, seed):
    """Some elements of each changed, the last always."""
    generator = torch.Generator().manual_seed(seed)
    new = {name: tensor.clone() for name, tensor in old.items()}
    for tensor in new.values():
        hit = torch.rand(tensor.shape, generator=generator) < 0.1
        tensor[hit] *= -1.25
        tensor.view(-1)[-1] -= 1
    return new


def slices(full):
    """What this rank's parameters hold of them."""
    dtype = {name: DTYPES["rows" if name == "rows" else name if name in DTYPES else "q"] for name in LIVE}
    live = {name: torch.full(shape, 7.0, dtype=dtype[name]) for name, shape in LIVE.items()}
    live["whole"][:] = full["whole"]
    live["fused"][:2], live["fused"][2] = full["q"][2:], full["k"][1]
    live["columns"][:] = full["columns"][:, 6:]
    live["rows"][1:] = full["rows"][4:]
    live["turned"][:] = full["turned"].T
    live["scalar"].copy_(full["scalar"])
    return live


def seal(staging):
    staging.seal(staging.sent)


class Rank:
    """One rank's live parameters, and what a target keeps for them."""

    def __init__(self, full):
        self.specs = tuple(
            TensorSpec(name=name, dtype=str(t.dtype).removeprefix("torch."), shape=tuple(t.shape))
            for name, t in full.items()
        )
        self.plan = Plan([COPIES[name] for name in full])
        for copies in self.plan.copies:
            for each in copies:
                self.plan.covered[each.parameter] += torch.Size(each.source.shape).numel()
        self.live = {name: tensor.to(DEVICE) for name, tensor in slices({n: 0 * t for n, t in full.items()}).items()}
        self.held = Held()
        self.dense(full)

    def again(self):
        """Another that holds the same."""
        other = copy.copy(self)
        other.plan, other.held = copy.deepcopy(self.plan), Held(self.held.plan, self.held.version)
        other.live = {name: tensor.clone() for name, tensor in self.live.items()}
        return other

    def places(self):
        return {name: [tensor] for name, tensor in self.live.items()}

    def dense(self, full):
        manifest = Manifest(version=1, tensors=self.specs)
        staging = DeviceStaging(manifest, self.plan, self.places(), DEVICE, Tables(), self.held)
        for number, tensor in enumerate(full.values()):
            staging.write(number, 0, tensor.reshape(-1))
        staging.seal([scan(tensor) for tensor in full.values()])
        staging.commit()
        staging.proof()
        staging.discard()

    def delta(self, old, new, **how):
        """Staged, and not sealed."""
        deltas = [encode(name, old[name], new[name]) for name in old]
        return self.staged([delta.data for delta in deltas], **how)

    def staged(self, data, finite=True, placed=False):
        encoded = tuple(raw.numel() for raw in data)
        manifest = Manifest(
            version=2, kind="delta", base_version=1, tensors=self.specs, encoded=encoded, finite=finite,
            bucket_bytes=4096,
        )  # fmt: skip
        staging = DeviceDelta(manifest, self.plan, self.places(), DEVICE, self.held)
        staging.sent = [scan(raw) for raw in data]
        for bucket in cut(manifest):
            if placed:
                places = staging.places(bucket)
                parts = [
                    place.copy_(piece.of(data[piece.tensor]))
                    for piece, place in zip(bucket.pieces, places, strict=True)
                ]
                staging.write_parts(bucket, parts)
                continue
            filled = torch.zeros(bucket.nbytes, dtype=torch.uint8)
            for piece in bucket.pieces:
                piece.within(filled).copy_(piece.of(data[piece.tensor]))
            staging.write_bucket(bucket, filled.to(DEVICE))
        return staging

    def holds(self, full):
        """Bit for bit, and what no tensor goes to is as it was."""
        expected = slices(full)
        expected["rows"][0] = 7.0
        return all(torch.equal(scanned(self.live[name]), scanned(expected[name])) for name in LIVE)


def scanned(tensor):
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


@pytest.fixture
def first():
    return weights(1)


@pytest.fixture(scope="module")
def proven(few_rows):
    """Made once: the interpreter takes seconds for each digest."""
    made = Rank(weights(1))
    made.live["rows"][0] = 7.0
    assert made.holds(weights(1))
    return made


@pytest.fixture
def rank(proven):
    return proven.again()


def test_deltas_follow_each_other(rank, first):
    old = first
    for seed, placed in ((1, False), (2, True)):
        new = step(old, seed)
        staging = rank.delta(old, new, placed=placed)
        seal(staging)
        assert rank.holds(old)
        staging.commit()
        assert rank.holds(new)
        assert set(staging.proof().values()) == {"read back"}
        assert staging.after == [scan(tensor).digest for tensor in new.values()]
        staging.discard()
        old = new
    rank.dense(first)
    assert rank.holds(first)


def test_where_things_are_is_found_out_again_only_when_they_have_moved(rank, first):
    def goes_live(old, new):
        staging = rank.delta(old, new)
        seal(staging)
        staging.commit()
        staging.proof()
        assert rank.holds(new)
        return rank.held.places

    new = [first, *(step(first, seed) for seed in (1, 2, 3))]
    places = goes_live(new[0], new[1])
    assert goes_live(new[1], new[2]) is places
    rank.live = {name: tensor.clone() for name, tensor in rank.live.items()}
    assert goes_live(new[2], new[3]) is not places


def test_undone_it_is_what_it_was_and_can_be_sent_again(rank, first):
    new = step(first, 1)
    staging = rank.delta(first, new)
    seal(staging)
    for proven in (False, True):
        staging.commit()
        if proven:
            staging.proof()
        staging.undo()
        assert rank.holds(first)
    staging.discard()
    staging = rank.delta(first, new)
    seal(staging)
    staging.commit()
    staging.proof()
    assert rank.holds(new)


def test_a_commit_that_stops_halfway_is_undone(rank, first):
    new = step(first, 2)
    staging = rank.delta(first, new)
    seal(staging)
    rank.live["whole"].copy_(new["whole"])  # as far as it came
    staging.undo()
    assert rank.holds(first)
    assert rank.held.version is not None


def test_no_change_at_all(rank, first):
    staging = rank.delta(first, first)
    seal(staging)
    staging.commit()
    staging.proof()
    assert rank.holds(first)


def test_another_base_and_the_same_twice_are_refused(rank, first):
    new = step(first, 1)
    staging = rank.delta(new, first)
    with pytest.raises(VersionError, match="'whole': the delta starts from elements of digest"):
        seal(staging)
    staging = rank.delta(first, new)
    seal(staging)
    staging.commit()
    staging.proof()
    with pytest.raises(VersionError, match="'whole': the delta starts from elements of digest"):
        seal(rank.delta(first, new))
    assert rank.holds(new)


def test_live_weights_that_somebody_else_changed_are_noticed(rank, first):
    rank.live["columns"][2, 3] += 1
    with pytest.raises(VersionError, match="1 live parameters are not what was committed last: columns"):
        seal(rank.delta(first, step(first, 1)))


@pytest.mark.parametrize("place", [3, 30, 60, 82, 90, -1])
def test_harmed_bytes_change_nothing(rank, first, place):
    new = step(first, 1)
    data = [encode(name, first[name], new[name]).data for name in first]
    data[3][place] ^= 1
    with pytest.raises(VerificationError, match="'columns': not a whole delta"):
        seal(rank.staged(data))
    assert rank.holds(first)


def test_a_delta_of_another_tensor_is_refused(rank, first):
    data = [encode(name, first[name], first[name]).data for name in first]
    data[0] = encode("whole", first["q"], first["q"]).data
    with pytest.raises(ShapeMismatch, match="'whole': the delta is of 40 elements"):
        seal(rank.staged(data))


def test_nan_is_refused_unless_asked_for(rank, first):
    new = step(first, 1)
    new["columns"][0, 7] = float("nan")
    with pytest.raises(NonFinite, match="NaN or Inf in columns"):
        seal(rank.delta(first, new))
    assert rank.holds(first)
    staging = rank.delta(first, new, finite=False)
    seal(staging)
    staging.commit()
    staging.proof()
    assert rank.holds(new)


def test_what_cannot_be_patched_is_refused(rank, first):
    rank.live["whole"] = rank.live["whole"].float()
    with pytest.raises(UnsupportedError, match=r"whole is torch\.float32 and whole is bfloat16"):
        rank.delta(first, first)
    rank.live["whole"] = rank.live["whole"].bfloat16()
    rank.plan.covered["whole"] += 1
    with pytest.raises(UnsupportedError, match="several tensors are one in whole"):
        rank.delta(first, first)
    rank.held.take(None, None)
    with pytest.raises(VersionError, match="was not proven"):
        rank.delta(first, first)
