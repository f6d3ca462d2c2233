"""The base model's configuration: it alone says how positions are rotated, heads grouped and norms computed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.families import FAMILIES
from converters.family import architectures
from converters.sources import TensorSource, folder_of
from flashsvd_jax.any_config import AnyConfig, config_from_hf
from flashsvd_jax.checkpoint.json_files import read_object
from flashsvd_jax.checkpoint.layout import CONFIG_FILE
from flashsvd_jax.errors import ConfigError, ConversionError

# What families add to the base model's configuration; none of it describes the base model.
_ADDED = {key for family in FAMILIES for key in (*family.config_keys, *family.added_keys, family.rank_map)} | {
    "auto_map",
    "low_rank_method",
    "low_rank_format_version",
}
_ARCHITECTURES = tuple(prefix for family in FAMILIES for prefix in family.architectures)
# Models that see and write -> type and class of the text model inside, which alone is read.
_TEXT_MODELS = {"gemma3": ("gemma3_text", "Gemma3ForCausalLM")}
# What a family adds to other models' configurations and a base model has by itself.
_OWN_KEYS = {"opt": ("ffn_dim",)}
_BASE_TYPES = {own: base for family in FAMILIES for own, base in family.model_types}


@dataclass(frozen=True)
class FoundConfig:
    """A Hugging Face configuration as it was read, and where it came from, for the report."""

    hf: Mapping[str, Any]
    origin: str


def own_config(source: TensorSource) -> FoundConfig | None:
    """The configuration that came with the weights: config.json beside them, or else the one inside the pickle."""
    path = folder_of(source.path) / CONFIG_FILE
    if path.is_file():
        return FoundConfig(read_object(path, ConversionError), f"{CONFIG_FILE} beside the weights")
    if source.embedded_config is not None:
        return FoundConfig(source.embedded_config, "the configuration inside the pickle")
    return None


def base_config(own: FoundConfig | None, base: Path | None, where: str) -> FoundConfig:
    """The base model's configuration, without what a family added to it.

    Args:
      own: the configuration that came with the weights, or None.
      base: folder or config.json of the base model, which then counts instead.
      where: the checkpoint, for messages.

    Raises:
      ConversionError: there is none, or the file at ``base`` is none.
    """
    found = own
    if base is not None:
        path = base / CONFIG_FILE if base.is_dir() else base
        found = FoundConfig(read_object(path, ConversionError), str(path))
    if found is None:
        raise ConversionError(f"{where} has no {CONFIG_FILE}: give the base model's folder with --base")
    hf = found.hf
    if isinstance(hf.get("base_config"), Mapping):  # LEMS keeps the base model's configuration whole
        hf = {"model_type": hf.get("base_model_type"), **hf["base_config"]}
    if str(hf.get("model_type")) in _TEXT_MODELS and isinstance(hf.get("text_config"), Mapping):
        own_type, own_class = _TEXT_MODELS[str(hf["model_type"])]
        tokens = {key: hf[key] for key in ("bos_token_id", "eos_token_id") if key in hf}
        hf = {**tokens, **hf["text_config"], "model_type": own_type, "architectures": [own_class]}
    kind = _BASE_TYPES.get(str(hf.get("model_type")), hf.get("model_type"))
    own_keys = _OWN_KEYS.get(str(kind), ())
    clean = {key: value for key, value in hf.items() if key not in _ADDED or key in own_keys} | {"model_type": kind}
    kept = [name for name in architectures(clean) if not name.startswith(_ARCHITECTURES)]
    clean.pop("architectures", None)
    return FoundConfig(clean | ({"architectures": kept} if kept else {}), found.origin)


def model_config(found: FoundConfig) -> AnyConfig:
    """The dense model that a configuration describes; raises ConfigError, naming where it came from, for any other."""
    try:
        return config_from_hf(found.hf)
    except ConfigError as error:
        raise ConfigError(f"{found.origin}: {error}") from error


def base_name(own: FoundConfig | None) -> str | None:
    """The base model's name on the hub, where the configuration that came with the weights tells it."""
    hf = own.hf if own else {}
    name = hf.get("base_model_id") or hf.get("_name_or_path")
    return name if isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) else None
