import dataclasses
import enum
import json
import math
import types

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightwire.errors import (
    ManifestError,
    MissingTensor,
    ShapeMismatch,
    UnknownTensor,
    UnsupportedError,
    UsageError,
    WeightwireError,
)
from weightwire.updates.adapter import PREFIX, check_adapter, plain_config
from weightwire.updates.manifest import TensorSpec

PLAIN = {"r": 4, "lora_alpha": 8}
Q, EMBED = "model.layers.0.self_attn.q_proj", "model.embed_tokens"


def spec(name, *shape, dtype="float32"):
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def linear(module=Q, rank=4, **more):
    a, b = f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"
    return [spec(a, rank, 16, **more), spec(b, 32, rank, **more)]


def embedding(module=EMBED, rank=4):
    a, b = f"{PREFIX}{module}.lora_embedding_A", f"{PREFIX}{module}.lora_embedding_B"
    return [spec(a, rank, 64), spec(b, 16, rank)]


# -- plain data --------------------------------------------------------------------------------------------------------


def test_a_lora_config_becomes_what_its_file_says(tmp_path):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["v_proj", "q_proj"],
        exclude_modules=["lm_head"],
        rank_pattern={"q_proj": 8},
        use_rslora=True,
        task_type="CAUSAL_LM",
    )
    plain = plain_config(config)
    assert plain["target_modules"] == ["q_proj", "v_proj"]
    assert type(plain["peft_type"]) is type(plain["task_type"]) is str
    assert plain["layers_to_transform"] is None
    assert json.loads(json.dumps(plain)) == plain

    config.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    for read in (plain_config(text), plain_config(text.encode()), plain_config(json.loads(text))):
        read["target_modules"].sort()
        assert read == plain


def test_what_peft_itself_drops_is_dropped():
    config = peft.LoraConfig(r=4)
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    assert "runtime_config" in fields
    assert plain_config(fields) == plain_config(config)


def test_plain_data_stays_as_it_is():
    class Kind(enum.StrEnum):
        LORA = "LORA"

    given = {"a": None, "b": True, "c": 3, "d": 0.5, "e": [1, {"f": []}]}
    assert plain_config(given) == given
    assert plain_config(types.MappingProxyType(given)) == given
    assert plain_config({Kind.LORA: (Kind.LORA, {10, 9}, frozenset())}) == {"LORA": ["LORA", [9, 10], []]}


LOOP = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "NoneType is no config"),
        (3, "int is no config"),
        ([("r", 8)], "list is no config"),
        (peft.LoraConfig, "type is no config"),
        ("r: 8", "is no JSON object"),
        ("[]", "is no JSON object"),
        (b"\xff", "is no JSON object"),
        ('{"lora_alpha": NaN}', "is no JSON object"),
        ("[" * 100_000, "is no JSON object"),
        ({"r": object()}, r"not JSON-able: \$\.r is <object"),
        ({"a": [{"b": b"bytes"}]}, r"\$\.a\[0\]\.b is b'bytes'"),
        ({"lora_alpha": math.nan}, r"\$\.lora_alpha is nan"),
        ({"lora_alpha": math.inf}, r"\$\.lora_alpha is inf"),
        ({3: 4}, "has the key 3, which is no str"),
        ({"a": {None: 4}}, r"\$\.a has the key None"),
        ({10**5000: 4}, "has the key a int"),
        ({"a": {1, "b"}}, "not JSON-able"),
        ({"a": LOOP}, "not JSON-able"),
        ({"a": 1 << 64}, "not JSON-able"),
        ({"a": "\ud800"}, "not JSON-able"),
    ],
)
def test_what_is_no_config_is_a_usage_error(config, said):
    with pytest.raises(UsageError, match=said) as refusal:
        plain_config(config)
    assert "Pass a peft.LoraConfig" in str(refusal.value)


# -- what is an adapter ------------------------------------------------------------------------------------------------


