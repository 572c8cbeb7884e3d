"""A LoRA adapter as data: PEFT's config as plain data, and whether tensors under PEFT's names are what it says.

An engine computes `W x + scale * B (A x)` and nothing else. What PEFT can do beyond that would be served as another
policy than the one that was trained, so it is refused by name.
"""

from __future__ import annotations

import enum
import math
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Annotated, Any, NamedTuple

import msgspec

from weightwire.errors import (
    ManifestError,
    MissingTensor,
    ShapeMismatch,
    UnknownTensor,
    UnsupportedError,
    UsageError,
)
from weightwire.updates.manifest import AdapterName, TensorSpec

__all__ = ["METADATA_KEY", "PREFIX", "check_adapter", "check_name", "plain_config"]

PREFIX = "base_model.model."
"""With what PEFT's saved names begin."""

METADATA_KEY = "adapter_config"
"""Where the metadata of a safetensors file or body has the adapter's config, as the text of adapter_config.json."""

_DTYPES = ("float16", "bfloat16", "float32")
_NAME = re.compile(re.escape(PREFIX) + r"(.+)\.lora_(?:(embedding_)([AB])|([AB])\.weight)")
# How the trainer's process runs it; says nothing of the adapter. `LoraConfig.to_dict` leaves it out, `asdict` does not.
_RUNTIME = "runtime_config"

_MERGE = "Merge it into the model and publish that as a dense update, or train a plain LoRA adapter."
_TRAIN = "Train a plain LoRA adapter."
_VARIANTS: dict[str, tuple[str, str]] = {
    "use_dora": ("DoRA", _MERGE),
    "modules_to_save": ("whole modules trained beside the adapter", _MERGE),
    "lora_bias": ("biases", _MERGE),
    "layer_replication": ("replicated layers", _TRAIN),
    "alora_invocation_tokens": ("activated LoRA", _TRAIN),
    "use_qalora": ("QA-LoRA", _TRAIN),
    "use_bdlora": ("block-diagonal LoRA", _TRAIN),
    "trainable_token_indices": ("trained tokens", _MERGE),
    "target_parameters": ("LoRA on bare parameters", _MERGE),
    "arrow_config": ("Arrow routing", _TRAIN),
    "kasa_config": ("KaSA, which changes the base model's weights", _TRAIN),
    "monteclora_config": ("MonteCLoRA", _TRAIN),
    "velora_config": ("VeLoRA", _TRAIN),
}
"""What is more than a plain LoRA adapter, by the key of the config that turns it on."""

# Ways to begin that change the base model's weights. PEFT looks for some as prefixes, for some in lower case.
_CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


def plain_config(config: Any) -> dict[str, Any]:
    """An adapter's config as JSON-able data: of a `peft.LoraConfig`, a mapping, or the text of an adapter_config.json.

    Sets become sorted lists, enums their values. What concerns PEFT at runtime only is dropped. `UsageError` for
    anything else, and for what JSON has no way to write.

    >>> plain_config({"r": 8, "target_modules": {"v_proj", "q_proj"}, "runtime_config": object()})
    {'r': 8, 'target_modules': ['q_proj', 'v_proj']}
    >>> plain_config('{"r": 8, "lora_alpha": 16}')
    {'r': 8, 'lora_alpha': 16}
    """
    data = _as_mapping(config)
    try:
        plain = {_key(k, "$"): _plain(v, f"$.{k}") for k, v in data.items() if k != _RUNTIME}
        # Finds what only looks like text: half of a surrogate pair.
        msgspec.json.encode(plain)
    # A TypeError is of a set whose members cannot be sorted.
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"the adapter's config is not JSON-able: {error}", next_step=_PLAIN_STEP) from error
    return plain


def check_name(name: str) -> str:
    """The name that an adapter is to be served under, or a `UsageError`.

    >>> check_name("policy")
    'policy'
    """
    try:
        return msgspec.convert(name, AdapterName)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"an adapter cannot be called {name[:64]!r}",
            next_step="Take letters, digits, dots, dashes and underscores, 128 at most.",
        ) from error


