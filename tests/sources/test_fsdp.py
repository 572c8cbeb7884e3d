import contextlib
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from support.ranks import Model, default_group_works, gathered, holder, reads_frugally, reads_like
from weightwire.errors import SourceError, UnsupportedError
from weightwire.sources import find
from weightwire.updates.boxes import Box
from weightwire.updates.digest import NO_DIGEST, Scan, scan
from weightwire.updates.manifest import TensorSpec

SOON = 10.0


# -- on every rank -----------------------------------------------------------------------------------------------------


# -- FSDP2 -------------------------------------------------------------------------------------------------------------


def fsdp(_, size):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = Model()
    full = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer in (model.up, model.down):
        fully_shard(layer)
    fully_shard(model)
    source = find(model, timeout=SOON)
    assert type(source).__name__ == "FsdpSource"
    reads_like(source, full)
    assert source.aliases == {"head.weight": "embed.weight"}

    # A step later the same source has the new weights; the root is still gathered after its forward pass.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    optimizer.step()
    model(torch.tensor([[1, 2, 3]]))
    after = gathered(model)
    assert not torch.equal(after["up.weight"], full["up.weight"])
    reads_like(source, after)
    source.ranks.close()
    default_group_works(size)


def test_fsdp2_on_two_ranks_reads_as_the_full_model_before_and_after_a_step(lab):
    lab(fsdp, 2)


@pytest.mark.slow
def test_fsdp2_on_more_ranks_than_some_dimensions_have_rows(lab):
    lab(fsdp, 3)


# -- other layouts -----------------------------------------------------------------------------------------------------


def layouts(rank, size, device):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh(device, (2, 2), mesh_dim_names=("a", "b"))
    torch.manual_seed(0)
    full, tensors = {}, {}

    def add(shape, placements, over=mesh, dtype=torch.float32):
        name = f"t{len(full)}"
        full[name] = torch.randn(shape).mul(50).to(dtype)
        tensors[name] = distribute_tensor(full[name].to(device), over, placements, src_data_rank=None)

    add((8, 6), (Shard(0), Shard(0)))
    add((9, 5), (Shard(0), Shard(1)), dtype=torch.bfloat16)
    add((9, 5), (Shard(1), Shard(0)), dtype=torch.int8)
    add((3, 7, 5), (Shard(2), Shard(1)), dtype=torch.float64)
    add((5, 3, 4, 3), (Shard(1), Shard(3)))
    add((7,), (Replicate(), Shard(0)))
    add((7,), (Shard(0), Replicate()), dtype=torch.float16)
    add((3, 3), (Replicate(), Replicate()))
    add((), (Replicate(), Replicate()))
    add((6, 1), (Shard(1), Shard(0)))
    add((0, 3), (Shard(0), Shard(1)))
    add((5, 4), (Shard(0),), over=mesh["b"])
    add((5, 4), (Shard(1),), over=mesh["a"], dtype=torch.bool)
    full["plain"] = torch.randn(4, 3)
    tensors["plain"] = full["plain"].to(device)
    # As a transposed weight: the shard's memory is in another order than its elements.
    full["turned"] = torch.randn(6, 4)
    turned = full["turned"].to(device).chunk(2)[rank // 2].t().contiguous().t()
    tensors["turned"] = DTensor.from_local(turned, mesh, (Shard(0), Replicate()), run_check=False)
    reads_like(find(holder(tensors), timeout=SOON), full)
    default_group_works(size)


def two_dimensional(_, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    torch.manual_seed(0)
    hybrid = Model()
    full = {name: tensor.clone() for name, tensor in hybrid.state_dict().items()}
    fully_shard(hybrid, mesh=mesh)
    source = find(hybrid, timeout=SOON)
    reads_like(source, full)
    source.ranks.close()

    for width in (12, 13, 9):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(6, width), torch.nn.ReLU(), torch.nn.Linear(width, 5))
        full = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["data"])
        placements = {name: str(p.placements) for name, p in model.named_parameters()}
        assert "_S" in placements["0.weight"], placements
        source = find(model, timeout=SOON)
        reads_like(source, full)
        source.ranks.close()
    default_group_works(size)