def test_modules_and_their_ranks():
    specs = [*linear(), *embedding(), *linear("model.layers.1.mlp.up_proj", dtype="bfloat16")]
    ranks = check_adapter(specs, PLAIN)
    assert ranks == {Q: 4, EMBED: 4, "model.layers.1.mlp.up_proj": 4}
    # In whatever order they come.
    assert check_adapter(specs[::-1], PLAIN) == ranks


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 0.5},
        {"lora_alpha": -8},
        {"use_rslora": True, "fan_in_fan_out": True, "peft_type": "LORA"},
        {"peft_type": None, "rank_pattern": None, "alpha_pattern": {"q_proj": 3}, "target_modules": None},
        {"bias": "none", "modules_to_save": None, "layer_replication": [], "use_dora": False, "use_bdlora": None},
        {"init_lora_weights": True, "exclude_modules": "anything"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "future_key": {"of": ["any", "kind"]}, 3: 4, "\ud800": "\ud800"},
    ],
)
def test_configs_that_change_nothing_of_this(config):
    assert check_adapter(linear(), PLAIN | config) == {Q: 4}


@pytest.mark.parametrize(
    ("pattern", "rank"),
    [
        ({"q_proj": 8}, 8),
        ({"self_attn.q_proj": 8}, 8),
        ({Q: 8}, 8),
        ({f"^{Q}": 8}, 4),
        ({r".*\.0\.self_attn\.[qk]_proj": 8}, 8),
        ({"proj": 8, "k_proj": 8, "q_pro": 8, "_proj": 8, "model": 8}, 4),
        ({"q_proj": 2, Q: 8}, 2),
        ({}, 4),
    ],
)
def test_a_rank_pattern_matches_as_peft_does(pattern, rank):
    from peft.utils.other import get_pattern_key

    assert pattern.get(get_pattern_key(pattern, Q), 4) == (8 if f"^{Q}" in pattern else rank)
    if f"^{Q}" in pattern:
        rank = 8
    assert check_adapter(linear(rank=rank), PLAIN | {"rank_pattern": pattern}) == {Q: rank}
    with pytest.raises(ShapeMismatch, match=f"has rank 3, and the config says {rank}"):
        check_adapter(linear(rank=3), PLAIN | {"rank_pattern": pattern})


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj"],
        ["k_proj", "self_attn.q_proj"],
        [Q],
        ["proj"],
        ["0"],
        [f"x.{Q}"],
        [],
        "all-linear",
        "All-Linear",
        r".*\.q_proj",
        "q_proj",
        ".*layers.*",
        r".*layers\.1.*",
    ],
)
def test_targets_are_those_of_peft(targets):
    from peft.tuners.tuners_utils import check_target_module_exists

    every = isinstance(targets, str) and targets.lower() == "all-linear"
    config = peft.LoraConfig(target_modules=targets)
    if every or check_target_module_exists(config, Q):
        assert check_adapter(linear(), PLAIN | {"target_modules": targets}) == {Q: 4}
    else:
        with pytest.raises(UnknownTensor, match=rf"'{PREFIX}{Q}.lora_A.weight' is for a module that .*target_modules"):
            check_adapter(linear(), PLAIN | {"target_modules": targets})


# -- what is none ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("specs", "missing"),
    [
        (linear()[:1], f"{PREFIX}{Q}.lora_B.weight"),
        (linear()[1:], f"{PREFIX}{Q}.lora_A.weight"),
        (linear() + embedding()[:1], f"{PREFIX}{EMBED}.lora_embedding_B"),
        (embedding()[1:], f"{PREFIX}{EMBED}.lora_embedding_A"),
        (linear()[:1] + embedding(Q)[1:], f"{PREFIX}{Q}.lora_B.weight"),
    ],
)
def test_half_a_pair_is_named(specs, missing):
    with pytest.raises(MissingTensor, match=rf"^{missing!r} is missing"):
        check_adapter(specs, PLAIN)


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ((4, 16), (32, 5), r"lora_A.weight' of shape \(4, 16\) has rank 4, but .* of shape \(32, 5\) has rank 5"),
        ((8, 16), (32, 8), r"has rank 8, and the config says 4"),
        ((4, 16, 1), (32, 4), r"lora_A.weight' has shape \(4, 16, 1\)"),
        ((4, 16), (32,), r"lora_B.weight' has shape \(32,\)"),
        ((4, 0), (32, 4), r"neither of them 0"),
        ((4, 16), (0, 4), r"neither of them 0"),
        ((0, 16), (32, 0), r"neither of them 0"),
        ((), (32, 4), r"has shape \(\)"),
    ],
)
def test_shapes_that_do_not_fit(a, b, said):
    first, second = linear()
    with pytest.raises(ShapeMismatch, match=said):
        check_adapter([spec(first.name, *a), spec(second.name, *b)], PLAIN)