def check_adapter(specs: Sequence[TensorSpec], config: Mapping[str, Any]) -> dict[str, int]:
    """Each module that the adapter is for, by its name without `base_model.model.`, with its rank.

    `specs` must be pairs under PEFT's saved names: for a linear module `<module>.lora_A.weight` of shape (rank, in) and
    `<module>.lora_B.weight` of shape (out, rank), for an embedding `<module>.lora_embedding_A` of shape (rank, vocab)
    and `<module>.lora_embedding_B` of shape (dim, rank). Raises `MissingTensor` for half a pair, `ShapeMismatch` where
    shapes are not those, or not of the rank that the config gives the module, `UnknownTensor` for other names and for
    modules that the config does not target, `UnsupportedError` for what is more than a plain LoRA adapter, and
    `ManifestError` for anything else that is wrong. `config` may be any data; nothing else is raised.

    >>> a = TensorSpec(name="base_model.model.layers.0.q_proj.lora_A.weight", dtype="bfloat16", shape=(8, 64))
    >>> b = TensorSpec(name="base_model.model.layers.0.q_proj.lora_B.weight", dtype="bfloat16", shape=(64, 8))
    >>> check_adapter([a, b], {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]})
    {'layers.0.q_proj': 8}
    >>> check_adapter([a], {"r": 8, "lora_alpha": 16})
    Traceback (most recent call last):
        ...
    weightwire.errors.MissingTensor: 'base_model.model.layers.0.q_proj.lora_B.weight' is missing. Send both ...
    """
    rules = _Rules(config)
    ranks: dict[str, int] = {}
    for pair in _pairs(specs):
        if pair.module in ranks:
            raise ManifestError(f"{pair.module!r} is adapted both as a linear module and as an embedding")
        if not rules.targets(pair.module):
            raise UnknownTensor(
                f"{pair.a.name!r} is for a module that the config's target_modules do not name: "
                f"{_said(config['target_modules'])}",
                next_step="Send the config with which this adapter was made.",
            )
        ranks[pair.module] = _checked_rank(pair, rules.rank(pair.module))
    if not ranks:
        raise ManifestError("the adapter has no tensors", next_step="Send its lora_A and lora_B tensors.")
    return ranks


# -- the config --------------------------------------------------------------------------------------------------------

_PLAIN_STEP = "Pass a peft.LoraConfig, a mapping of plain values, or the text of an adapter_config.json."


def _as_mapping(config: Any) -> Mapping[Any, Any]:
    if isinstance(config, str | bytes | bytearray | memoryview):
        try:
            return msgspec.json.decode(config, type=dict[str, Any])
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise UsageError(f"the adapter's config is no JSON object: {error}", next_step=_PLAIN_STEP) from error
    if not isinstance(config, type) and callable(getattr(config, "to_dict", None)):
        config = config.to_dict()
    if isinstance(config, Mapping):
        return config
    raise UsageError(f"{type(config).__name__} is no config of an adapter", next_step=_PLAIN_STEP)


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, enum.Enum):
        value = value.value
    # JSON has no bounds, but what reads it has.
    if value is None or isinstance(value, str) or (isinstance(value, int) and -(1 << 63) <= value < 1 << 63):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, Mapping):
        return {_key(key, where): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{number}]") for number, item in enumerate(value)]
    if isinstance(value, AbstractSet):
        return sorted(_plain(item, f"{where}[...]") for item in value)
    raise ValueError(f"{where} is {_said(value)}")


def _key(key: Any, where: str) -> str:
    key = key.value if isinstance(key, enum.Enum) else key
    if not isinstance(key, str):
        raise ValueError(f"{where} has the key {_said(key)}, which is no str")
    return key


class _Settings(msgspec.Struct, frozen=True):
    """What of PEFT's config says how tensors are to be understood; the rest is not looked at."""

    r: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    lora_alpha: float
    peft_type: str | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_modules: list[str] | str | None = None
    bias: str | None = None


msgspec.json.Decoder(_Settings)  # for what it makes ready, as in `manifest`


class _Rules:
    """PEFT's own rules, of one config: which modules are targeted, and with what rank."""

    def __init__(self, config: Any) -> None:
        settings = _settings(config)
        self._rank = settings.r
        # As `peft.utils.other.get_pattern_key`: whichever comes first wins.
        self._ranks = [
            (_pattern(key, "rank_pattern", r"(.*\.)?({})$"), rank)
            for key, rank in (settings.rank_pattern or {}).items()
        ]
        for key in settings.alpha_pattern or {}:
            _pattern(key, "alpha_pattern", r"(.*\.)?({})$")
        self._targets: re.Pattern[str] | tuple[str, ...] | None = None
        if isinstance(settings.target_modules, list):
            self._targets = tuple(f".{target}" for target in settings.target_modules)
        elif settings.target_modules is not None and settings.target_modules.lower() != "all-linear":
            self._targets = _pattern(settings.target_modules, "target_modules")

    def targets(self, module: str) -> bool:
        """As `peft.tuners.tuners_utils.check_target_module_exists`."""
        if isinstance(self._targets, re.Pattern):
            return self._targets.fullmatch(module) is not None
        return self._targets is None or f".{module}".endswith(self._targets)

    def rank(self, module: str) -> int:
        return next((rank for pattern, rank in self._ranks if pattern.match(module)), self._rank)


def _settings(config: Any) -> _Settings:
    if not isinstance(config, Mapping):
        raise ManifestError(f"an adapter's config must be an object, not {type(config).__name__}")
    try:
        # Its key alone: nothing else of a config may be what makes it unreadable.
        settings = msgspec.convert(
            {key: config[key] for key in _Settings.__struct_fields__ if key in config}, _Settings
        )
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ManifestError(
            f"not the config of a LoRA adapter: {error}", next_step="Send PEFT's adapter_config.json as it is."
        ) from error
    if settings.peft_type not in (None, "LORA"):
        raise ManifestError(f"peft_type is {_said(settings.peft_type)}", next_step="Only LoRA adapters can be sent.")
    for alpha in (settings.lora_alpha, *(settings.alpha_pattern or {}).values()):
        if not math.isfinite(alpha):
            raise ManifestError(f"lora_alpha or one of alpha_pattern is {alpha}", next_step="It must be finite.")
    _refuse_variants(config, settings)
    return settings


