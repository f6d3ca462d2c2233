"""Configuration of encoders: what a Hugging Face ``config.json`` of BERT or its kin says, checked once and frozen.

Only fields that change the arithmetic are kept. A field that would change it and is not supported is an error, never ignored.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flashsvd_jax.base_models import MAX_LAYERS
from flashsvd_jax.config_fields import activation, flag, integer, number
from flashsvd_jax.encoder_head_config import HeadConfig
from flashsvd_jax.errors import ConfigError
from flashsvd_jax.factorization import Factorization
from flashsvd_jax.rope_config import RopeConfig

ENCODER_TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "modernbert")

_ATTENTION_TYPES = ("full_attention", "sliding_attention")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """A bidirectional encoder: BERT, RoBERTa, DistilBERT and ModernBERT differ only in these fields.

    Attributes:
      max_position: tokens of the longest sequence.
      first_position: row of the position table that the first token reads; RoBERTa's begins behind the padding token's.
      num_types: rows of the token type table; 0 for none.
      learned_positions: whether there is a position table.
      norm_eps: added to the variance by every norm; norm_bias: whether they have biases.
      activation: of the feed-forward layers; ``gated``: whether it gates a second projection.
      pre_norm: norms stand before attention and feed-forward; otherwise behind each of them.
      final_norm: one more norm stands behind the last layer: ModernBERT's, and that of the class FlashSVD saves BERT in.
      embedding_scale: what the embedding is multiplied with; FlashSVD's class takes the square root of the width.
      fused: q, k and v are one projection with one rank, and so are gate and up.
      windows: how far each layer's tokens see to either side; None: everywhere.
      ropes: each layer's rotary embedding, or None.
      head: what stands on it, or None.
      factorization: which sites are low rank; an empty one is the dense model.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_position: int
    norm_eps: float
    activation: str
    windows: tuple[int | None, ...]
    ropes: tuple[RopeConfig | None, ...]
    first_position: int = 0
    num_types: int = 0
    learned_positions: bool = True
    norm_bias: bool = True
    attention_bias: bool = True
    mlp_bias: bool = True
    gated: bool = False
    pre_norm: bool = False
    final_norm: bool = False
    embedding_scale: float = 1.0
    fused: bool = False
    head: HeadConfig | None = None
    factorization: Factorization = dataclasses.field(default_factory=Factorization)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], factorization: Factorization | None = None) -> "EncoderConfig":
        """Reads a Hugging Face config.

        Raises:
          ConfigError: an unknown ``model_type``, a missing field, or a value this encoder does not compute.
        """
        kind = hf.get("model_type")
        if kind not in ENCODER_TYPES:
            raise ConfigError(f"config.json: model_type {kind!r} is no encoder's; known: {', '.join(ENCODER_TYPES)}")
        for name in ("is_decoder", "add_cross_attention"):
            if flag(hf, name, False):
                raise ConfigError(f"config.json: {name} is true; encoders alone are supported")
        fields = {"distilbert": _distilbert, "modernbert": _modernbert}.get(kind, _bert)(hf)
        config = cls(
            model_type=kind, head=HeadConfig.from_hf(hf), factorization=factorization or Factorization(), **fields
        )
        if config.hidden_size % config.num_heads:
            raise ConfigError(
                f"config.json: {config.num_heads} attention heads do not divide {config.hidden_size}, the width"
            )
        if config.head_dim % 2 and any(config.ropes):
            raise ConfigError(f"config.json: heads of {config.head_dim} columns cannot be rotated, that is odd")
        return config

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def is_transformers(self) -> bool:
        """Whether transformers has this model; `embedding_scale` and BERT's `final_norm` are none of its fields."""
        return self.embedding_scale == 1.0 and self.final_norm == self.pre_norm

    @property
    def tie_embeddings(self) -> bool:
        """Whether the token embedding is an output layer too."""
        return self.head is not None and self.head.tied

    def dense(self) -> "EncoderConfig":
        """The same model with no site factorized."""
        return dataclasses.replace(self, factorization=Factorization())