@pytest.mark.parametrize(
    "name",
    [
        "model.q_proj.lora_A.weight",
        f"{PREFIX}lora_A.weight",
        f"{PREFIX}{Q}.lora_A",
        f"{PREFIX}{Q}.lora_A.default.weight",
        f"{PREFIX}{Q}.lora_embedding_A.weight",
        f"{PREFIX}{Q}.lora_E",
        f"{PREFIX}{Q}.lora_C.weight",
        f"{PREFIX}{Q}.weight",
        f"{PREFIX}{Q}.lora_A.weight\n",
    ],
)
def test_other_names_are_unknown(name):
    with pytest.raises(UnknownTensor, match=r"is no tensor of a LoRA adapter.*as PEFT saves them"):
        check_adapter([*linear(), spec(name, 4, 16)], PLAIN)


def test_a_copy_of_the_base_model_is_told_how_to_leave_it_out():
    with pytest.raises(UnknownTensor, match="save_embedding_layers=False"):
        check_adapter([*embedding(), spec(f"{PREFIX}{EMBED}.base_layer.weight", 64, 16)], PLAIN)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (f"{PREFIX}{Q}.lora_magnitude_vector", "DoRA"),
        (f"{PREFIX}{Q}.lora_magnitude_vector.weight", "DoRA"),
        (f"{PREFIX}lm_head.modules_to_save.weight", "whole modules"),
        (f"{PREFIX}{Q}.lora_B.bias", "biases"),
        (f"{PREFIX}{Q}.base_layer.bias", "biases"),
    ],
)
def test_tensors_that_are_more_than_lora_are_refused_by_name(name, what):
    with pytest.raises(UnsupportedError, match=rf"{what}.* exactly \(there is '{name}'\)\. Merge it"):
        check_adapter([*linear(), spec(name, 32)], PLAIN)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"bias": "all"}, "biases"),
        ({"bias": "lora_only"}, "biases"),
        ({"lora_bias": True}, "biases"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "replicated layers"),
        ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "block-diagonal LoRA"),
        ({"trainable_token_indices": [5]}, "trained tokens"),
        ({"target_parameters": ["experts.down_proj"]}, "bare parameters"),
        ({"arrow_config": {"top_k": 3}}, "Arrow"),
        ({"kasa_config": {"beta": 0.1}}, "KaSA"),
        ({"monteclora_config": {"num_samples": 8}}, "MonteCLoRA"),
        ({"velora_config": {"scale": 1.0}}, "VeLoRA"),
        *(
            ({"init_lora_weights": name}, "other base weights")
            for name in ("pissa", "PiSSA", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga")
        ),
    ],
)
def test_configs_that_are_more_than_lora_are_refused_by_name(config, what):
    with pytest.raises(UnsupportedError, match=what) as refusal:
        check_adapter(linear(), PLAIN | config)
    assert next(iter(config)) in str(refusal.value)
    assert refusal.value.next_step


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"r": 0}, r"\$\.r"),
        ({"r": -1}, r"\$\.r"),
        ({"r": True}, r"\$\.r"),
        ({"r": "4"}, r"\$\.r"),
        ({"r": 4.0}, r"\$\.r"),
        ({"r": None}, r"\$\.r"),
        ({"r": 10**5000}, r"\$\.r"),
        ({"lora_alpha": True}, r"\$\.lora_alpha"),
        ({"lora_alpha": "8"}, r"\$\.lora_alpha"),
        ({"lora_alpha": None}, r"\$\.lora_alpha"),
        ({"lora_alpha": math.nan}, "finite"),
        ({"lora_alpha": -math.inf}, "finite"),
        ({"lora_alpha": 10**400}, r"\$\.lora_alpha"),
        ({"use_rslora": 1}, r"\$\.use_rslora"),
        ({"use_rslora": None}, r"\$\.use_rslora"),
        ({"rank_pattern": ["q_proj"]}, r"\$\.rank_pattern"),
        ({"rank_pattern": {"q_proj": 0}}, r"\$\.rank_pattern"),
        ({"rank_pattern": {"q_proj": True}}, r"\$\.rank_pattern"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern has '\(', which is no regular expression"),
        ({"rank_pattern": {"a{99999999999}": 4}}, "rank_pattern has"),
        ({"rank_pattern": {"(" * 5000 + ")" * 5000: 4}}, "rank_pattern has"),
        ({"rank_pattern": {"(?i)q_proj": 4}}, "rank_pattern has"),
        ({"alpha_pattern": {"[": 4}}, "alpha_pattern has"),
        ({"alpha_pattern": {"q_proj": "4"}}, r"\$\.alpha_pattern"),
        ({"alpha_pattern": {"q_proj": math.inf}}, "finite"),
        ({"target_modules": 3}, r"\$\.target_modules"),
        ({"target_modules": [3]}, r"\$\.target_modules"),
        ({"target_modules": {"q_proj": 1}}, r"\$\.target_modules"),
        ({"target_modules": "*"}, r"target_modules has '\*'"),
        ({"bias": 3}, r"\$\.bias"),
        ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA'"),
        ({"peft_type": 3}, r"\$\.peft_type"),
        ({"peft_type": "\ud800"}, "peft_type"),
    ],
)
def test_a_config_at_fault_is_told_where(config, said):
    with pytest.raises(ManifestError, match=said):
        check_adapter(linear(), PLAIN | config)


