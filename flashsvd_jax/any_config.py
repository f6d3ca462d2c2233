"""The configuration of any model that is run, decoder or encoder."""

from collections.abc import Mapping
from typing import Any

from flashsvd_jax.config import MODEL_TYPE_ALIASES, MODEL_TYPES, ModelConfig
from flashsvd_jax.encoder_config import ENCODER_TYPES, EncoderConfig
from flashsvd_jax.errors import ConfigError
from flashsvd_jax.factorization import Factorization

AnyConfig = ModelConfig | EncoderConfig


def config_from_hf(hf: Mapping[str, Any], factorization: Factorization | None = None) -> AnyConfig:
    """Reads a Hugging Face config of a decoder or an encoder.

    Raises:
      ConfigError: see `ModelConfig.from_hf` and `EncoderConfig.from_hf`.
    """
    kind = hf.get("model_type")
    if kind in ENCODER_TYPES:
        return EncoderConfig.from_hf(hf, factorization)
    if kind is not None and str(kind) not in (*MODEL_TYPES, *MODEL_TYPE_ALIASES):
        known = ", ".join((*MODEL_TYPES, *ENCODER_TYPES))
        raise ConfigError(f"config.json: model_type {kind!r} is not supported; supported: {known}")
    return ModelConfig.from_hf(hf, factorization)
