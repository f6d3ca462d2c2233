"""Base models of decoders: how each one's Hugging Face configuration is read, as fields of `flashsvd_jax.config.ModelConfig`.

What a configuration leaves out is what transformers' class for the model takes it for.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flashsvd_jax.config_fields import activation, flag, integer, number, optional_number
from flashsvd_jax.errors import ConfigError
from flashsvd_jax.rope_config import RopeConfig

MAX_LAYERS = 1024
Fields = dict[str, Any]

# The text models inside Gemma 3's that see leave out what their class has anyhow.
_GEMMA3_SIZES = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
}
_LAYER_TYPES = ("sliding_attention", "full_attention")


def _llama(kind: str, hf: Mapping[str, Any]) -> Fields:
    """Llama, Mistral, Qwen2 and Qwen3."""
    attention_bias = flag(hf, "attention_bias", False)
    sizes = _sizes(hf, {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(kind), 128 if kind == "qwen3" else None)
    return {
        **sizes,
        "rope": RopeConfig.from_hf(hf),
        "windows": _windows(kind, hf, sizes["num_layers"]),
        "activation": activation(hf, "hidden_act", "silu"),
        "qkv_bias": kind == "qwen2" or (kind in ("llama", "qwen3") and attention_bias),
        "o_bias": kind in ("llama", "qwen3") and attention_bias,
        "mlp_bias": kind == "llama" and flag(hf, "mlp_bias", False),
        "qk_norm": kind == "qwen3",
        "tie_embeddings": flag(hf, "tie_word_embeddings", False),
    }


def _phi3(kind: str, hf: Mapping[str, Any]) -> Fields:
    """Phi-3, Phi-3.5 and Phi-4. Its scaled rotations are LongRoPE, by whichever of three names."""
    sizes = _sizes(hf)
    rope = {"original_max_position_embeddings": 4096, **hf}
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters")
    if isinstance(scaling, Mapping) and scaling.get("rope_type", scaling.get("type")) in ("su", "yarn"):
        rope["rope_scaling"] = {**scaling, "rope_type": "longrope"}
    window = integer(hf, "sliding_window", 0)
    return {
        **sizes,
        "rope": RopeConfig.from_hf(rope, may_be_partial=True),
        "windows": (window or None,) * sizes["num_layers"],
        "activation": activation(hf, "hidden_act", "silu"),
        "tie_embeddings": flag(hf, "tie_word_embeddings", False),
        "fused": True,
    }


def _gemma(kind: str, hf: Mapping[str, Any]) -> Fields:
    """Gemma 2, and the text model of Gemma 3, whose layers with a window have a rotation of their own."""
    _refuse(hf, "use_bidirectional_attention", False, "every token sees the ones before it alone")
    hf = {**_GEMMA3_SIZES, **hf} if kind == "gemma3_text" else hf
    sizes = _sizes(hf, kv_heads=4, head_dim=256)
    layers, bias = sizes["num_layers"], flag(hf, "attention_bias", False)
    scalar = number(hf, "query_pre_attn_scalar", 256.0)
    fields = {
        **sizes,
        "activation": activation(hf, "hidden_activation", "gelu_pytorch_tanh"),
        "qkv_bias": bias,
        "o_bias": bias,
        "tie_embeddings": flag(hf, "tie_word_embeddings", True),
        "norm_offset": 1.0,
        "output_norms": True,
        "embedding_scale": sizes["hidden_size"] ** 0.5,
        "attention_scale": None if scalar == sizes["head_dim"] else scalar**-0.5,
    }
    if kind == "gemma2":
        capped = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, **hf}
        return {
            **fields,
            "rope": RopeConfig.from_hf(hf),
            "windows": _windows_by_type(hf, layers, 2),
            "attention_softcap": optional_number(capped, "attn_logit_softcapping"),
            "logit_softcap": optional_number(capped, "final_logit_softcapping"),
        }
    _refuse(hf, "attn_logit_softcapping", None, "Gemma 3 bounds no scores")
    windows = _windows_by_type(hf, layers, integer(hf, "sliding_window_pattern", 6))
    rope, window_rope = _ropes_by_type(hf)
    return {
        **fields,
        "qk_norm": True,
        "rope": rope,
        "window_rope": None if window_rope == rope else window_rope,
        "windows": windows,
        "logit_softcap": optional_number(hf, "final_logit_softcapping"),
    }


def _opt(kind: str, hf: Mapping[str, Any]) -> Fields:
    _refuse(hf, "do_layer_norm_before", True, "norms stand before attention and MLP; OPT-350m alone has them behind")
    _refuse(hf, "_remove_final_layer_norm", False, "a norm stands before the head")
    _refuse(hf, "layer_norm_elementwise_affine", True, "norms have scales and biases")
    hidden = integer(hf, "hidden_size")
    _refuse(hf, "word_embed_proj_dim", hidden, f"the embedding is as wide as the layers, {hidden}")
    bias = flag(hf, "enable_bias", True)
    return _learned_positions(
        hidden, integer(hf, "num_hidden_layers"), integer(hf, "num_attention_heads"),
        vocab_size=integer(hf, "vocab_size"),
        intermediate_size=integer(hf, "ffn_dim"),
        max_position=integer(hf, "max_position_embeddings"),
        norm_eps=1e-5,  # no field of its configuration
        activation=activation(hf, "activation_function", "relu"),
        tie_embeddings=flag(hf, "tie_word_embeddings", True),
        first_position=2,
        qkv_bias=bias, o_bias=bias, mlp_bias=bias,
    )  # fmt: skip


def _gpt2(kind: str, hf: Mapping[str, Any]) -> Fields:
    _refuse(hf, "add_cross_attention", False, "it has no encoder to look at")
    _refuse(hf, "scale_attn_by_inverse_layer_idx", False, "scores of every layer are scaled alike")
    hidden = integer(hf, "n_embd")
    return _learned_positions(
        hidden, integer(hf, "n_layer"), integer(hf, "n_head"),
        vocab_size=integer(hf, "vocab_size"),
        intermediate_size=integer(hf, "n_inner", 4 * hidden),
        max_position=integer(hf, "n_positions"),
        norm_eps=number(hf, "layer_norm_epsilon", 1e-5),
        activation=activation(hf, "activation_function", "gelu_new"),
        tie_embeddings=flag(hf, "tie_word_embeddings", True),
        fused=True, qkv_bias=True, o_bias=True, mlp_bias=True,
        attention_scale=None if flag(hf, "scale_attn_weights", True) else 1.0,
    )  # fmt: skip


BASE_MODELS: dict[str, Callable[[str, Mapping[str, Any]], Fields]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "phi3": _phi3,
    "gemma2": _gemma,
    "gemma3_text": _gemma,
    "opt": _opt,
    "gpt2": _gpt2,
}
"""``model_type`` -> its reader, which takes that type and the configuration."""


def _sizes(hf: Mapping[str, Any], kv_heads: int | None = None, head_dim: int | None = None) -> Fields:
    """Fields that most configurations have by the same names; ``kv_heads`` and ``head_dim`` are what absent keys mean."""
    heads, hidden = integer(hf, "num_attention_heads"), integer(hf, "hidden_size")
    # Null means as many as query heads; an absent key, what transformers' class for the model has.
    given = hf.get("num_key_value_heads", kv_heads)
    return {
        "vocab_size": integer(hf, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": integer(hf, "intermediate_size"),
        "num_layers": _num_layers(integer(hf, "num_hidden_layers")),
        "num_heads": heads,
        "num_kv_heads": integer({"num_key_value_heads": given}, "num_key_value_heads", heads),
        # Some models fix head_dim whatever the width; a config that leaves it out means that, not hidden // heads.
        "head_dim": integer(hf, "head_dim", 0) or head_dim or _equal_heads(hidden, heads, "; give head_dim"),
        "max_position": integer(hf, "max_position_embeddings"),
        "norm_eps": number(hf, "rms_norm_eps"),
    }


def _learned_positions(hidden: int, layers: int, heads: int, **fields: Any) -> Fields:
    """OPT and GPT-2: LayerNorms, a table of positions, and an MLP without a gate."""
    return {
        "hidden_size": hidden,
        "num_layers": _num_layers(layers),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": _equal_heads(hidden, heads),
        "rope": None,
        "windows": (None,) * layers,
        "learned_positions": True,
        "layer_norm": True,
        "gated": False,
        **fields,
    }


def _num_layers(layers: int) -> int:
    if layers > MAX_LAYERS:  # every layer is described one by one: a damaged number must not fill the memory
        raise ConfigError(f"config.json: num_hidden_layers {layers} is beyond the {MAX_LAYERS} that are supported")
    return layers


def _equal_heads(hidden: int, heads: int, advice: str = "") -> int:
    if hidden % heads:
        raise ConfigError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}{advice}")
    return hidden // heads


def _refuse(hf: Mapping[str, Any], name: str, computed: Any, reason: str) -> None:
    """Raises ConfigError where a field has another value than the one that is computed, which is also its default."""
    value = hf.get(name)
    if value is not None and value != computed:
        raise ConfigError(f"config.json: {name} {value!r} is not supported: {reason}")


def _windows(kind: str, hf: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Each layer's sliding window. Mistral windows every layer; Qwen only those named, and only when it says so."""
    if kind == "llama" or (kind.startswith("qwen") and not flag(hf, "use_sliding_window", False)):
        return (None,) * layers
    first = 0 if kind == "mistral" else integer(hf, "max_window_layers", 28, least=0)
    return _windowed(hf, [_LAYER_TYPES[layer < first] for layer in range(layers)])