@pytest.mark.parametrize("missing", ["r", "lora_alpha"])
def test_what_a_config_lacks_is_named(missing):
    with pytest.raises(ManifestError, match=f"missing required field `{missing}`"):
        check_adapter(linear(), {key: value for key, value in PLAIN.items() if key != missing})


@pytest.mark.parametrize("config", [None, [], "r", 3])
def test_a_config_must_be_an_object(config):
    with pytest.raises(ManifestError, match="must be an object"):
        check_adapter(linear(), config)


@pytest.mark.parametrize("dtype", ["float64", "int8", "float8_e4m3fn", "bool", "complex64", ""])
def test_only_dtypes_that_engines_compute_in(dtype):
    with pytest.raises(ManifestError, match=f"lora_A.weight' has dtype '{dtype}'.*bfloat16"):
        check_adapter(linear(dtype=dtype), PLAIN)


def test_no_tensors_are_no_adapter():
    with pytest.raises(ManifestError, match="has no tensors"):
        check_adapter([], PLAIN)


def test_a_tensor_listed_twice():
    with pytest.raises(ManifestError, match="is listed twice"):
        check_adapter([*linear(), linear()[0]], PLAIN)


def test_a_module_is_of_one_kind():
    with pytest.raises(ManifestError, match="both as a linear module and as an embedding"):
        check_adapter(linear() + embedding(Q), PLAIN)


# -- anything ----------------------------------------------------------------------------------------------------------

KEYS = ["r", "lora_alpha", "peft_type", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "bias"]
KEYS += ["use_dora", "modules_to_save", "init_lora_weights", "layer_replication"]
texts = (
    st.text(max_size=8) | st.text(st.characters(codec=None), max_size=4) | st.text("()[]{}?*+.^$\\|aq1,", max_size=8)
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | texts
    | st.sampled_from([1 << 64, 10**400, "LORA", "q_proj"])
)
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)
modules = st.sampled_from([Q, EMBED, "q_proj", "a"]) | texts
endings = st.sampled_from(
    [".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B", ".lora_magnitude_vector", ".bias"]
)
some_specs = st.lists(
    st.builds(
        TensorSpec,
        name=st.builds(lambda module, ending: PREFIX + module + ending, modules, endings) | texts,
        dtype=st.sampled_from(["float32", "bfloat16"]) | texts,
        shape=st.lists(st.integers(0, 5), max_size=3).map(tuple) | st.just((4, 4)),
    ),
    max_size=5,
)


def outcome(specs, config):
    try:
        ranks = check_adapter(specs, config)
    except WeightwireError as error:
        str(error)
        return
    assert ranks
    assert len(ranks) * 2 == len(specs)


@given(
    st.just([*linear(), *embedding()]) | some_specs, st.dictionaries(st.sampled_from(KEYS) | texts, trees, max_size=6)
)
def test_whatever_comes_is_an_adapter_or_one_of_our_errors(specs, config):
    outcome(specs, config)
    outcome(specs, PLAIN | config)


@given(st.just([*linear(), *embedding()]) | some_specs, trees)
def test_whatever_comes_as_a_config_is_one_or_one_of_our_errors(specs, config):
    outcome(specs, config)
    try:
        plain = plain_config(config)
    except WeightwireError:
        return
    assert plain_config(json.dumps(plain)) == plain
