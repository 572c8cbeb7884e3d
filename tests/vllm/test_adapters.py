"""Adapters from memory in real engines: bit for bit what vLLM makes of the same adapter in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import run_script
from support.adapter_deltas import check_failures, check_twins

ENGINES = {
    # What each engine is, and which steps of adapters.py it goes through.
    "qwen3-float32-tp1": ("qwen3", "float32", 1, "variants,traps,hundred,refusals,deltas"),
    "llama-bfloat16-tp1": ("llama", "bfloat16", 1, "variants,deltas,failures"),
    "qwen3-bfloat16-tp2": ("qwen3", "bfloat16", 2, "variants,hundred,deltas,failures"),
    "llama-float32-tp2": ("llama", "float32", 2, "variants,traps,refusals"),
}
_NOT_VARIANTS = ("base", "base again")


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    family, dtype, tensor_parallel, steps = ENGINES[request.param]
    folder: Path = tmp_path_factory.mktemp("adapters")
    results = run_script("adapters.py", family, dtype, tensor_parallel, steps, folder, folder=folder, seconds=840)
    return {**results, "ranks": tensor_parallel}


def through(step: str) -> pytest.MarkDecorator:
    """With every engine that goes through a step."""
    engines = [
        pytest.param(name, marks=pytest.mark.xdist_group(f"adapters {name}"))
        for name, (*_, steps) in ENGINES.items()
        if step in steps.split(",")
    ]
    return pytest.mark.parametrize("found", engines, indirect=True)


@through("variants")
def test_each_kind_of_adapter_equals_its_twin_from_a_folder(found: dict[str, Any]) -> None:
    results = found["variants"]
    assert results["base"] == results["base again"]
    kinds = {name: result for name, result in results.items() if name not in _NOT_VARIANTS}
    assert len(kinds) == 8
    for name, result in kinds.items():
        assert result["ours"] == result["twin"], name
        assert result["ours"] != results["base"], name
    assert len({str(result["ours"]) for result in kinds.values()}) == len(kinds)


@through("variants")
def test_the_receipt_names_every_module_and_what_each_rank_holds(found: dict[str, Any]) -> None:
    results = found["variants"]
    attention = {f"model.layers.{n}.self_attn.{part}" for n in (0, 1) for part in ("qkv_proj", "o_proj")}
    mlp = {f"model.layers.{n}.mlp.{part}" for n in (0, 1) for part in ("gate_up_proj", "down_proj")}
    bound = {"r8 alpha 24": attention | mlp, "attention": attention, "mlp": mlp}
    for name, modules in bound.items():
        assert results[name]["proven"] == dict.fromkeys(modules, "read back")
    for name, result in results.items():
        if name not in _NOT_VARIANTS:
            assert len(result["held"]) == found["ranks"]
            assert all(len(digest) == 32 and int(digest, 16) for digest in result["held"])
    assert results["r1"]["adapter"] == "kinds@100"


@through("traps")
def test_a_revision_is_loaded_once_however_much_is_generated(found: dict[str, Any]) -> None:
    results = found["traps"]
    assert results["loads"] == [1] * found["ranks"]


@through("traps")
def test_a_long_prompt_cached_under_one_revision_is_not_used_under_the_next(found: dict[str, Any]) -> None:
    results = found["traps"]
    for version in ("long 7", "long 8"):
        first, again = results[version]["ours"]
        assert first == again == results[version]["twin"]
        cached, cached_again = results[version]["cached"]
        assert cached == 0
        assert cached_again > 0  # or there was nothing to be wrong about
    assert results["long 7"]["ours"] != results["long 8"]["ours"]


@through("traps")
def test_evicted_revisions_come_back_from_memory_unchanged(found: dict[str, Any]) -> None:
    results = found["traps"]
    assert results["evicted"] == [True] * 3
    assert all(loads > 1 for loads in results["loads after eviction"])  # or nothing was evicted


@through("traps")
def test_a_dense_update_of_the_base_leaves_every_revision_servable(found: dict[str, Any]) -> None:
    results = found["traps"]
    for ours, twin, before in results["under the new base"]:
        assert ours == twin
        assert ours != before
    assert results["under the old base"] == [True] * 3


@through("hundred")
def test_a_hundred_versions_neither_drift_nor_take_memory(found: dict[str, Any]) -> None:
    results = found["hundred"]
    assert results["unequal"] == []
    for tenth, last in zip(*results["memory"].values(), strict=True):
        assert last < tenth * 1.02, (tenth, last)
    names = [each["name"] for (listed,) in [results["listed"]] for each in listed]
    for held, cached, patterned in results["held"]:
        assert patterned == 1
        # Three that can be had of each name, and one that was retired by the last.
        assert held <= 4 * len(names)
        assert cached <= 4  # `max_cpu_loras`


@through("deltas")
def test_deltas_of_an_adapter_equal_their_twins_from_a_folder(found: dict[str, Any]) -> None:
    check_twins(found["deltas"])


@through("deltas")
def test_a_delta_that_one_rank_fails_to_take_changes_nothing(found: dict[str, Any]) -> None:
    check_failures(found["deltas"])


@through("deltas")
def test_an_engine_that_holds_the_base_no_more_refuses_by_name_and_gets_everything(found: dict[str, Any]) -> None:
    results = found["deltas"]
    assert "version 6 of adapter 'steps', from which the delta starts, is not held here: " in results["refused"]
    assert results["other base"]["why"].startswith("whole: the delta was refused: ")
    assert results["other base"]["nbytes"] == results["steps"][0]["nbytes"]


@through("failures")
def test_all_ranks_of_all_engines_take_an_adapter_or_none(found: dict[str, Any]) -> None:
    results = found["failures"]
    for at in ("arrival", "seal", "check", "commit"):
        assert "injected" in results[at]["error"], at
        assert results[at]["same"], at
        assert (results[at]["here"], results[at]["other"]) == ([7], [7]), at
    assert results["after"] == [True, True]


@pytest.mark.parametrize(
    ("case", "said"),
    {
        "rank": "UnsupportedError: .*rank 32, and the engine takes at most 16.*--max-lora-rank 32",
        "module": "UnknownTensor: .*no module model.layers.9.*",
        "A without B": "MissingTensor: .*q_proj.lora_B",
        "shapes": "ShapeMismatch: .*(8, 64).*goes from 128 to 128",
        "NaN": "NonFinite: .*q_proj.lora_A",
        "contradiction": "ShapeMismatch: .*has rank 8, and the config says 4",
        "DoRA": "UnsupportedError: .*DoRA",
        "no modules": "ManifestError: .*no tensors",
    }.items(),
)
@through("refusals")
def test_what_does_not_fit_is_refused_and_the_old_revision_serves(found: dict[str, Any], case: str, said: str) -> None:
    import re

    results = found["refusals"]
    assert re.match(said.replace("(8, 64)", r"\(8, 64\)"), results[case]), results[case]
    assert results["same"]
    (listed,) = results["listed"]
    assert {"name": "careful", "version": 7, "versions": [7]} in listed
