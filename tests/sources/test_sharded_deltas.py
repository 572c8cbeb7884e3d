"""Deltas of weights that are spread over ranks: each rank encodes its own shard, and nothing is gathered."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

import weightwire as ww
from support import same, snapshot
from support.ranks import Peak, default_group_works, gathered, holder
from weightwire.errors import EngineError, NonFinite, PublishError, SourceError, VerificationError, VersionError
from weightwire.sources.fsdp import FsdpSource, held

SOON = 120.0  # what compiles at its first use takes a while on a busy machine


# -- on every rank -----------------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    """Of `gate.bias` only one rank has anything, other tensors do not divide by two; one is plain, two are tied."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(33, 10)
        self.up = torch.nn.Linear(10, 13)
        self.down = torch.nn.Linear(13, 10)
        self.gate = torch.nn.Linear(10, 1)
        self.scale = torch.nn.Parameter(torch.randn(5, 3, 7))
        self.head = torch.nn.Linear(10, 33, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.randn(3, 3))


def net(dtype=torch.bfloat16, seed=0):
    torch.manual_seed(seed)
    return Net().to(dtype)


def fsdp(model):
    from torch.distributed.fsdp import fully_shard

    for layer in (model.up, model.down):
        fully_shard(layer)
    return fully_shard(model)


def hybrid(model):
    """Two replicas, each over two ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard")))


def with_tensor_parallelism(model):
    """Shards by columns, which are no runs, and those of FSDP2 within shards by rows, which are strided."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["data"])


LAYOUTS = {"fsdp": fsdp, "hybrid": hybrid, "tensor": with_tensor_parallelism}


def moved(model, density, seed):
    """A step: about so many elements of what each rank holds change, of replicas the same."""
    for number, (name, tensor) in enumerate(model.named_parameters()):
        mine = held(name, tensor)
        generator = torch.Generator().manual_seed(1000 * seed + 50 * number + sum(mine.box.start))
        mine.local[torch.rand(mine.local.shape, generator=generator) < density] *= -1.01


def publisher_of(model, rank, engine, **how):
    return ww.Publisher(model, engine if rank == 0 else None, baseline="host", deadline=SOON, **how)


def mixes(rank, size, layout, dtype):
    dtype = getattr(torch, dtype)
    model = LAYOUTS[layout](net(dtype))
    engine = ww.TransformersEngine(net(dtype, seed=1), name="here")
    steps = [("auto", 1), ("auto", 0.02), ("auto", 0.0), ("dense", 0.02), ("auto", 0.05), ("auto", 0.9), ("delta", 1)]
    kinds = []
    with publisher_of(model, rank, engine, bucket_bytes=4096) as publisher:
        for version, (kind, density) in enumerate(steps):
            moved(model, density, version)
            receipt = publisher.publish(version, kind=kind)
            full = gathered(model)
            kinds.append(receipt.kind)
            if rank == 0:
                assert same(engine.model, full)
                assert set(receipt.engines["here"].proven.values()) == {"read back"}
                assert engine.status().version == version
    assert kinds == ["dense", "delta", "delta", "dense", "delta", "dense", "delta"]
    assert "% of the elements changed, instead of" in receipt.why
    default_group_works(size)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_any_mix_of_updates_from_fsdp2_leaves_engine_and_trainer_equal(lab, dtype):
    lab(mixes, 2, layout="fsdp", dtype=dtype, seconds=2 * SOON)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["hybrid", "tensor"])
def test_any_mix_of_updates_from_a_mesh_of_two_dimensions_leaves_engine_and_trainer_equal(lab, layout):
    lab(mixes, 4, layout=layout, dtype="bfloat16", seconds=2 * SOON)


def decides(rank, size):
    model = fsdp(net())
    engine = ww.TransformersEngine(net(seed=1), name="here")
    kinds = []
    with publisher_of(model, rank, engine) as publisher:
        for version, (here, there) in enumerate([(0, 0), (0, 0.25), (0, 1), (0.25, 0), (1, 0)]):
            moved(model, there if rank else here, version)
            receipt = publisher.publish(version)
            kinds.append(receipt.kind)
            full = gathered(model)
            assert rank or same(engine.model, full)
            if version == 2:
                assert "of the elements changed, more than the 20% up to which deltas pay" in receipt.why
    assert kinds == ["dense", "delta", "dense", "delta", "dense"]


def test_the_density_of_all_ranks_together_decides_for_all(lab):
    lab(decides, 2, seconds=2 * SOON)


# -- another base, and what goes wrong -----------------------------------------------------------------------------


