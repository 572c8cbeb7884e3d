import json
import subprocess
import sys

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightwire.errors import ManifestError
from weightwire.updates.manifest import DTYPES, MAX_BUCKET_BYTES, Adapter, Manifest, TensorSpec, decode_manifest

W = {"name": "layer.w", "dtype": "float32", "shape": [2, 3]}
PLAIN = {"version": 1, "tensors": [W]}

names = st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" "), min_size=1, max_size=20)
specs = st.builds(
    TensorSpec,
    name=names,
    dtype=st.sampled_from(sorted(DTYPES)),
    shape=st.lists(st.integers(0, 9), max_size=8).map(tuple),
)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
scalars = leaves | st.sampled_from(["dense", "float32", "w", 1, 1 << 48, 1 << 63, -1])
keys = st.sampled_from([*Manifest.__struct_fields__, *TensorSpec.__struct_fields__]) | st.text(max_size=5)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)


def mutations(whole):
    """A valid manifest with one value, anywhere in it, replaced."""

    @st.composite
    def mutated(draw):
        tree = json.loads(json.dumps(whole))
        node = tree
        while True:
            key = draw(st.sampled_from(range(len(node)) if isinstance(node, list) else sorted(node)))
            if isinstance(node[key], list | dict) and node[key] and draw(st.booleans()):
                node = node[key]
                continue
            node[key] = draw(trees)
            return tree

    return mutated()


def outcome(data):
    try:
        manifest = decode_manifest(data)
    except ManifestError as error:
        return error
    assert manifest.check() is manifest
    return manifest


@given(st.binary(max_size=200))
def test_garbage_is_a_manifest_error(data):
    assert isinstance(outcome(data), ManifestError)


@given(trees)
def test_any_json_is_a_manifest_or_a_manifest_error(tree):
    outcome(json.dumps(tree).encode())


@given(st.dictionaries(keys | st.integers(), trees | st.binary() | st.sets(st.integers()), max_size=4))
def test_any_dict_is_a_manifest_or_a_manifest_error(data):
    outcome(data)


@given(mutations({**PLAIN, "aliases": {"tied": "layer.w"}, "partial": True, "finite": False, "bucket_bytes": 4096}))
def test_one_wrong_value_is_a_manifest_error_or_another_manifest(tree):
    by_dict, by_json = outcome(tree), outcome(json.dumps(tree).encode())
    assert type(by_dict) is type(by_json)
    assert isinstance(by_dict, ManifestError) or by_dict == by_json


@given(st.binary(max_size=8), st.integers(0, 80))
def test_bytes_put_into_a_manifest_are_a_manifest_error_or_another_manifest(noise, place):
    data = json.dumps(PLAIN).encode()
    outcome(data[:place] + noise + data[place:])


