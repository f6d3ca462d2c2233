"""Tiny random transformers models, dense or factorized, and the same values as a canonical parameter tree.

Every array axis of a model has a length of its own, so that a swapped axis is an error and not a coincidence. Norm scales and
biases are drawn too: at ones and zeros they could be left out without a test noticing.
"""

import copy
import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

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
    "phi3": (
        "Phi3",
        {"hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 52, "vocab_size": 73,
         "num_hidden_layers": 2, "sliding_window": 7, "partial_rotary_factor": 0.6},
    ),
    # Bounds near the size of what they bound, and a scale that is not that of the heads, so that each of them shows.
    "gemma2": (
        "Gemma2",
        {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10, "intermediate_size": 54,
         "vocab_size": 61, "num_hidden_layers": 2, "sliding_window": 5, "query_pre_attn_scalar": 14,
         "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5},
    ),
    "gemma3": (
        "Gemma3",
        {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 12, "intermediate_size": 50,
         "vocab_size": 65, "num_hidden_layers": 3, "sliding_window": 6, "query_pre_attn_scalar": 9,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
         "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 700.0},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 30.0}}},
    ),
    "opt": (
        "OPT",
        {"hidden_size": 42, "num_attention_heads": 3, "ffn_dim": 58, "vocab_size": 67, "num_hidden_layers": 2},
    ),
    "gpt2": (
        "GPT2",
        {"n_embd": 44, "n_head": 4, "n_inner": 56, "vocab_size": 59, "n_layer": 2, "layer_norm_epsilon": 1e-2},
    ),
}  # fmt: skip

# Models with names of their own: what all begin with, and canonical names -> theirs, in a layer without its number.
_OWN_NAMES: dict[str, tuple[str, dict[str, str]]] = {
    "opt": (
        "model.decoder.",
        {"norm": "final_layer_norm", "self_attn.o_proj": "self_attn.out_proj", "mlp.up_proj": "fc1", "mlp.down_proj": "fc2",
         "input_layernorm": "self_attn_layer_norm", "post_attention_layernorm": "final_layer_norm"},
    ),
    "gpt2": (
        "transformer.",
        {"norm": "ln_f", "embed_tokens": "wte", "embed_positions": "wpe", "self_attn.qkv_proj": "attn.c_attn",
         "self_attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj", "input_layernorm": "ln_1",
         "post_attention_layernorm": "ln_2"},
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
    text, head = "Text" if family == "Gemma3" else "", "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    config = getattr(transformers, f"{family}{text}Config")(**copy.deepcopy({**_COMMON, **fields, **overrides}))
    model = getattr(transformers, f"{family}{head}")(config).float().eval()
    randomize(model, seed)
    return model


def randomize(model: nn.Module, seed: int) -> None:
    """Draws every parameter: matrices that keep the size of activations, scales about one, biases about zero."""
    generator = torch.Generator().manual_seed(seed)
    about = 0.0 if model.config.model_type.startswith("gemma") else 1.0  # Gemma's norms scale with 1 + weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(0.3 * noise + (0.0 if name.endswith("bias") else about))


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
        path = hf_path(model.config.model_type, site)
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear | Conv1D)
        d_out, d_in = linear.weight.shape if isinstance(linear, nn.Linear) else linear.weight.shape[::-1]
        pair = nn.Sequential(nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=linear.bias is not None))
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
        array = tensor.detach().numpy()
        is_conv = name.endswith(".weight") and isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
        tensors[_canonical_name(model.config.model_type, name)] = (array.T if is_conv else array).copy()
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


def hf_path(model_type: str, site: str) -> str:
    """A site's module in the model: ``layers_0.self_attn.o_proj`` -> ``transformer.h.0.attn.c_proj`` in GPT-2."""
    prefix, own = _OWN_NAMES.get(model_type, ("model.", {}))
    if site == "lm_head":
        return site
    layer, _, path = site.partition(".")
    blocks = "h" if model_type == "gpt2" else "layers"
    return f"{prefix}{blocks}.{layer.removeprefix('layers_')}.{own.get(path, path)}"


def _canonical_name(model_type: str, name: str) -> str:
    prefix, own = _OWN_NAMES.get(model_type, ("model.", {}))
    found = re.fullmatch(r"(?:(?:layers|h)\.(\d+)\.)?(.*?)(?:\.([01]))?\.(\w+)", name.removeprefix(prefix))
    assert found is not None
    layer, path, index, leaf = found.groups()
    # A name in both places, such as OPT's final_layer_norm, is another one in a layer than behind them all.
    other = "norm" if layer else "post_attention_layernorm"
    path = {theirs: ours for ours, theirs in own.items() if ours != other}.get(path, path)
    if path.endswith("norm") and leaf == "weight":
        leaf = "scale"
    elif index is not None and leaf == "weight":
        leaf = {"0": "down", "1": "up"}[index]
    return f"{f'layers_{layer}.' if layer else ''}{path}.{leaf}"
