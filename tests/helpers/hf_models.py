"""Tiny random transformers models, dense or factorized, and the same values as a canonical parameter tree.

Every array axis of a model has a length of its own, so that a swapped axis is an error and not a coincidence. Norm scales and
biases are drawn too: at ones and zeros they could be left out without a test noticing.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.factorization import Factorization
from flashsvd_jax.schema import nest, sites

_COMMON = {
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,  # large, so that it shows
    "eos_token_id": None,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}

_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "Llama",
        {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 52, "vocab_size": 71,
         "num_hidden_layers": 2},
    ),
    "llama_bias": (
        "Llama",
        {"hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 12, "intermediate_size": 52,
         "vocab_size": 67, "num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True},
    ),
    "llama_tied": (
        "Llama",
        {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6, "intermediate_size": 44,
         "vocab_size": 59, "num_hidden_layers": 2, "tie_word_embeddings": True},
    ),
    "mistral": (
        "Mistral",
        {"hidden_size": 30, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 14, "intermediate_size": 50,
         "vocab_size": 61, "num_hidden_layers": 2, "sliding_window": 5},
    ),
    "qwen2": (
        "Qwen2",
        {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "intermediate_size": 46,
         "vocab_size": 57, "num_hidden_layers": 2, "use_sliding_window": True, "sliding_window": 4,
         "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen3": (
        "Qwen3",
        {"hidden_size": 34, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 18, "intermediate_size": 54,
         "vocab_size": 63, "num_hidden_layers": 2, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
}  # fmt: skip

ARCHITECTURES = tuple(_ARCHITECTURES)
_DENSE_BEFORE, _DENSE_IN_LAST = ("k_proj",), ("q_proj", "o_proj", "gate_proj")


@dataclasses.dataclass(frozen=True)
class Reference:
    """A transformers model and what this project makes of the same values."""

    model: transformers.PreTrainedModel
    config: ModelConfig
    params: dict[str, Any]

    def logits(self, tokens: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Logits of whole sequences; positions count real tokens alone, as `generate` counts them."""
        mask = torch.tensor(np.ones_like(tokens) if attention_mask is None else attention_mask).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            return self.model(torch.tensor(tokens).long(), attention_mask=mask, position_ids=positions).logits.numpy()


def build_model(architecture: str, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """A float32 model in evaluation mode whose every parameter is random; overrides are fields of its config."""
    family, fields = _ARCHITECTURES[architecture]
    config = getattr(transformers, f"{family}Config")(**{**_COMMON, **fields, **overrides})
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    randomize(model, seed)
    return model


def randomize(model: nn.Module, seed: int) -> None:
    """Draws every parameter: matrices that keep the size of activations, scales about one, biases about zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(0.3 * noise + (0.0 if name.endswith("bias") else 1.0))


def mixed_ranks(config: ModelConfig) -> dict[str, int]:
    """A different rank for nearly every site; some sites stay dense, and an untied head is factorized."""
    ranks = {} if config.tie_embeddings else {"lm_head": 9}
    for layer in range(config.num_layers):
        dense = _DENSE_IN_LAST if layer == config.num_layers - 1 else _DENSE_BEFORE
        parts = [site.name for site in sites(config) if site.name.startswith(f"layers_{layer}.")]
        parts = [name for name in parts if not name.endswith(dense)]
        ranks |= {name: 5 + 3 * layer + 2 * i for i, name in enumerate(parts)}
    return ranks


def factorize(model: nn.Module, ranks: Mapping[str, int], seed: int = 1) -> None:
    """Replaces each named site's linear layer, in place, by two thin ones of random values; its bias stays."""
    generator = torch.Generator().manual_seed(seed)
    for site, rank in ranks.items():
        path = _hf_path(site)
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        pair = nn.Sequential(
            nn.Linear(linear.in_features, rank, bias=False),
            nn.Linear(rank, linear.out_features, bias=linear.bias is not None),
        )
        with torch.no_grad():
            for part in pair:
                part.weight.copy_(torch.randn(part.weight.shape, generator=generator) * part.in_features**-0.5)
            if linear.bias is not None:
                pair[1].bias.copy_(linear.bias)
        model.set_submodule(path, pair)


def canonical_tensors(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """The model's values by the flat names of the canonical tree."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        tensors[_canonical_name(name)] = tensor.detach().numpy().copy()
    return tensors


def reference_of(model: transformers.PreTrainedModel, ranks: Mapping[str, int] | None = None) -> Reference:
    """Pairs a model, factorized at ``ranks`` (or dense), with its configuration and canonical tree."""
    config = ModelConfig.from_hf(model.config.to_dict(), Factorization.of(ranks or {}))
    return Reference(model, config, nest(canonical_tensors(model)))


@functools.cache
def reference(architecture: str, factorized: bool = False) -> Reference:
    """The shared pair of an architecture; nothing in it may be changed."""
    model = build_model(architecture)
    if not factorized:
        return reference_of(model)
    ranks = mixed_ranks(ModelConfig.from_hf(model.config.to_dict()))
    factorize(model, ranks)
    return reference_of(model, ranks)


def _hf_path(site: str) -> str:
    return site if site == "lm_head" else "model." + site.replace("layers_", "layers.", 1)


def _canonical_name(name: str) -> str:
    name = name.removeprefix("model.").replace("layers.", "layers_", 1)
    parent, _, leaf = name.rpartition(".")
    if parent.endswith("norm"):
        return f"{parent}.scale"
    module, _, index = parent.rpartition(".")
    if index in ("0", "1"):
        part = {"0": "down", "1": "up"}[index] if leaf == "weight" else leaf
        return f"{module}.{part}"
    return name
