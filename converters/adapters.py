"""PEFT's LoRA adapters: what their two files say, checked.

`adapter_config.json` tells ranks and scales, `adapter_model.safetensors` (or `.bin`) holds, under ``base_model.model.<module>``,
pairs `lora_A.weight` [rank, d_in] and `lora_B.weight` [d_out, rank], for an embedding `lora_embedding_A` [rank, vocab] and
`lora_embedding_B` [embed, rank], and whole parameters that were trained beside them. A pair adds ``scale * B @ A`` to its module's
weight, where scale is alpha / rank, or alpha / sqrt(rank) (rsLoRA).
"""

import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.sources import TensorInfo, TensorSource, folder_of, has_weights, open_source
from flashsvd_jax.checkpoint.json_files import read_object
from flashsvd_jax.errors import ConversionError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_PREFIX = "base_model.model."
_LARGEST_SCALE = 2.0**127
_LONGEST_PATH = 100
_PAIR = re.compile(r"^(.*)\.lora_(?:embedding_)?([AB])(?:\.(?!weight$)\w+)?(?:\.weight)?$")
# What changes the forward pass beyond two factors, or stores what is read in other ways.
_OTHER_FORMS = (
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "velora_config",
)
# These begin by taking the adapter's product off the base's weights, or quantize them.
_OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LowRankUpdate:
    """``scale * b @ a``, added to a weight [d_out, d_in]: a [rank, d_in], b [d_out, rank]; transposed for an embedding."""

    module: str
    a: TensorInfo
    b: TensorInfo
    scale: float

    @property
    def is_embedding(self) -> bool:
        return "lora_embedding_" in self.a.name

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it is added to."""
        d_out, d_in = self.b.shape[0], self.a.shape[1]
        return (d_in, d_out) if self.is_embedding else (d_out, d_in)


@dataclass(frozen=True)
class Adapter:
    """An open adapter.

    Attributes:
      source: its tensors.
      updates: low-rank updates by module path in the base model.
      replaced: parameters that were trained whole, by name in the base model.
    """

    source: TensorSource
    updates: Mapping[str, LowRankUpdate]
    replaced: Mapping[str, TensorInfo]


def adapter_folder(path: Path) -> Path | None:
    """The folder of an adapter, if the path is one or one of its files."""
    folder = folder_of(path)
    named = path.is_dir() or path.name in (CONFIG_FILE, *WEIGHTS_FILES)
    return folder if named and (folder / CONFIG_FILE).is_file() else None


def base_weights(folder: Path, base: Path | None) -> Path:
    """Where the weights are that an adapter in a folder is for: at ``base``, or else beside it.

    Raises:
      ConversionError: there are none.
    """
    if base is not None:
        return base
    if has_weights(folder):
        return folder
    name = read_object(folder / CONFIG_FILE, ConversionError).get("base_model_name_or_path")
    raise ConversionError(
        f"{folder} is an adapter for {name or 'a base model'}: give the folder of that model's weights with --base"
    )


def open_adapter(folder: Path) -> Adapter:
    """Reads an adapter; closing its source is up to the caller.

    Raises:
      ConversionError: it is no LoRA adapter, or one that means more than low-rank updates.
      CheckpointError: its weights cannot be read.
    """
    config = read_object(folder / CONFIG_FILE, ConversionError)
    _check(config, str(folder / CONFIG_FILE))
    weights = next((folder / name for name in WEIGHTS_FILES if (folder / name).is_file()), None)
    if weights is None:
        raise ConversionError(f"{folder} holds {CONFIG_FILE}, but neither {' nor '.join(WEIGHTS_FILES)}")
    source = open_source(weights)
    pairs: dict[str, dict[str, TensorInfo]] = {}
    replaced: dict[str, TensorInfo] = {}
    for name, info in source.infos().items():
        bare = name.removeprefix(_PREFIX)
        match = _PAIR.match(bare)
        if match is None:
            replaced[bare] = info
        elif pairs.setdefault(match[1], {}).setdefault(match[2], info) is not info:
            raise ConversionError(f"{weights}: {name} is there for several adapters; save one by itself")
    updates = {module: _update(config, module, pair, weights) for module, pair in pairs.items()}
    if not updates:
        raise ConversionError(f"{weights} holds no lora_A and lora_B")
    for module in config.get("modules_to_save") or []:
        if not any(f".{name}".rpartition(".")[0].endswith(f".{module}") for name in replaced):
            raise ConversionError(f"{weights} holds nothing for {module}, which modules_to_save in {CONFIG_FILE} names")
    return Adapter(source, updates, replaced)


def _check(config: Mapping[str, Any], where: str) -> None:
    kind, start = config.get("peft_type"), config.get("init_lora_weights")
    if kind != "LORA":
        raise ConversionError(f"{where}: peft_type {kind!r} is not read, only LORA")
    for key in _OTHER_FORMS:
        if config.get(key):
            raise ConversionError(
                f"{where}: {key} is {config[key]!r}, which is not read; merge the adapter with PEFT first"
            )
    for key, kinds in (("use_rslora", bool), ("modules_to_save", list)):
        if config.get(key) is not None and not isinstance(config[key], kinds):
            raise ConversionError(f"{where}: {key} is {config[key]!r}, which is of the wrong kind")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASES):
        raise ConversionError(
            f"{where}: init_lora_weights {start!r} changes the base model's weights before training; save the adapter with "
            "PEFT's path_initial_model_for_weight_conversion, or merge it"
        )


def _update(config: Mapping[str, Any], module: str, pair: Mapping[str, TensorInfo], where: Path) -> LowRankUpdate:
    if len(pair) < 2:
        (only,) = pair.values()
        raise ConversionError(f"{where}: {only.name} is there without its other factor")
    a, b = pair["A"], pair["B"]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise ConversionError(f"{where}: {a.name} {list(a.shape)} and {b.name} {list(b.shape)} are no two factors")
    rank = a.shape[0]
    told, alpha = (
        _setting(config, key, pattern, module)
        for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
    )
    if told != rank:
        raise ConversionError(f"{where}: {CONFIG_FILE} gives {module} rank {told!r}, {a.name} has {rank}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < _LARGEST_SCALE:
        raise ConversionError(
            f"{where}: {CONFIG_FILE} gives {module} the scale lora_alpha {reprlib.repr(alpha)}, which is no number, or none that "
            "float32 holds"
        )
    return LowRankUpdate(module, a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _setting(config: Mapping[str, Any], key: str, pattern_key: str, module: str) -> Any:
    """A setting of one module: that of the first pattern that its path ends with, or else of all modules."""
    patterns = config.get(pattern_key) or {}
    if not isinstance(patterns, Mapping):
        raise ConversionError(f"{CONFIG_FILE}: {pattern_key} is not an object")
    return next(
        (value for pattern, value in patterns.items() if _ends_with(module, pattern, pattern_key)), config.get(key)
    )


def _ends_with(module: str, pattern: str, where: str) -> bool:
    """As PEFT matches: the pattern is a regular expression for the end of a path, from a dot on.

    Only those without a repeated group are tried, on paths of a length that models have: others may take for ever, and a checkpoint
    must not be able to hang the reader.
    """
    if len(pattern) > 200 or len(re.findall(r"[*+{]", pattern)) > 3 or re.search(r"\)[*+?{]|\\\d", pattern):
        raise ConversionError(f"{CONFIG_FILE}: {where} has the pattern {pattern[:200]!r}, which is too intricate")
    if len(module) > _LONGEST_PATH:
        raise ConversionError(
            f"{CONFIG_FILE}: {where} cannot be matched with the path {module[:40]}.., which is too long"
        )
    try:
        return re.match(rf"(?:.*\.)?(?:{pattern})$", module) is not None
    except (re.error, OverflowError) as error:
        raise ConversionError(f"{CONFIG_FILE}: {where} has the pattern {pattern!r}, which is none: {error}") from error
