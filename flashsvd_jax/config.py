"""Model configuration: what a Hugging Face ``config.json`` says, checked once and frozen.

Only fields that change the arithmetic are kept. A field that would change it and is not supported is an error, never ignored.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

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
        """Reads ``rope_parameters`` (transformers 5) or ``rope_theta`` with ``rope_scaling`` (before)."""
        raw = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
        kind = raw.get("rope_type", raw.get("type", "default"))
        if kind not in ROPE_KINDS:
            raise ConfigError(f"config.json: rope scaling {kind!r} is not known; known: {', '.join(ROPE_KINDS)}")
        theta = float(raw.get("rope_theta", hf.get("rope_theta", 10000.0)))
        if kind == "default":
            return cls(theta=theta)
        max_position = int(_require(hf, "max_position_embeddings"))
        original = raw.get("original_max_position_embeddings") or hf.get("original_max_position_embeddings")
        if kind == "llama3" and not original:
            raise ConfigError("config.json: rope scaling 'llama3' needs original_max_position_embeddings")
        if kind == "dynamic":  # stretches beyond the configured length, whatever the model was pretrained at
            original = max_position
        factor = raw.get("factor")
        if factor is None:
            if kind not in ("longrope", "yarn"):
                raise ConfigError(f"config.json: rope scaling {kind!r} needs a factor")
            factor = max_position / original if original else 1.0
        rope = cls(
            kind=kind,
            theta=theta,
            factor=float(factor),
            original_max_position=int(original or max_position),
            low_freq_factor=float(raw.get("low_freq_factor", 1.0)),
            high_freq_factor=float(raw.get("high_freq_factor", 4.0)),
            beta_fast=float(raw.get("beta_fast") or 32.0),
            beta_slow=float(raw.get("beta_slow") or 1.0),
            truncate=bool(raw.get("truncate", True)),
            attention_factor=_optional_float(raw.get("attention_factor")),
            mscale=_optional_float(raw.get("mscale")),
            mscale_all_dim=_optional_float(raw.get("mscale_all_dim")),
            short_factor=tuple(map(float, raw.get("short_factor") or ())),
            long_factor=tuple(map(float, raw.get("long_factor") or ())),
        )
        if kind == "longrope" and not (rope.short_factor and rope.long_factor):
            raise ConfigError("config.json: rope scaling 'longrope' needs short_factor and long_factor")
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
        heads = int(_require(hf, "num_attention_heads"))
        hidden = int(_require(hf, "hidden_size"))
        layers = int(_require(hf, "num_hidden_layers"))
        if layers > MAX_LAYERS:  # every layer is described one by one: a damaged number must not fill the memory
            raise ConfigError(f"config.json: num_hidden_layers {layers} is beyond the {MAX_LAYERS} that are supported")
        config = cls(
            model_type=kind,
            vocab_size=int(_require(hf, "vocab_size")),
            hidden_size=hidden,
            intermediate_size=int(_require(hf, "intermediate_size")),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=int(hf.get("num_key_value_heads") or heads),
            head_dim=int(hf.get("head_dim") or _default_head_dim(kind, hidden, heads)),
            max_position=int(_require(hf, "max_position_embeddings")),
            rms_norm_eps=float(_require(hf, "rms_norm_eps")),
            rope=RopeConfig.from_hf(hf),
            windows=_windows(kind, hf, layers),
            qkv_bias=kind == "qwen2" or (kind in ("llama", "qwen3") and bool(hf.get("attention_bias", False))),
            o_bias=kind in ("llama", "qwen3") and bool(hf.get("attention_bias", False)),
            mlp_bias=kind == "llama" and bool(hf.get("mlp_bias", False)),
            qk_norm=kind == "qwen3",
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
            bos_token_id=hf.get("bos_token_id"),
            eos_token_ids=token_ids(hf.get("eos_token_id")),
            factorization=factorization or Factorization(),
        )
        config._check(hf)
        return config

    def _check(self, hf: Mapping[str, Any]) -> None:
        positive = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
                    "max_position")  # fmt: skip
        bad = [name for name in positive if getattr(self, name) <= 0]
        if bad:
            raise ConfigError(f"config.json: must be positive: {', '.join(bad)}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"config.json: num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"config.json: head_dim {self.head_dim} is odd; rotary embedding needs an even one")
        if not (self.rms_norm_eps > 0 and math.isfinite(self.rms_norm_eps)):
            raise ConfigError(f"config.json: rms_norm_eps must be positive, not {self.rms_norm_eps}")
        activation = hf.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ConfigError(f"config.json: hidden_act {activation!r} is not supported; this decoder computes silu")
        partial = (hf.get("rope_parameters") or {}).get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
        if partial not in (None, 1.0):
            raise ConfigError(f"config.json: partial_rotary_factor {partial} is not supported, only 1.0")
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
_MODEL_TYPE_ALIASES = {
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
    kind = _MODEL_TYPE_ALIASES.get(str(kind), str(kind))
    if kind not in MODEL_TYPES:
        raise ConfigError(f"config.json: model_type {kind!r} is not supported; supported: {', '.join(MODEL_TYPES)}")
    return kind


def _require(hf: Mapping[str, Any], name: str) -> Any:
    value = hf.get(name)
    if value is None:
        raise ConfigError(f"config.json: {name} is missing; give the base model's configuration")
    return value


def _optional_float(value: Any) -> float | None:
    return None if value is None else float(value)


def token_ids(value: Any) -> tuple[int, ...]:
    """A token id field of a Hugging Face config: one id, a list of them, or nothing."""
    if value is None:
        return ()
    return tuple(map(int, value)) if isinstance(value, list | tuple) else (int(value),)


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
    window = hf.get(
        "sliding_window", 4096 if kind == "mistral" else None
    )  # transformers' default where the key is absent
    if kind.startswith("qwen") and not hf.get("use_sliding_window", False):
        window = None
    if kind == "llama" or window is None:
        return (None,) * layers
    types = hf.get("layer_types")
    if kind == "mistral":
        types = types or ["sliding_attention"] * layers
    elif types is None:
        first = int(hf.get("max_window_layers", 28))
        types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    if len(types) != layers or set(types) - {"sliding_attention", "full_attention"}:
        raise ConfigError(
            f"config.json: layer_types must name sliding_attention or full_attention for each of {layers} layers"
        )
    return tuple(int(window) if t == "sliding_attention" else None for t in types)
