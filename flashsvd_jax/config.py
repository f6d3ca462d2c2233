"""Model configuration: what a Hugging Face ``config.json`` says, checked once and frozen.

Only fields that change the arithmetic are kept. A field that would change it and is not supported is an error, never ignored.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flashsvd_jax.config_fields import flag, integer, number, numbers, optional_number, token_ids
from flashsvd_jax.errors import ConfigError
from flashsvd_jax.factorization import Factorization

MAX_LAYERS = 1024
ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base frequency and the published scaling that stretches it.

    Attributes other than ``kind`` and ``theta`` belong to some kinds only; they carry the names of the Hugging Face fields.
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "RopeConfig":
        """Reads ``rope_parameters`` (transformers 5) or ``rope_theta`` with ``rope_scaling`` (before), which has the last word."""
        raw = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
        if not isinstance(raw, Mapping) or any(isinstance(value, Mapping) for value in raw.values()):
            raise ConfigError(
                "config.json: rope_parameters must be one set of values; sets by layer type are not supported"
            )
        kind = raw.get("rope_type", raw.get("type", "default"))
        if kind not in ROPE_KINDS:
            raise ConfigError(f"config.json: rope scaling {kind!r} is not known; known: {', '.join(ROPE_KINDS)}")
        theta = number(raw, "rope_theta", number(hf, "rope_theta", 10000.0))
        if theta <= 1:
            raise ConfigError(f"config.json: rope_theta must be above 1, not {theta}")
        partial = raw.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
        if partial not in (None, 1, 1.0):
            raise ConfigError(f"config.json: partial_rotary_factor {partial} is not supported; heads are rotated whole")
        return cls(theta=theta) if kind == "default" else cls._scaled(kind, theta, raw, hf)

    @classmethod
    def _scaled(cls, kind: str, theta: float, raw: Mapping[str, Any], hf: Mapping[str, Any]) -> "RopeConfig":
        name = "original_max_position_embeddings"
        max_position = integer(hf, "max_position_embeddings")
        original = integer(hf, name, 0) or integer(raw, name, 0)
        if kind == "llama3" and not original:
            raise ConfigError(f"config.json: rope scaling 'llama3' needs {name}")
        if kind == "dynamic":  # stretches beyond the configured length, whatever the model was pretrained at
            original = max_position
        if raw.get("factor") is None and kind not in ("longrope", "yarn"):
            raise ConfigError(f"config.json: rope scaling {kind!r} needs a factor")
        rope = cls(
            kind=kind,
            theta=theta,
            factor=number(raw, "factor", max_position / original if original else 1.0),
            original_max_position=original or max_position,
            low_freq_factor=number(raw, "low_freq_factor", 1.0),
            high_freq_factor=number(raw, "high_freq_factor", 4.0),
            beta_fast=number(raw, "beta_fast", 32.0),
            beta_slow=number(raw, "beta_slow", 1.0),
            truncate=flag(raw, "truncate", True),
            attention_factor=optional_number(raw, "attention_factor"),
            mscale=optional_number(raw, "mscale"),
            mscale_all_dim=optional_number(raw, "mscale_all_dim"),
            short_factor=numbers(raw, "short_factor"),
            long_factor=numbers(raw, "long_factor"),
        )
        if kind == "longrope" and not (rope.short_factor and rope.long_factor and rope.original_max_position > 1):
            raise ConfigError(
                f"config.json: rope scaling 'longrope' needs short_factor and long_factor, and {name} above 1"
            )
        if rope.low_freq_factor >= rope.high_freq_factor:
            raise ConfigError("config.json: rope low_freq_factor must be below high_freq_factor")
        return rope


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama-shaped decoder: Llama 1-3, Mistral, Qwen2/2.5 and Qwen3 differ only in these fields.

    ``windows`` holds each layer's sliding window in tokens (None: full attention). ``factorization`` says which sites are low
    rank; an empty one is the dense model.
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
    rms_norm_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
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
        hidden, layers = integer(hf, "hidden_size"), integer(hf, "num_hidden_layers")
        heads = integer(hf, "num_attention_heads")
        if layers > MAX_LAYERS:  # every layer is described one by one: a damaged number must not fill the memory
            raise ConfigError(f"config.json: num_hidden_layers {layers} is beyond the {MAX_LAYERS} that are supported")
        attention_bias = flag(hf, "attention_bias", False)
        # Null means as many as query heads; an absent key, what transformers' class for the model has.
        kv_heads = hf.get("num_key_value_heads", {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(kind))
        config = cls(
            model_type=kind,
            vocab_size=integer(hf, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=integer(hf, "intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=integer({"num_key_value_heads": kv_heads}, "num_key_value_heads", heads),
            head_dim=integer(hf, "head_dim", 0) or _default_head_dim(kind, hidden, heads),
            max_position=integer(hf, "max_position_embeddings"),
            rms_norm_eps=number(hf, "rms_norm_eps"),
            rope=RopeConfig.from_hf(hf),
            windows=_windows(kind, hf, layers),
            qkv_bias=kind == "qwen2" or (kind in ("llama", "qwen3") and attention_bias),
            o_bias=kind in ("llama", "qwen3") and attention_bias,
            mlp_bias=kind == "llama" and flag(hf, "mlp_bias", False),
            qk_norm=kind == "qwen3",
            tie_embeddings=flag(hf, "tie_word_embeddings", False),
            bos_token_id=next(iter(token_ids(hf.get("bos_token_id"), "config.json: bos_token_id")), None),
            eos_token_ids=token_ids(hf.get("eos_token_id"), "config.json: eos_token_id"),
            factorization=factorization or Factorization(),
        )
        config._check(hf)
        return config

    def _check(self, hf: Mapping[str, Any]) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"config.json: num_attention_heads {self.num_heads} is not a multiple of"
                f" num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2 or (self.head_dim < 4 and self.rope.kind == "dynamic"):
            raise ConfigError(f"config.json: head_dim {self.head_dim} is odd or too small to be rotated")
        activation = hf.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ConfigError(f"config.json: hidden_act {activation!r} is not supported; this decoder computes silu")
        for name in ("short_factor", "long_factor"):
            values = getattr(self.rope, name)
            if values and len(values) != self.head_dim // 2:
                raise ConfigError(
                    f"config.json: rope {name} has {len(values)} entries, head_dim needs {self.head_dim // 2}"
                )

    def dense(self) -> "ModelConfig":
        """The same model with no site factorized."""
        return dataclasses.replace(self, factorization=Factorization())


MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

# What SVD families write in place of the base model's type; their configs are otherwise the base model's.
MODEL_TYPE_ALIASES = {
    "lowrank_llama": "llama",
    "lowrank_mistral": "mistral",
    "lowrank_qwen2": "qwen2",
    "lowrank_qwen3": "qwen3",
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


def _default_head_dim(kind: str, hidden: int, heads: int) -> int:
    # Qwen3 fixes head_dim at 128 whatever the width; a config that leaves it out means that, not hidden // heads.
    if kind == "qwen3":
        return 128
    if hidden % heads:
        raise ConfigError(
            f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}; give head_dim"
        )
    return hidden // heads


def _windows(kind: str, hf: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Each layer's sliding window. Mistral windows every layer; Qwen only those named, and only when it says so."""
    if kind.startswith("qwen") and not flag(hf, "use_sliding_window", False):
        return (None,) * layers
    # An absent key means transformers' default, null means none.
    given = hf.get("sliding_window", None if kind == "llama" else 4096)
    window = integer({"sliding_window": given}, "sliding_window", 0)
    if kind == "llama" or not window:
        return (None,) * layers
    types = hf.get("layer_types")
    if types is None and kind == "mistral":
        types = ["sliding_attention"] * layers
    elif types is None:
        first = integer(hf, "max_window_layers", 28, least=0)
        types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    known = ("sliding_attention", "full_attention")
    if not isinstance(types, list) or len(types) != layers or any(t not in known for t in types):
        raise ConfigError(f"config.json: layer_types must name {' or '.join(known)} for each of {layers} layers")
    return tuple(window if t == "sliding_attention" else None for t in types)