def _windows_by_type(hf: Mapping[str, Any], layers: int, pattern: int) -> tuple[int | None, ...]:
    """Gemma's: one layer in ``pattern``, the last of them, attends to all."""
    return _windowed(hf, [_LAYER_TYPES[(layer + 1) % pattern == 0] for layer in range(layers)])


def _windowed(hf: Mapping[str, Any], types: list[str]) -> tuple[int | None, ...]:
    """Windows from the types of layers, which the configuration may name otherwise than ``types``."""
    layers = len(types)
    # An absent key means transformers' default, null means none.
    window = integer({"sliding_window": hf.get("sliding_window", 4096)}, "sliding_window", 0)
    if not window:
        return (None,) * layers
    given = hf.get("layer_types")
    named = types if given is None else given
    if not isinstance(named, list) or len(named) != layers or any(t not in _LAYER_TYPES for t in named):
        raise ConfigError(f"config.json: layer_types must name {' or '.join(_LAYER_TYPES)} for each of {layers} layers")
    return tuple(window if t == "sliding_attention" else None for t in named)


def _ropes_by_type(hf: Mapping[str, Any]) -> tuple[RopeConfig, RopeConfig]:
    """The rotations of layers that attend to all and of those with a window; before transformers 5, of two bases."""
    given, scaling = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
    sets = list(given.values()) if isinstance(given, Mapping) else [given]
    if not all(isinstance(s or {}, Mapping) for s in (given, *sets, scaling)) or not set(given) <= set(_LAYER_TYPES):
        raise ConfigError(
            f"config.json: rope_parameters must hold a set of values for each of {', '.join(_LAYER_TYPES)}"
        )
    local, full = (given.get(name) or {} for name in _LAYER_TYPES)
    theta, local_theta = number(hf, "rope_theta", 1e6), number(hf, "rope_local_base_freq", 1e4)
    of = lambda own, base: RopeConfig.from_hf({**hf, "rope_theta": base, "rope_parameters": own, "rope_scaling": None})  # noqa: E731
    return of({**full, **scaling}, theta), of(local, local_theta)