def _bert(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of BERT, and of RoBERTa, whose positions begin behind the padding token's."""
    if hf.get("position_embedding_type", "absolute") not in (None, "absolute"):
        raise ConfigError(
            f"config.json: position_embedding_type {hf['position_embedding_type']!r} is not supported; only 'absolute' is"
        )
    sizes = _sizes(hf)
    layers = sizes["num_layers"]
    first = 0 if hf["model_type"] == "bert" else 1 + integer(hf, "pad_token_id", 1, least=0)
    rows = integer(hf, "max_position_embeddings")
    if rows <= first:
        raise ConfigError(f"config.json: max_position_embeddings {rows} leaves no position behind the padding token's")
    return {
        **sizes,
        "max_position": rows - first,
        "first_position": first,
        "num_types": integer(hf, "type_vocab_size", 2),
        "norm_eps": number(hf, "layer_norm_eps", 1e-12),
        "activation": activation(hf, "hidden_act", "gelu"),
        "final_norm": flag(hf, "final_norm", False),
        "embedding_scale": number(hf, "embedding_scale", 1.0),
        "windows": (None,) * layers,
        "ropes": (None,) * layers,
    }


def _distilbert(hf: Mapping[str, Any]) -> dict[str, Any]:
    layers = _num_layers(hf, "n_layers")
    return {
        "vocab_size": integer(hf, "vocab_size"),
        "hidden_size": integer(hf, "dim"),
        "intermediate_size": integer(hf, "hidden_dim"),
        "num_layers": layers,
        "num_heads": integer(hf, "n_heads"),
        "max_position": integer(hf, "max_position_embeddings"),
        "norm_eps": 1e-12,  # no field of its configuration
        "activation": activation(hf, "activation", "gelu"),
        "windows": (None,) * layers,
        "ropes": (None,) * layers,
    }


def _modernbert(hf: Mapping[str, Any]) -> dict[str, Any]:
    sizes = _sizes(hf)
    layers = sizes["num_layers"]
    types = hf.get("layer_types")
    if types is None:
        every = integer(hf, "global_attn_every_n_layers", 3)
        types = [_ATTENTION_TYPES[layer % every > 0] for layer in range(layers)]
    if not isinstance(types, list | tuple) or len(types) != layers or any(t not in _ATTENTION_TYPES for t in types):
        raise ConfigError(
            f"config.json: layer_types must name {' or '.join(_ATTENTION_TYPES)} for each of {layers} layers"
        )
    window = integer(hf, "local_attention", 128) // 2
    ropes = {
        "full_attention": _rope(hf, "full_attention", number(hf, "global_rope_theta", 160000.0)),
        "sliding_attention": _rope(hf, "sliding_attention", number(hf, "local_rope_theta", 10000.0)),
    }
    return {
        **sizes,
        "max_position": integer(hf, "max_position_embeddings"),
        "norm_eps": number(hf, "norm_eps", 1e-5),
        "activation": activation(hf, "hidden_activation", "gelu"),
        "windows": tuple(window if kind == "sliding_attention" else None for kind in types),
        "ropes": tuple(ropes[kind] for kind in types),
        "learned_positions": False,
        "norm_bias": flag(hf, "norm_bias", False),
        "attention_bias": flag(hf, "attention_bias", False),
        "mlp_bias": flag(hf, "mlp_bias", False),
        "gated": True,
        "pre_norm": True,
        "final_norm": True,
        "fused": True,
    }


def _sizes(hf: Mapping[str, Any]) -> dict[str, int]:
    """Fields that most configurations have by the same names."""
    return {
        "vocab_size": integer(hf, "vocab_size"),
        "hidden_size": integer(hf, "hidden_size"),
        "intermediate_size": integer(hf, "intermediate_size"),
        "num_layers": _num_layers(hf, "num_hidden_layers"),
        "num_heads": integer(hf, "num_attention_heads"),
    }


def _rope(hf: Mapping[str, Any], kind: str, theta: float) -> RopeConfig:
    """The rotation of layers of a kind; ``theta`` is its base where rope_parameters do not say."""
    given = hf.get("rope_parameters") or {}
    own = (given.get(kind) or {}) if isinstance(given, Mapping) else None
    if not isinstance(own, Mapping) or hf.get("rope_scaling"):
        raise ConfigError("config.json: rope_parameters must hold sets of values by layer type, and rope_scaling none")
    if own.get("rope_type", "default") != "default":
        raise ConfigError(f"config.json: rope scaling {own['rope_type']!r} is not supported for encoders")
    return RopeConfig.from_hf({"rope_theta": theta, "rope_parameters": own})


def _num_layers(hf: Mapping[str, Any], name: str) -> int:
    layers = integer(hf, name)
    if layers > MAX_LAYERS:  # every layer is described one by one: a damaged number must not fill the memory
        raise ConfigError(f"config.json: {name} {layers} is beyond the {MAX_LAYERS} that are supported")
    return layers
