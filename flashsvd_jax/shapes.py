"""Shapes of published models, for measurements with random weights; Hugging Face configurations without the rest."""

from typing import Any

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.errors import RequestError
from flashsvd_jax.factorization import Factorization
from flashsvd_jax.schema import sites

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        **_LLAMA, "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
    },
    "llama-3.1-8b": {
        **_LLAMA, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    },
    "qwen3-8b": {
        **_LLAMA, "model_type": "qwen3", "num_hidden_layers": 36, "num_key_value_heads": 8, "head_dim": 128,
        "intermediate_size": 12288, "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    },
    "tiny": {
        "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "intermediate_size": 704, "vocab_size": 4096, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
}  # fmt: skip


def shape_config(name: str, ratio: float = 1.0) -> ModelConfig:
    """A published shape with every projection of its layers at one ratio of kept parameters; 1 is dense.

    Ranks are ``floor(ratio * d_out * d_in / (d_out + d_in))``, as SVD-LLM and FlashSVD choose them; the head stays dense.
    """
    if name not in SHAPES:
        raise RequestError(f"no shape named {name!r}; known: {', '.join(SHAPES)}")
    if not 0 < ratio <= 1:
        raise RequestError(f"ratio must be above 0 and at most 1, not {ratio}")
    config = ModelConfig.from_hf(SHAPES[name])
    if ratio == 1:
        return config
    ranks = {
        site.name: max(1, int(ratio * site.d_out * site.d_in / (site.d_out + site.d_in)))
        for site in sites(config)
        if site.name.startswith("layers_")
    }
    return ModelConfig.from_hf(SHAPES[name], Factorization.of(ranks))
