"""Configuration of decoders: what a Hugging Face ``config.json`` says, checked once and frozen.

Only fields that change the arithmetic are kept. A field that would change it and is not supported is an error, never ignored.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flashsvd_jax.base_models import BASE_MODELS
from flashsvd_jax.config_fields import token_ids
from flashsvd_jax.errors import ConfigError
from flashsvd_jax.factorization import Factorization
from flashsvd_jax.rope_config import RopeConfig

__all__ = ["MODEL_TYPES", "MODEL_TYPE_ALIASES", "ModelConfig", "RopeConfig", "base_model_type"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder: Llama 1-3, Mistral, Qwen2/2.5, Qwen3, Phi-3/4, Gemma 2 and 3, OPT and GPT-2 differ only in these fields.

    Attributes:
      max_position: tokens of the longest sequence; with learned positions, nothing beyond it can be computed.
      norm_eps: added by every norm to the mean square, or to the variance.
      rope: rotary embedding of the layers, or None; ``window_rope``: that of layers with a window, where it is another one.
      windows: each layer's sliding window in tokens, None for full attention.
      qkv_bias, o_bias, mlp_bias: which projections have biases.
      qk_norm: queries and keys are normed, over a head's columns.
      tie_embeddings: the embedding is the output head too.
      fused: q, k and v are one projection with one rank, and so are gate and up.
      activation: of the MLP; ``gated``: whether it gates a second projection.
      layer_norm: norms are LayerNorms with biases; otherwise root-mean-square norms.
      norm_offset: added to what norms scale with; Gemma's norms scale with 1 + weight.
      output_norms: what attention and MLP add to the residual stream is normed as well.
      embedding_scale: what the embedding is multiplied with; learned_positions: whether a table of positions is added then.
      first_position: row of that table which the first token reads.
      attention_scale: what scores are multiplied with; None for 1 / sqrt(head_dim).
      attention_softcap, logit_softcap: bounds that scores, and logits, approach by a hyperbolic tangent; None for no bounds.
      factorization: which sites are low rank; an empty one is the dense model.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    rope: RopeConfig | None
    windows: tuple[int | None, ...]
    window_rope: RopeConfig | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    fused: bool = False
    activation: str = "silu"
    gated: bool = True
    layer_norm: bool = False
    norm_offset: float = 0.0
    output_norms: bool = False
    embedding_scale: float = 1.0
    learned_positions: bool = False
    first_position: int = 0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    factorization: Factorization = dataclasses.field(default_factory=Factorization)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], factorization: Factorization | None = None) -> "ModelConfig":
        """Reads a Hugging Face config.

        Raises:
          ConfigError: an unknown ``model_type``, a missing field, or a value this decoder does not compute.
        """
        kind = base_model_type(hf)
        config = cls(
            model_type=kind,
            bos_token_id=next(iter(token_ids(hf.get("bos_token_id"), "config.json: bos_token_id")), None),
            eos_token_ids=token_ids(hf.get("eos_token_id"), "config.json: eos_token_id"),
            factorization=factorization or Factorization(),
            **BASE_MODELS[kind](kind, hf),
        )
        if config.num_heads % config.num_kv_heads:
            raise ConfigError(
                f"config.json: num_attention_heads {config.num_heads} is not a multiple of"
                f" num_key_value_heads {config.num_kv_heads}"
            )
        for rope in config.ropes:
            rope.check(config.head_dim)
        return config

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The different rotary embeddings that occur: none, one, or a second one for layers with a window."""
        return tuple(rope for rope in (self.rope, self.window_rope) if rope is not None)

    def rotation(self, window: int | None) -> int:
        """Which of `ropes` a layer with this window has."""
        return 0 if self.window_rope is None or window is None else 1

    def dense(self) -> "ModelConfig":
        """The same model with no site factorized."""
        return dataclasses.replace(self, factorization=Factorization())


MODEL_TYPES = tuple(BASE_MODELS)

# What SVD families write in place of the base model's type; their configs are otherwise the base model's.
MODEL_TYPE_ALIASES = {f"lowrank_{base}": base for base in MODEL_TYPES} | {
    "svdllm-llama": "llama",
    "svdllm_llama": "llama",
}


def base_model_type(hf: Mapping[str, Any]) -> str:
    """The base architecture of a config: its ``model_type``, or the one that an SVD family derived its own from."""
    kind = hf.get("model_type")
    if kind is None:
        raise ConfigError("config.json: model_type is missing")
    kind = MODEL_TYPE_ALIASES.get(str(kind), str(kind))
    if kind not in MODEL_TYPES:
        raise ConfigError(f"config.json: model_type {kind!r} is not supported; supported: {', '.join(MODEL_TYPES)}")
    return kind
