"""Shapes of published models, for measurements with random weights; Hugging Face configurations without the rest."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.errors import RequestError
from flashsvd_jax.factorization import Factorization
from flashsvd_jax.schema import Site, schema, sites, stored_names

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
    "phi-4": {
        "model_type": "phi3", "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 10,
        "intermediate_size": 17920, "vocab_size": 100352, "max_position_embeddings": 16384, "rms_norm_eps": 1e-5,
        "rope_theta": 250000.0,
    },
    "gemma-2-9b": {
        "model_type": "gemma2", "hidden_size": 3584, "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 256, "intermediate_size": 14336, "vocab_size": 256000, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
        "sliding_window": 4096, "query_pre_attn_scalar": 256,
    },
    "gemma-3-12b": {
        "model_type": "gemma3_text", "hidden_size": 3840, "num_hidden_layers": 48, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 256, "intermediate_size": 15360, "vocab_size": 262208,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "sliding_window": 1024, "query_pre_attn_scalar": 256,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "opt-6.7b": {
        "model_type": "opt", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "ffn_dim": 16384,
        "vocab_size": 50272, "max_position_embeddings": 2048,
    },
    "gpt2-xl": {
        "model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25, "vocab_size": 50257, "n_positions": 1024,
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

    Raises:
      RequestError: an unknown name, or a ratio outside (0, 1].
    """
    config = _dense_config(name, ratio)
    if ratio == 1:
        return config
    return _with_ranks(name, {site.name: uniform_rank(site, ratio) for site in layer_sites(config)})


def mixed_config(name: str, ratio: float, seed: int = 0) -> ModelConfig:
    """The same number of parameters spread unevenly, as methods that choose a rank a site (ASVD) spread it.

    Each site's rank is drawn from 30 to 110 % of the rank that `shape_config` gives it, then all are scaled by one factor until
    the projections hold as many parameters as there, within 1 %. One seed gives one set of ranks on every machine.

    Raises:
      RequestError: an unknown name, or a ratio outside (0, 1).
    """
    config = _dense_config(name, ratio)
    if ratio == 1:
        raise RequestError("a model of mixed ranks needs a ratio below 1")
    projections = layer_sites(config)
    uniform = np.array([uniform_rank(site, ratio) for site in projections])
    cost = np.array([site.d_out + site.d_in for site in projections])
    largest = np.array([min(site.d_out, site.d_in) for site in projections])
    drawn = uniform * np.random.default_rng(seed).uniform(0.3, 1.1, len(projections))
    budget, scale = (uniform * cost).sum(), 1.0
    for _ in range(20):  # more than once, because ranks are whole numbers with a largest one
        ranks = np.clip(np.rint(scale * drawn), 1, largest)
        scale *= budget / (ranks * cost).sum()
    ranks = np.clip(np.rint(scale * drawn), 1, largest).astype(int)
    return _with_ranks(name, {site.name: int(rank) for site, rank in zip(projections, ranks, strict=True)})


def partly_dense_config(name: str, ratio: float, seed: int = 0) -> ModelConfig:
    """The same number of parameters with every eighth site left dense, as greedy allocation and break-even ranks leave some.

    Which ones is drawn; all others have the ranks of one smaller ratio. One seed gives one model on every machine.

    Raises:
      RequestError: an unknown name, or a ratio outside (0, 1) or so small that the dense sites alone hold more.
    """
    config = _dense_config(name, ratio)
    projections = layer_sites(config)
    drawn = np.random.default_rng(seed).permutation(len(projections))[: len(projections) // 8]
    dense = {projections[index].name for index in drawn}
    sizes = {site.name: site.d_out * site.d_in for site in projections}
    left, rest = ratio * sum(sizes.values()) - sum(sizes[n] for n in dense), [n for n in sizes if n not in dense]
    if ratio == 1 or left <= 0:
        raise RequestError(
            f"a model with dense sites among low-rank ones needs a ratio below 1 that holds them, not {ratio}"
        )
    smaller = left / sum(sizes[n] for n in rest)
    return _with_ranks(name, {site.name: uniform_rank(site, smaller) for site in projections if site.name in rest})


def layer_sites(config: AnyConfig) -> list[Site]:
    """Every projection of the layers, in the order it is computed; not the head."""
    return [site for site in sites(config) if site.name.startswith("layers_")]


def by_kind(projections: Iterable[Site]) -> dict[str, list[Site]]:
    """Projections of layers by what they are in theirs, such as ``self_attn.q_proj``."""
    found: dict[str, list[Site]] = {}
    for site in projections:
        found.setdefault(site.name.partition(".")[2], []).append(site)
    return found


def uniform_rank(site: Site, ratio: float) -> int:
    """The rank at which two factors hold ``ratio`` of a weight's parameters, rounded down, at least 1."""
    return max(1, int(ratio * site.d_out * site.d_in / (site.d_out + site.d_in)))


def kept_share(config: ModelConfig) -> float:
    """Parameters of the layers' projections, but biases, as a share of the dense ones, to four digits; shared ones count once."""
    return round(_projection_params(config) / _projection_params(config.dense()), 4)


def rank_layout(config: ModelConfig) -> str:
    """``dense``, or ``partly dense`` if some projections are; ``uniform`` if sites of one shape have one rank; else ``mixed``."""
    ranks = config.factorization.rank_by_site
    if not ranks:
        return "dense"
    projections = layer_sites(config)
    if any(site.name not in ranks for site in projections):
        return "partly dense"
    found = {(site.d_out, site.d_in, ranks.get(site.name)) for site in projections}
    return "uniform" if len(found) == len({(site.d_out, site.d_in) for site in projections}) else "mixed"


def _dense_config(name: str, ratio: float) -> ModelConfig:
    """A published shape, after the checks that every ratio goes through."""
    if name not in SHAPES:
        raise RequestError(f"no shape named {name!r}; known: {', '.join(SHAPES)}")
    if not 0 < ratio <= 1:
        raise RequestError(f"ratio must be above 0 and at most 1, not {ratio}")
    return ModelConfig.from_hf(SHAPES[name])


def _with_ranks(name: str, ranks: dict[str, int]) -> ModelConfig:
    return ModelConfig.from_hf(SHAPES[name], Factorization.of(ranks))


def _projection_params(config: ModelConfig) -> int:
    """Of weights and factors; biases are kept whatever the ranks."""
    specs, parts = schema(config), (".weight", ".down", ".up")
    names = (name for name in stored_names(config) if name.startswith("layers_") and name.endswith(parts))
    return sum(specs[name].size for name in names)