def _refuse_variants(config: Mapping[str, Any], settings: _Settings) -> None:
    for key, (what, next_step) in _VARIANTS.items():
        # As PEFT does, which takes whatever is true for a yes.
        if config.get(key):
            raise _unsupported(what, f"{key} is {_said(config[key])}", next_step)
    if settings.bias not in (None, "none"):
        raise _unsupported("biases", f"bias is {_said(settings.bias)}", _MERGE)
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_CHANGED_BASES):
        raise _unsupported(
            "an adapter to other base weights than the engine has",
            f"init_lora_weights is {_said(begun)}, which changed them before training began",
            "Convert it with save_pretrained(..., path_initial_model_for_weight_conversion=...) and send that folder, "
            "or merge it and publish a dense update.",
        )


def _pattern(pattern: str, where: str, within: str = "{}") -> re.Pattern[str]:
    try:
        return re.compile(within.format(pattern))
    # Beside its own errors, `re` lets through those of numbers too large and of nesting too deep, and its warnings.
    except Exception as error:
        raise ManifestError(
            f"{where} has {_said(pattern)}, which is no regular expression: {error}",
            next_step="Send PEFT's adapter_config.json as it is.",
        ) from error


# -- the tensors -------------------------------------------------------------------------------------------------------


class _Pair(NamedTuple):
    module: str
    a: TensorSpec
    b: TensorSpec


def _pairs(specs: Sequence[TensorSpec]) -> Iterator[_Pair]:
    halves: dict[tuple[str, str], dict[str, TensorSpec]] = {}
    for spec in specs:
        found = _NAME.fullmatch(spec.name)
        if found is None:
            raise _no_lora_tensor(spec.name)
        module, embedding, side = found[1], found[2] or "", found[3] or found[4]
        pair = halves.setdefault((module, embedding), {})
        if side in pair:
            raise ManifestError(f"{spec.name!r} is listed twice", next_step="List every tensor once.")
        pair[side] = spec
    for (module, embedding), pair in halves.items():
        for side in "AB":
            if side not in pair:
                name = f"{PREFIX}{module}.lora_{embedding}{side}{'' if embedding else '.weight'}"
                raise MissingTensor(f"{name!r} is missing", next_step="Send both halves of every pair.")
        yield _Pair(module, pair["A"], pair["B"])


def _checked_rank(pair: _Pair, rank: int) -> int:
    for spec in (pair.a, pair.b):
        if spec.dtype not in _DTYPES:
            raise ManifestError(
                f"{spec.name!r} has dtype {_said(spec.dtype)}", next_step=f"Send one of {', '.join(_DTYPES)}."
            )
        if len(spec.shape) != 2 or not all(spec.shape):
            raise ShapeMismatch(f"{spec.name!r} has shape {spec.shape}; it must be two numbers, neither of them 0")
    if pair.a.shape[0] != pair.b.shape[1]:
        raise ShapeMismatch(
            f"{pair.a.name!r} of shape {pair.a.shape} has rank {pair.a.shape[0]}, but "
            f"{pair.b.name!r} of shape {pair.b.shape} has rank {pair.b.shape[1]}",
            next_step="A must be (rank, in) and B (out, rank).",
        )
    if pair.a.shape[0] != rank:
        raise ShapeMismatch(
            f"{pair.a.name!r} of shape {pair.a.shape} has rank {pair.a.shape[0]}, and the config says {rank}",
            next_step="Send the config with which this adapter was made.",
        )
    return rank


def _no_lora_tensor(name: str) -> ManifestError | UnsupportedError:
    if ".lora_magnitude_vector" in name:
        return _unsupported("DoRA", f"there is {name!r}", _MERGE)
    if ".modules_to_save." in name:
        return _unsupported(_VARIANTS["modules_to_save"][0], f"there is {name!r}", _MERGE)
    if name.endswith(".bias"):
        return _unsupported("biases", f"there is {name!r}", _MERGE)
    next_step = f"An adapter's are {PREFIX}<module>.lora_A.weight and .lora_B.weight, as PEFT saves them."
    if name.endswith(".base_layer.weight"):
        next_step = "It is the base model's: save with save_pretrained(..., save_embedding_layers=False)."
    return UnknownTensor(f"{name!r} is no tensor of a LoRA adapter", next_step=next_step)


def _unsupported(what: str, found: str, next_step: str) -> UnsupportedError:
    return UnsupportedError(f"no engine can be given {what} exactly ({found})", next_step=next_step)


def _said(value: Any) -> str:
    """What a value is, in a few words whatever it is."""
    try:
        return reprlib.repr(value)
    except Exception:  # such as of an integer with too many digits
        return f"a {type(value).__name__}"