def falls_back(rank, size):
    model = fsdp(net())
    engine = ww.TransformersEngine(net(seed=1), name="here")
    with publisher_of(model, rank, engine) as publisher:
        publisher.publish(1)
        if rank == 0:
            with ww.Publisher(snapshot(engine.model), engine) as other:
                other.publish(2)
        moved(model, 0.02, 3)
        with pytest.raises(VersionError, match="the delta starts from version 1, here is 2"):
            publisher.publish(3, kind="delta")
        receipt = publisher.publish(3)
        assert receipt.kind == "dense"
        assert "the delta was refused" in receipt.why
        full = gathered(model)
        assert rank or same(engine.model, full)
        moved(model, 0.02, 4)
        assert publisher.publish(4).kind == "delta"

        # What an engine says in its commit is no refusal: everybody hears of it, and nobody sends everything.
        def commits(*_, **__):
            raise VersionError("too late")

        if rank == 0:
            publisher._means.engines[0].commit = commits
        moved(model, 0.02, 5)
        with pytest.raises(VersionError, match="too late"):
            publisher.publish(5)
    default_group_works(size)


def test_a_delta_that_the_engine_refuses_is_followed_by_everything_on_all_ranks(lab):
    lab(falls_back, 2, seconds=2 * SOON)


def parts_ways(rank, size):
    model = fsdp(net())
    pair = [ww.TransformersEngine(net(seed=1), name=name) for name in ("a", "b")]
    with ww.Publisher(model, pair if rank == 0 else None, baseline="host", deadline=SOON) as publisher:

        def publishes(version):
            moved(model, 0.02, version)
            return publisher.publish(version)

        def holds(*engines):
            full = gathered(model)
            assert rank or all(same(engine.model, full) for engine in engines)

        publishes(1)
        second = publisher._means.engines[1] if rank == 0 else None
        commit = second.commit if rank == 0 else None

        def loses(*given, **how):
            commit(*given, **how)
            raise EngineError("the answer was lost")

        # It has been done, though nobody heard of it: every rank goes on from there.
        if rank == 0:
            second.commit = loses
        with pytest.raises(PublishError, match="the answer was lost"):
            publishes(2)
        holds(*pair)
        if rank == 0:
            second.commit = commit
        assert publishes(3).kind == "delta"
        holds(*pair)

        # One is behind: of sharded weights no steps are kept that would bring it on.
        if rank == 0:
            second.commit = fails
        with pytest.raises(PublishError, match="no such memory"):
            publishes(4)
        if rank == 0:
            second.commit = commit
            second.abort(pair[1].status().update["id"], timeout=SOON)
        receipt = publishes(5)
        assert receipt.kind == "dense"
        assert "b serves 3, from where no deltas that are kept lead on" in receipt.why
        holds(*pair)
        assert publishes(6).kind == "delta"
        holds(*pair)
    default_group_works(size)


def test_after_a_commit_that_failed_all_ranks_go_on_from_what_engines_have(lab):
    lab(parts_ways, 2, seconds=2 * SOON)


def spoils(rank, size):
    model = fsdp(net())
    engine = ww.TransformersEngine(net(seed=1), name="here")
    with publisher_of(model, rank, engine) as publisher:
        publisher.publish(1)
        before = snapshot(engine.model)
        source, baseline = publisher._means.source, publisher._means.kept.baseline
        number = next(n for n, spec in enumerate(baseline._specs) if spec.name == "up.weight")

        def says(error, match, **how):
            with pytest.raises(error, match=match) as caught:
                publisher.publish(2, **how)
            assert caught.value.details["rank"] == 1
            assert rank or (same(engine.model, before) and engine.status().version == 1)

        local = model.up.weight.to_local()
        kept = local.detach().clone()
        if rank == 1:
            with torch.no_grad():
                local[2, 2] = float("nan")
        says(NonFinite, r"rank 1: NaN or Inf in up\.weight \(1 of 60\)")
        with torch.no_grad():
            local.copy_(kept)

        read = source.read_part
        if rank == 1:
            source.read_part = fails
        says(SourceError, r"rank 1: tensor number \d could not be read: RuntimeError\('no such memory'\)")
        source.read_part = read

        held_here = baseline._tensors[number].clone()
        if rank == 1:
            baseline._tensors[number][3] += 1
        says(VerificationError, r"rank 1: up\.weight: what was published last is no longer", kind="delta")
        baseline._tensors[number].copy_(held_here)

        moved(model, 0.02, 2)
        assert publisher.publish(2).kind == "delta"
        full = gathered(model)
        assert rank or same(engine.model, full)
    default_group_works(size)


def fails(*_, **__):
    raise RuntimeError("no such memory")


def test_an_error_on_one_rank_is_the_same_on_all_and_the_old_version_serves(lab):
    lab(spoils, 2, seconds=2 * SOON)


