"""Configuration of encoders: what a Hugging Face ``config.json`` of BERT, RoBERTa or DistilBERT says, checked once and frozen.

Only fields that change the arithmetic are kept. A field that would change it and is not supported is an error, never ignored.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from flashsvd_jax.config import MAX_LAYERS, RopeConfig
from flashsvd_jax.config_fields import flag, integer, number
from flashsvd_jax.errors import ConfigError
from flashsvd_jax.factorization import Factorization

ENCODER_TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert")

# Names of activations in transformers -> those of `pallas_kernels`; its variants of gelu_tanh differ by rounding alone.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """What stands on an encoder: a dense layer, its activation, a norm if it has one, and an output layer.

    Attributes:
      kind: "masked_lm" gives every token's logits over the vocabulary, "classification" those of a sequence over labels.
      outputs: number of tokens or labels.
      activation: after the dense layer.
      has_norm: whether a norm follows.
      dense_bias, out_bias: whether the layers have biases.
      tied: whether the token embedding is the output layer's weight.
      pooling: what of a sequence is classified, its first token ("cls") or the mean over its tokens ("mean").
    """

    kind: Literal["masked_lm", "classification"]
    outputs: int
    activation: str
    has_norm: bool = False
    dense_bias: bool = True
    out_bias: bool = True
    tied: bool = False
    pooling: str = "cls"


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """A bidirectional encoder: BERT, RoBERTa and DistilBERT differ only in these fields.

    Attributes:
      max_position: tokens of the longest sequence.
      first_position: row of the position table that the first token reads; RoBERTa's begins behind the padding token's.
      num_types: rows of the token type table; 0 for none.
      learned_positions: whether there is a position table.
      norm_eps: added to the variance by every norm; norm_bias: whether they have biases.
      activation: of the feed-forward layers; ``gated``: whether it gates a second projection.
      pre_norm: norms stand before attention and feed-forward, and one behind the last layer; otherwise behind each of them.
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
        fields = _distilbert(hf) if kind == "distilbert" else _bert(hf)
        config = cls(model_type=kind, head=_head(hf, kind), factorization=factorization or Factorization(), **fields)
        if config.hidden_size % config.num_heads:
            raise ConfigError(
                f"config.json: {config.num_heads} attention heads do not divide {config.hidden_size}, the width"
            )
        return config

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

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
    layers = _num_layers(hf, "num_hidden_layers")
    first = 0 if hf["model_type"] == "bert" else 1 + integer(hf, "pad_token_id", 1, least=0)
    rows = integer(hf, "max_position_embeddings")
    if rows <= first:
        raise ConfigError(f"config.json: max_position_embeddings {rows} leaves no position behind the padding token's")
    return {
        "vocab_size": integer(hf, "vocab_size"),
        "hidden_size": integer(hf, "hidden_size"),
        "intermediate_size": integer(hf, "intermediate_size"),
        "num_layers": layers,
        "num_heads": integer(hf, "num_attention_heads"),
        "max_position": rows - first,
        "first_position": first,
        "num_types": integer(hf, "type_vocab_size", 2),
        "norm_eps": number(hf, "layer_norm_eps", 1e-12),
        "activation": _activation(hf, "hidden_act"),
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
        "activation": _activation(hf, "activation"),
        "windows": (None,) * layers,
        "ropes": (None,) * layers,
    }


def _num_layers(hf: Mapping[str, Any], name: str) -> int:
    layers = integer(hf, name)
    if layers > MAX_LAYERS:  # every layer is described one by one: a damaged number must not fill the memory
        raise ConfigError(f"config.json: {name} {layers} is beyond the {MAX_LAYERS} that are supported")
    return layers


def _activation(hf: Mapping[str, Any], name: str) -> str:
    given = hf.get(name, "gelu")
    if not isinstance(given, str) or given not in _ACTIVATIONS:
        raise ConfigError(f"config.json: {name} {given!r} is not supported; supported: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[given]


def _head(hf: Mapping[str, Any], kind: str) -> HeadConfig | None:
    """The head that the class in ``architectures`` has; where none is named, the encoder alone is meant."""
    names = hf.get("architectures")
    name = str(names[0]) if isinstance(names, list | tuple) and names else "Model"
    if name.endswith("Model"):
        return None
    if name.endswith(("ForMaskedLM", "ForPreTraining")):
        activation = {"bert": "hidden_act", "distilbert": "activation"}.get(kind)
        return HeadConfig(
            kind="masked_lm",
            outputs=integer(hf, "vocab_size"),
            activation="gelu" if activation is None else _activation(hf, activation),
            has_norm=True,
            tied=flag(hf, "tie_word_embeddings", True),
        )
    if name.endswith("ForSequenceClassification"):
        return HeadConfig("classification", _num_labels(hf), "relu" if kind == "distilbert" else "tanh")
    raise ConfigError(
        f"config.json: the head of {name} is not supported; supported: ForMaskedLM, ForSequenceClassification, and a class "
        "whose name ends in Model for the encoder alone"
    )


def _num_labels(hf: Mapping[str, Any]) -> int:
    """Labels are counted by their names; a configuration without names has transformers' two."""
    names = hf.get("id2label")
    if names is not None and (not isinstance(names, Mapping) or not names):
        raise ConfigError(f"config.json: id2label must name the labels, not {names!r}")
    return integer(hf, "num_labels", 2) if names is None else len(names)