def test_layouts_over_meshes_of_two_dimensions_and_their_parts(lab):
    lab(layouts, 4, device="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, which the ranks share")
def test_layouts_on_a_gpu(lab):
    lab(layouts, 4, device="cuda")


@pytest.mark.slow
def test_hsdp_and_fsdp_with_tensor_parallelism(lab):
    lab(two_dimensional, 4)


def refused(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    sharded = distribute_tensor(torch.randn(6, 2), mesh, (Shard(0),))

    partial = DTensor.from_local(torch.ones(2), mesh, (Partial(),))
    with pytest.raises(UnsupportedError, match=r"rank 0: 'odd' of shape \(2,\) has the layout .*[pP]artial"):
        find(holder({"fine": sharded, "odd": partial}), timeout=SOON).metadata()

    # What `from_local` was told is not what it was given: rank 1 has a row too many.
    wrong = torch.ones(2 + rank, 2)
    lying = DTensor.from_local(wrong, mesh, (Shard(0),), run_check=False, shape=torch.Size((4, 2)), stride=(2, 1))
    with pytest.raises(UnsupportedError, match="rank 1: 'odd'"):
        find(holder({"odd": lying}), timeout=SOON).metadata()

    with pytest.raises(SourceError, match=r"rank 1: 'b' is missing here and float32 of shape \(6, 2\) on rank 0"):
        find(holder({"a": sharded} | ({} if rank else {"b": sharded.clone()})), timeout=SOON).metadata()
    with pytest.raises(SourceError, match="rank 1: 'b' is not known on rank 0"):
        find(holder({"a": sharded} | ({"b": sharded.clone()} if rank else {})), timeout=SOON).metadata()
    default_group_works(size)


def test_what_cannot_be_read_exactly_is_refused_by_name_on_all_ranks(lab):
    lab(refused, 2)


# -- failures ----------------------------------------------------------------------------------------------------------


def sharded_source(timeout=60.0, rows=64, dtype=torch.float32):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    full = torch.arange(rows * 4.0).reshape(rows, 4).to(dtype)
    source = find(holder({"w": distribute_tensor(full, mesh, (Shard(0),))}), timeout=timeout)
    source.metadata()
    return source, full


class Broken:
    def __getitem__(self, place):
        raise RuntimeError("the memory of this rank is gone")


def read(how, source, number, start, out):
    """In one of the two ways in which ranks read together."""
    if how == "gather":
        source.gather(lambda: [(number, start, out)])
    else:
        source.read(number, start, out)


def cannot_read(rank, size, how):
    source, full = sharded_source()
    fine = source._held[0]
    if rank == 1:
        source._held[0] = fine._replace(local=Broken())
    started = time.monotonic()
    for _ in range(2):
        with pytest.raises(
            SourceError, match=r"^rank 1: 'w' could not be read: RuntimeError: the memory of this"
        ) as caught:
            read(how, source, 0, 0, torch.empty(full.numel()))
        assert caught.value.details["rank"] == 1
    with pytest.raises(SourceError, match=r"rank 0: (tensor number 9|a bucket) could not be read"):
        read(how, source, 9, 0, torch.empty(4))
    assert time.monotonic() - started < SOON

    # Nothing was half sent: the next read is whole again.
    source._held[0] = fine
    reads_like(source, {"w": full})
    default_group_works(size)


@pytest.mark.parametrize("how", ["read", "gather"])
def test_an_error_while_reading_on_one_rank_is_the_same_on_all(lab, how):
    lab(cannot_read, 2, how=how)


def dies_reading(rank, _, how):
    source, full = sharded_source()
    for _ in range(3):
        read(how, source, 0, 0, torch.empty(full.numel()))
    if rank == 1:
        source.ranks.send = source.ranks.to_leader = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with contextlib.suppress(SourceError):
        read(how, source, 0, 0, torch.empty(full.numel()))
    with pytest.raises(SourceError, match=f"rank {rank} .*waited in vain"):
        read(how, source, 0, 0, torch.empty(full.numel()))
    assert time.monotonic() - started < SOON


def cannot_send(rank, _, how):
    source, full = sharded_source()

    def send(*_):
        raise RuntimeError("no buffer space")

    if rank == 1:
        source.ranks.send = source.ranks.to_leader = send
    started = time.monotonic()
    with pytest.raises(SourceError, match="no buffer space" if rank == 1 else "waited in vain"):
        read(how, source, 0, 0, torch.empty(full.numel()))
    with pytest.raises(SourceError, match="has left the ranks' group"):
        read(how, source, 0, 0, torch.empty(full.numel()))
    assert time.monotonic() - started < SOON


@pytest.mark.parametrize("how", ["read", "gather"])
def test_an_error_while_sending_is_an_error_on_all_others(lab, how):
    lab(cannot_send, 2, how=how)


@pytest.mark.parametrize(("size", "how"), [(2, "read"), (4, "read"), (2, "gather")])
def test_a_rank_killed_while_it_sends_is_an_error_on_all_others(lab, size, how):
    lab(dies_reading, size, dies={1}, how=how)


# -- memory ------------------------------------------------------------------------------------------------------------


def frugal(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (size,))
    # 200 MB: by rows, by columns (which never lie in one piece), and in the middle.
    shapes = {"rows": ((8192, 4096), 0), "columns": ((4096, 8192), 1), "middle": ((16, 512, 4096), 1)}
    tensors = {}
    for name, (shape, dim) in shapes.items():
        local = [n // size if i == dim else n for i, n in enumerate(shape)]
        tensors[name] = DTensor.from_local(
            torch.ones(local, dtype=torch.bfloat16), mesh, (Shard(dim),), run_check=False
        )
    source = find(holder(tensors), timeout=SOON)
    specs = source.metadata()
    assert sum(spec.nbytes for spec in specs) > 190e6
    reads_frugally(source, rank)


def test_no_rank_grows_by_more_than_a_few_runs(lab):
    lab(frugal, 2)


# -- the layout alone --------------------------------------------------------------------------------------------------


def test_held_run_is_what_torch_says():
    from torch.distributed.tensor import Shard, _utils
    from torch.distributed.tensor.placement_types import _StridedShard

    from weightwire.sources.fsdp import held_run

    for size in range(14):
        for first, second in ((2, 2), (2, 3), (4, 2), (3, 4)):
            for placements in ((Shard(0), Shard(0)), (_StridedShard(0, split_factor=second), Shard(0))):
                for a in range(first):
                    for b in range(second):
                        shape, offset = _utils._compute_local_shape_and_global_offset(
                            (size,), (first, second), [a, b], placements
                        )
                        factor = getattr(placements[0], "split_factor", 1)
                        run = held_run(size, [(first, a, factor), (second, b, 1)])
                        where = (size, first, second, placements, a, b)
                        assert run is not None, where
                        assert run[1] == shape[0], where
                        assert run[1] == 0 or run[0] == offset[0], where


def test_boxes_that_do_not_make_up_the_tensor_are_refused():
    from weightwire.sources.fsdp import holders

    spec = TensorSpec(name="w", dtype="float32", shape=(4, 4))
    left, right, top = Box((0, 0), (4, 2)), Box((0, 2), (4, 2)), Box((0, 0), (2, 4))
    assert holders(spec, [right, left, left]) == {right: 0, left: 1}
    for boxes in ([left], [left, top], [left, Box((0, 1), (4, 2))], [None, None], [left, right, top]):
        with pytest.raises(UnsupportedError, match="'w'"):
            holders(spec, boxes)


def test_nothing_is_no_scan():
    assert scan(torch.empty(0)) == Scan(NO_DIGEST, 0)