def dies(rank, size):
    model = fsdp(net())
    engine = ww.TransformersEngine(net(seed=1), name="here")
    with publisher_of(model, rank, engine) as publisher:
        publisher.publish(1)
        before = snapshot(engine.model)
        if rank == 1:
            publisher._means.source.ranks.send = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        moved(model, 0.02, 2)
        started = time.monotonic()
        with pytest.raises(SourceError, match="waited in vain"):
            publisher.publish(2)
        assert time.monotonic() - started < SOON
        assert same(engine.model, before)
        assert engine.status().state == "idle"


def test_a_rank_killed_while_it_sends_its_delta_is_an_error_and_the_old_version_serves(lab):
    lab(dies, 2, dies={1}, seconds=2 * SOON)


def reshards(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    full = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    state = {"w": distribute_tensor(full, mesh, (Shard(0),), src_data_rank=None)}
    source = FsdpSource(torch.nn.Module(), timeout=SOON, state=lambda: state)
    engine = ww.TransformersEngine(holder({"w": torch.zeros(6, 4)}), name="here")
    with publisher_of(source, rank, engine) as publisher:
        publisher.publish(1)
        assert publisher.publish(2).kind == "delta"
        state["w"] = distribute_tensor(full + 1, mesh, (Shard(1),), src_data_rank=None)
        receipt = publisher.publish(3)
        assert receipt.kind == "dense"
        assert "spread over the ranks otherwise" in receipt.why
        assert publisher.publish(4).kind == "delta"
        # As where one rank was restarted and the others were not.
        if rank == 1:
            publisher._means.kept.baseline.version = None
        receipt = publisher.publish(5)
        assert (receipt.kind, "rank 1: nothing was published before" in receipt.why) == ("dense", True)
        assert rank or same(engine.model, {"w": full + 1})


def test_ranks_that_hold_other_parts_than_before_send_everything(lab):
    lab(reshards, 2, seconds=2 * SOON)


# -- after a restart ---------------------------------------------------------------------------------------------------


def restarts(rank, size, folder, layout):
    from safetensors.torch import save_file

    model = LAYOUTS[layout](net())
    full = gathered(model)
    engine = ww.TransformersEngine(net(seed=1), name="here")
    path = Path(folder, "model.safetensors")
    if rank == 0:
        save_file({name: tensor.clone() for name, tensor in full.items() if name != "head.weight"}, path)
        with ww.Publisher(full, engine, baseline="host") as publisher:
            publisher.publish(6)
    default_group_works(size)
    with publisher_of(model, rank, engine) as publisher:
        publisher.start_from(path.parent, version=6)
        moved(model, 0.02, 7)
        assert publisher.publish(7, kind="delta").kind == "delta"
        full = gathered(model)
        assert rank or same(engine.model, full)
        with pytest.raises(ww.UsageError, match=r"the base has no bfloat16 tensor 'scale' of shape \(5, 3, 7\)"):
            publisher.start_from({"embed.weight": full["embed.weight"], "table": full["table"]}, version=7)


@pytest.mark.parametrize(("layout", "ranks"), [("fsdp", 2), ("tensor", 4)])
def test_each_rank_takes_its_own_part_of_a_checkpoint_as_base(lab, tmp_path, layout, ranks):
    lab(restarts, ranks, folder=str(tmp_path), layout=layout, seconds=2 * SOON)


# -- memory ------------------------------------------------------------------------------------------------------------


def frugal(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (size,))
    # 200 MB, in three tensors: by rows, by columns, and in the middle.
    shapes = {"rows": ((8192, 4096), 0), "columns": ((4096, 8192), 1), "middle": ((16, 512, 4096), 1)}
    tensors, served = {}, {}
    for name, (shape, dim) in shapes.items():
        local = [n // size if i == dim else n for i, n in enumerate(shape)]
        tensors[name] = DTensor.from_local(
            torch.ones(local, dtype=torch.bfloat16), mesh, (Shard(dim),), run_check=False
        )
        served[name] = torch.zeros(shape if rank == 0 else 1, dtype=torch.bfloat16)
    engine = ww.TransformersEngine(holder(served), name="here")
    with publisher_of(holder(tensors), rank, engine) as publisher:
        publisher.publish(1)
        grown = []
        for version in (2, 3):
            for tensor in tensors.values():
                tensor.to_local().view(-1)[version::1000] *= 2
            peak = Peak()
            peak.start()
            receipt = publisher.publish(version)
            grown.append(peak.stop())
            assert receipt.kind == "delta"
    shard = 8192 * 4096 * 2 // size
    # In the second, what compiles has done so. A shard is compared as a copy; a whole tensor would be four of them.
    assert grown[1] < shard + (24 << 20), f"grew by {grown[1] / 1e6:.0f} MB"


@pytest.mark.slow
def test_no_rank_grows_by_more_than_a_shard_and_what_changes(lab):
    lab(frugal, 4, seconds=2 * SOON)
