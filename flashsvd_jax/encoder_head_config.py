"""Configuration of what stands on an encoder."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from flashsvd_jax.config_fields import activation, flag, integer
from flashsvd_jax.errors import ConfigError


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

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "HeadConfig | None":
        """The head of the class in ``architectures``; where none is named, the encoder alone is meant.

        Raises:
          ConfigError: a class with another head, or a field that is not understood.
        """
        names = hf.get("architectures")
        name = str(names[0]) if isinstance(names, list | tuple) and names else "Model"
        if name.endswith("Model"):
            return None
        if name.endswith(("ForMaskedLM", "ForPreTraining")):
            return _masked_lm(hf)
        if name.endswith("ForSequenceClassification"):
            return _classification(hf)
        raise ConfigError(
            f"config.json: the head of {name} is not supported; supported: ForMaskedLM, ForSequenceClassification, and a "
            "class whose name ends in Model for the encoder alone"
        )


def _masked_lm(hf: Mapping[str, Any]) -> HeadConfig:
    kind, outputs, tied = hf["model_type"], integer(hf, "vocab_size"), flag(hf, "tie_word_embeddings", True)
    if kind == "modernbert":
        return _modernbert("masked_lm", outputs, hf, out_bias=flag(hf, "decoder_bias", True), tied=tied)
    field = {"bert": "hidden_act", "distilbert": "activation"}.get(kind)  # RoBERTa's is gelu whatever its layers have
    return HeadConfig(
        "masked_lm", outputs, activation(hf, field, "gelu") if field else "gelu", has_norm=True, tied=tied
    )


def _classification(hf: Mapping[str, Any]) -> HeadConfig:
    kind, outputs = hf["model_type"], _num_labels(hf)
    if kind != "modernbert":
        return HeadConfig("classification", outputs, "relu" if kind == "distilbert" else "tanh")
    pooling = hf.get("classifier_pooling", "cls")
    if pooling not in ("cls", "mean"):
        raise ConfigError(f"config.json: classifier_pooling must be cls or mean, not {pooling!r}")
    return _modernbert("classification", outputs, hf, pooling=pooling)


def _modernbert(
    kind: Literal["masked_lm", "classification"], outputs: int, hf: Mapping[str, Any], **fields: Any
) -> HeadConfig:
    dense_bias = flag(hf, "classifier_bias", False)
    return HeadConfig(
        kind, outputs, activation(hf, "classifier_activation", "gelu"), has_norm=True, dense_bias=dense_bias, **fields
    )


def _num_labels(hf: Mapping[str, Any]) -> int:
    """Labels are counted by their names; a configuration without names has transformers' two."""
    names = hf.get("id2label")
    if names is not None and (not isinstance(names, Mapping) or not names):
        raise ConfigError(f"config.json: id2label must name the labels, not {names!r}")
    return integer(hf, "num_labels", 2) if names is None else len(names)