@given(st.integers(0, 200))
def test_a_manifest_cut_short_is_refused(length):
    data = json.dumps(PLAIN).encode()
    assert isinstance(outcome(data[: length % len(data)]), ManifestError)


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"version":' * 100_000, b'{"tensors":' + b"[" * 100_000])
def test_deep_nesting_is_a_manifest_error(data):
    assert isinstance(outcome(data), ManifestError)


@given(
    st.integers(0, (1 << 63) - 1), st.lists(specs, min_size=1, max_size=6, unique_by=lambda spec: spec.name), st.data()
)
def test_a_manifest_survives_its_json(version, tensors, data):
    taken = {spec.name for spec in tensors}
    aliases = st.dictionaries(names.filter(lambda name: name not in taken), st.sampled_from(sorted(taken)), max_size=3)
    sent = Manifest(
        version=version,
        tensors=tuple(tensors),
        aliases=data.draw(aliases),
        partial=data.draw(st.booleans()),
        finite=data.draw(st.booleans()),
        bucket_bytes=data.draw(st.integers(4096, MAX_BUCKET_BYTES)),
    )
    assert decode_manifest(msgspec.json.encode(sent)) == sent
    assert decode_manifest(msgspec.to_builtins(sent)) == sent


def test_what_is_left_out_is_safe():
    manifest = decode_manifest(PLAIN)
    assert manifest.kind == "dense"
    assert not manifest.partial
    assert manifest.finite
    assert manifest.aliases == {}


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_a_dtype_takes_the_bytes_torch_says(name):
    assert getattr(torch, name).itemsize == DTYPES[name]


@given(st.lists(specs, min_size=1, max_size=6))
def test_bytes_are_those_of_the_tensors(tensors):
    expected = [torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta").nbytes for spec in tensors]
    assert [spec.nbytes for spec in tensors] == expected
    assert Manifest(version=1, tensors=tuple(tensors)).nbytes == sum(expected)


def tensors(*specs):
    return {"tensors": [W, *specs]}


@pytest.mark.parametrize(
    ("changes", "named", "reason"),
    [
        (tensors({"name": "odd", "dtype": "complex64", "shape": [1]}), "odd", "complex64"),
        (tensors({"name": "odd", "dtype": "torch.float32", "shape": [1]}), "odd", "torch.float32"),
        (tensors({"name": "vast", "dtype": "int8", "shape": [1 << 48, 2]}), "vast", "elements"),
        (tensors({"name": "vast", "dtype": "int8", "shape": [1 << 48] * 8}), "vast", "elements"),
        (tensors({"name": "layer.w", "dtype": "int8", "shape": [1]}), "layer.w", "twice"),
        ({"aliases": {"tied": "nobody"}}, "nobody", "alias 'tied'"),
        ({"aliases": {"layer.w": "layer.w"}}, "layer.w", "alias"),
        ({"aliases": {"a": "layer.w", "b": "a"}}, "a", "alias 'b'"),
    ],
)
def test_a_tensor_at_fault_is_named(changes, named, reason):
    with pytest.raises(ManifestError) as refusal:
        decode_manifest({**PLAIN, **changes})
    assert repr(named) in str(refusal.value)
    assert reason in str(refusal.value)


def test_the_first_tensor_at_fault_is_the_one_named():
    wrong = [{"name": name, "dtype": "complex64", "shape": []} for name in ("first", "second")]
    with pytest.raises(ManifestError, match="first") as refusal:
        decode_manifest({"version": 1, "tensors": [W, *wrong]})
    assert "second" not in str(refusal.value)


def test_an_unknown_dtype_is_told_which_are_known():
    with pytest.raises(ManifestError) as refusal:
        decode_manifest({"version": 1, "tensors": [{**W, "dtype": "fp8"}]})
    assert all(name in str(refusal.value) for name in DTYPES)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"version": -1}, "$.version"),
        ({"version": 1 << 63}, "$.version"),
        ({"version": 1.5}, "$.version"),
        ({"version": True}, "$.version"),
        ({"version": "1"}, "$.version"),
        ({"tensors": []}, "$.tensors"),
        ({"tensors": [{**W, "name": ""}]}, "$.tensors[0].name"),
        ({"tensors": [{**W, "name": "x" * 513}]}, "$.tensors[0].name"),
        ({"tensors": [{**W, "shape": [-1]}]}, "$.tensors[0].shape[0]"),
        ({"tensors": [{**W, "shape": [(1 << 48) + 1]}]}, "$.tensors[0].shape[0]"),
        ({"tensors": [{**W, "shape": [1] * 9}]}, "$.tensors[0].shape"),
        ({"tensors": [W, {"name": "v", "shape": [1]}]}, "$.tensors[1]"),
        ({"tensors": [{**W, "path": "/etc/passwd"}]}, "`path`"),
        ({"aliases": {"": "layer.w"}}, "$.aliases"),
        ({"kind": "pickle"}, "$.kind"),
        ({"bucket_bytes": 4095}, "$.bucket_bytes"),
        ({"bucket_bytes": MAX_BUCKET_BYTES + 1}, "$.bucket_bytes"),
        ({"partial": 1}, "$.partial"),
        ({"finite": None}, "$.finite"),
        ({"code": "import os"}, "`code`"),
    ],
)
def test_a_field_at_fault_is_named(changes, where):
    for data in ({**PLAIN, **changes}, json.dumps({**PLAIN, **changes}).encode()):
        with pytest.raises(ManifestError) as refusal:
            decode_manifest(data)
        assert where in str(refusal.value)


@pytest.mark.parametrize("missing", ["version", "tensors"])
def test_a_missing_field_is_named(missing):
    with pytest.raises(ManifestError, match=f"`{missing}`"):
        decode_manifest({key: value for key, value in PLAIN.items() if key != missing})


def test_a_manifest_made_in_python_is_checked_by_asking():
    twice = TensorSpec(name="w", dtype="int8", shape=(1,))
    with pytest.raises(ManifestError, match="'w'"):
        Manifest(version=1, tensors=(twice, twice)).check()


def test_an_older_engine_is_told_nothing_that_it_does_not_know() -> None:
    plain = msgspec.json.decode(msgspec.json.encode(Adapter(name="policy", config={})))
    assert plain == {"name": "policy", "config": {}}
    cast = Adapter(name="policy", config={}, cast="bfloat16")
    assert msgspec.json.decode(msgspec.json.encode(cast), type=Adapter) == cast


# So slowly that two threads are in the middle of it at once, if it is not done yet.
FIRST_OF_TWO = """
import threading, time, typing
from weightwire.updates.adapter import check_adapter
from weightwire.updates.manifest import TensorSpec, decode_manifest

known = typing._AnnotatedAlias.__hash__
typing._AnnotatedAlias.__hash__ = lambda self: (time.sleep(0.02), known(self))[1]
specs = [TensorSpec(name=f"q.lora_{which}.weight", dtype="float32", shape=(2, 2)) for which in "AB"]
data = b'{"version": 3, "tensors": [{"name": "w", "dtype": "float32", "shape": [2]}]}'
works = {"manifest": lambda: decode_manifest(data), "adapter": lambda: check_adapter(specs, {"r": 2, "lora_alpha": 4})}
threads = [threading.Thread(target=works[WHAT]) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("both")
"""


@pytest.mark.parametrize("what", ["manifest", "adapter"])
def test_two_threads_may_be_the_first_to_read_one(what: str) -> None:
    script = FIRST_OF_TWO.replace("WHAT", repr(what))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "both\n"), done.stderr
