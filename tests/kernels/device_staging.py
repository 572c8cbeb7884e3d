"""Whole models into live parameters by the copy plan: from buckets by one launch each, and again from kept tables."""

import msgspec
import pytest
import torch
from tests.kernels.device import DEVICE
from tests.kernels.device_delta import Rank, weights

from weightwire.engines.vllm.device import DeviceStaging, Held, Tables
from weightwire.errors import VerificationError
from weightwire.updates.buckets import cut
from weightwire.updates.digest import scan
from weightwire.updates.manifest import Manifest


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
