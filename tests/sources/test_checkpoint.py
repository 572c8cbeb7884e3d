import json
import os

import psutil
import pytest
import torch
from safetensors.torch import save_file

from weightwire.errors import SourceError
from weightwire.sources import find
from weightwire.sources.checkpoint import CheckpointSource
from weightwire.updates.digest import scan

TENSORS = {
    "z.weight": torch.randn(5, 3),
    "a.weight": torch.randn(4, 2).to(torch.bfloat16),
    "flags": torch.tensor([True, False, True]),
    "eight": torch.randn(7).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(3.0, dtype=torch.float64),
    "nothing": torch.empty(0, 3),
    "ids": torch.arange(6).reshape(2, 3),
}


def reads(source):
    """Every tensor by name, read in two runs, with their scans checked."""
    tensors = {}
    for number, spec in enumerate(source.metadata()):
        flat = torch.empty(spec.numel, dtype=getattr(torch, spec.dtype))
        half = spec.numel // 2
        scans = [source.read(number, start, part) for start, part in ((0, flat[:half]), (half, flat[half:]))]
        tensors[spec.name] = flat.reshape(spec.shape)
        assert scans[0] + scans[1] == scan(flat)
    return tensors


def same(tensors, others):
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert (tensor.dtype, tensor.shape) == (others[name].dtype, others[name].shape)
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), others[name].reshape(-1).view(torch.uint8))


def shard(folder, shards, index=None):
    for file, names in shards.items():
        save_file({name: TENSORS[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map} if index is None else index)
    )
    return folder


def test_a_file(tmp_path):
    save_file(TENSORS, tmp_path / "any.safetensors")
    same(reads(find(tmp_path / "any.safetensors", timeout=1.0)), TENSORS)


def test_a_folder_with_one_file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    source = find(str(tmp_path), timeout=1.0)
    same(reads(source), TENSORS)
    assert [spec.name for spec in source.metadata()] == [spec.name for spec in CheckpointSource(tmp_path).metadata()]


def test_shards_are_read_as_one_and_one_at_a_time(tmp_path):
    names = list(TENSORS)
    source = CheckpointSource(shard(tmp_path, {"b.safetensors": names[:3], "a.safetensors": names[3:]}))
    same(reads(source), TENSORS)
    files = [os.path.basename(m.path) for m in psutil.Process().memory_maps()]
    assert sum(file in ("a.safetensors", "b.safetensors") for file in files) <= 1


def test_a_tensor_that_the_index_leaves_out_is_left_out(tmp_path):
    shard(tmp_path, {"a.safetensors": ["ids", "flags"]}, {"weight_map": {"ids": "a.safetensors"}})
    same(reads(CheckpointSource(tmp_path)), {"ids": TENSORS["ids"]})


def test_the_checkpoint_is_looked_up_anew(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(2)}, file)
    source = CheckpointSource(file)
    save_file({"w": torch.ones(3), "v": torch.ones(1)}, tmp_path / "next")
    os.replace(tmp_path / "next", file)
    with pytest.raises(SourceError, match=r"'w' in .* changed while it was being read"):
        source.read(0, 0, torch.empty(2))
    assert {spec.name: spec.shape for spec in source.metadata()} == {"w": (3,), "v": (1,)}
    same(reads(source), {"w": torch.ones(3), "v": torch.ones(1)})


def write(file, header, data):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def test_elements_at_odd_addresses(tmp_path):
    values = torch.tensor([1.5, -2.0])
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "w": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    write(tmp_path / "odd.safetensors", header, b"\x07" + values.numpy().tobytes())
    same(reads(CheckpointSource(tmp_path / "odd.safetensors")), {"byte": torch.tensor([7]).byte(), "w": values})


def test_no_such_path(tmp_path):
    with pytest.raises(SourceError, match=r"there is no .*/gone\. .*nothing is downloaded"):
        find(tmp_path / "gone", timeout=1.0)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "has neither model.safetensors nor .*Pass the folder"),
        (["pytorch_model.bin"], "It has pytorch_model.bin, but pickle is never read"),
        (["adapter_model.safetensors", "x.bin"], "It has adapter_model.safetensors: pass the path of that file"),
    ],
)
def test_a_folder_without_a_checkpoint(tmp_path, files, said):
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(SourceError, match=said):
        CheckpointSource(tmp_path)


def test_a_pickle_is_not_read(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(SourceError, match=r"is no .safetensors file.*pickle is never read"):
        CheckpointSource(tmp_path / "model.pt")


def test_the_index_names_a_file_that_is_not_there(tmp_path):
    shard(tmp_path, {"a.safetensors": ["ids"]}, {"weight_map": {"ids": "a.safetensors", "w": "b.safetensors"}})
    with pytest.raises(SourceError, match=r"names 'b.safetensors', which is not there"):
        CheckpointSource(tmp_path)


def test_the_index_names_a_tensor_that_is_not_there(tmp_path):
    shard(tmp_path, {"a.safetensors": ["ids"]}, {"weight_map": {"ids": "a.safetensors", "w": "a.safetensors"}})
    with pytest.raises(SourceError, match="has no 'w', which the index says it has"):
        CheckpointSource(tmp_path)


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/etc/a.safetensors", "sub/a.safetensors", "..\\a.safetensors", "a.bin", "..", ""]
)
def test_the_index_names_only_its_neighbours(tmp_path, name):
    (tmp_path / "inner" / "sub").mkdir(parents=True)
    for place in (tmp_path, tmp_path / "inner", tmp_path / "inner" / "sub"):
        save_file({"ids": TENSORS["ids"]}, place / "a.safetensors")
    shard(tmp_path / "inner", {}, {"weight_map": {"ids": name}})
    with pytest.raises(SourceError, match=r"index\.json names the file"):
        CheckpointSource(tmp_path / "inner")


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": {"w": 3}}', '{"weight_map": ["w"]}', "\xff"])
def test_an_index_that_is_none(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index, encoding="latin-1")
    with pytest.raises(SourceError, match="is no index of a checkpoint"):
        CheckpointSource(tmp_path)


def test_an_index_of_nothing(tmp_path):
    with pytest.raises(SourceError, match="has no tensors in it"):
        CheckpointSource(shard(tmp_path, {}))


W = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"", b""),
        (b"{", bytes(8)),
        (b"\xff" * 40, bytes(8)),
        (W, bytes(7)),
        ({"w": W["w"] | {"shape": [3]}}, bytes(8)),
        ({"w": W["w"] | {"data_offsets": [0, 1 << 60]}}, bytes(8)),
        ({"w": W["w"] | {"dtype": "PICKLE"}}, bytes(8)),
    ],
)
def test_corrupt_files(tmp_path, header, data):
    write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(SourceError, match=r"model.safetensors is no readable safetensors file"):
        CheckpointSource(tmp_path)


def test_an_empty_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(SourceError, match="is no readable safetensors file"):
        CheckpointSource(tmp_path)


def test_a_dtype_that_cannot_travel_is_named(tmp_path):
    save_file({"w": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match=r"'w' in .* has dtype C64"):
        CheckpointSource(tmp_path)
