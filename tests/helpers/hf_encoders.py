"""Tiny random encoders of transformers, dense or factorized, and the same values as a canonical parameter tree.

Every array axis of a model has a length of its own, so that a swapped axis is an error and not a coincidence.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from hf_models import randomize
from torch import nn

from flashsvd_jax.encoder_config import EncoderConfig
from flashsvd_jax.factorization import Factorization
from flashsvd_jax.schema import nest, sites

_COMMON = {"pad_token_id": 0, "attn_implementation": "eager"}
_BERT = {
    "hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 54, "vocab_size": 71, "num_hidden_layers": 2,
    "max_position_embeddings": 37, "type_vocab_size": 3, "layer_norm_eps": 1e-2,
}  # fmt: skip

_MODERNBERT = {
    "hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 28, "vocab_size": 71, "num_hidden_layers": 4,
    "max_position_embeddings": 37, "norm_eps": 1e-2, "local_attention": 6, "bos_token_id": 1, "eos_token_id": 2,
    "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip

_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _BERT),
    "bert_tanh": ("Bert", {**_BERT, "hidden_act": "gelu_new", "tie_word_embeddings": False, "num_labels": 4}),
    "roberta": ("Roberta", {**_BERT, "pad_token_id": 3, "type_vocab_size": 1, "hidden_act": "relu", "num_labels": 3}),
    "xlm_roberta": ("XLMRoberta", {**_BERT, "pad_token_id": 1, "num_hidden_layers": 1}),
    "distilbert": (
        "DistilBert",
        {"dim": 36, "n_heads": 4, "hidden_dim": 46, "vocab_size": 67, "n_layers": 2, "max_position_embeddings": 35},
    ),
    "modernbert": ("ModernBert", _MODERNBERT),
    "modernbert_bias": (
        "ModernBert",
        {
            **_MODERNBERT,
            "norm_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "classifier_bias": True,
            "decoder_bias": False,
            "hidden_activation": "silu",
            "classifier_pooling": "mean",
            "classifier_activation": "relu",
            "layer_types": ["sliding_attention", "full_attention"],
            "num_hidden_layers": 2,
            "tie_word_embeddings": False,
        },
    ),
}

# From names in transformers to canonical ones, in this order; its models' own names for the body are cut off first.
_NAMES = (
    (r"^(?:bert|roberta|distilbert|model)\.", ""),
    (r"^embeddings\.tok_embeddings", "embed_tokens"),
    (r"^embeddings\.norm", "embed_norm"),
    (r"^layers\.(\d+)", r"layers_\1"),
    (r"\.attn\.Wqkv", ".self_attn.qkv_proj"),
    (r"\.attn\.Wo", ".self_attn.o_proj"),
    (r"\.attn_norm", ".self_attn_norm"),
    (r"\.mlp\.Wi", ".mlp.gate_up_proj"),
    (r"\.mlp\.Wo", ".mlp.down_proj"),
    (r"^final_norm", "norm"),
    (r"^decoder", "head.out"),
    (r"^embeddings\.word_embeddings", "embed_tokens"),
    (r"^embeddings\.position_embeddings", "embed_positions"),
    (r"^embeddings\.token_type_embeddings", "embed_types"),
    (r"^embeddings\.LayerNorm", "embed_norm"),
    (r"^(?:encoder|transformer)\.layer\.(\d+)", r"layers_\1"),
    (r"attention\.self\.([qkv])(?:uery|ey|alue)", r"self_attn.\1_proj"),
    (r"attention\.([qkv])_lin", r"self_attn.\1_proj"),
    (r"attention\.(?:output\.dense|out_lin)", "self_attn.o_proj"),
    (r"attention\.output\.LayerNorm|sa_layer_norm", "self_attn_norm"),
    (r"intermediate\.dense|ffn\.lin1", "mlp.up_proj"),
    (r"^(layers_\d+)\.(?:output\.dense|ffn\.lin2)", r"\1.mlp.down_proj"),
    (r"^(layers_\d+)\.(?:output\.LayerNorm|output_layer_norm)", r"\1.mlp_norm"),
    (r"^(?:cls\.predictions\.transform|lm_head|pooler|classifier)\.dense|^(?:vocab_transform|pre_classifier)", "head.dense"),
    (r"^(?:cls\.predictions\.transform\.LayerNorm|lm_head\.layer_norm|vocab_layer_norm)", "head.norm"),
    (r"^(?:cls\.predictions\.decoder|lm_head\.decoder|vocab_projector|classifier(?:\.out_proj)?)", "head.out"),
    (r"norm\.weight$", "norm.scale"),
    (r"\.0\.weight$", ".down"),
    (r"\.1\.weight$", ".up"),
    (r"\.1\.bias$", ".bias"),
)  # fmt: skip
_UNUSED = re.compile(r"^(?:cls\.predictions\.bias|lm_head\.bias|cls\.seq_relationship\..*)$")

ARCHITECTURES = tuple(_ARCHITECTURES)
HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification")


@dataclasses.dataclass(frozen=True)
class EncoderReference:
    """A transformers encoder and what this project makes of the same values."""

    model: Any
    config: EncoderConfig
    params: dict[str, Any]

    def outputs(self, tokens: np.ndarray, mask: np.ndarray, types: np.ndarray | None = None) -> np.ndarray:
        """Hidden states or logits; positions count real tokens alone, and transformers is told so."""
        real = torch.tensor(mask).long()
        first = self.config.first_position
        given = {"position_ids": (real.cumsum(1) - 1).clamp(min=0) + first} if self.config.learned_positions else {}
        if types is not None:
            given["token_type_ids"] = torch.tensor(types).long()
        with torch.no_grad():
            return self.model(torch.tensor(tokens).long(), attention_mask=real, **given)[0].numpy()


def build_encoder(architecture: str, head: str = "Model", seed: int = 0, **overrides: Any) -> Any:
    """A float32 model in evaluation mode whose every parameter is random; overrides are fields of its config."""
    family, fields = _ARCHITECTURES[architecture]
    config = getattr(transformers, f"{family}Config")(**{**_COMMON, **fields, **overrides})
    config.architectures = [f"{family}{head}"]
    model = getattr(transformers, f"{family}{head}")(config).float().eval()
    randomize(model, seed)
    return model


def canonical_name(name: str) -> str:
    """What this project calls a parameter or a module of a transformers encoder."""
    for pattern, text in _NAMES:
        name = re.sub(pattern, text, name)
    return name


def canonical_encoder(model: Any) -> dict[str, np.ndarray]:
    """The model's values by the flat names of the canonical tree; what its configuration says is not used is left out."""
    config = EncoderConfig.from_hf(model.config.to_dict())
    tensors = {}
    for name, tensor in model.state_dict().items():
        new = canonical_name(name)
        unused = _UNUSED.match(name) or (config.head is None and new.startswith("head."))
        if not unused and not (new == "head.out.weight" and config.tie_embeddings):
            tensors[new] = tensor.detach().numpy().copy()
    return tensors


def mixed_encoder_ranks(config: EncoderConfig) -> dict[str, int]:
    """A different rank for nearly every site; every fourth one stays dense, another one in each layer."""
    names = [site.name for site in sites(config)]
    return {name: 4 + i for i, name in enumerate(names) if i % 4 != 1}


def factorize_encoder(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Replaces each named site's linear layer, in place, by two thin ones of random values; its bias stays."""
    generator = torch.Generator().manual_seed(1)
    linears = {canonical_name(name): name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for site, rank in ranks.items():
        linear = model.get_submodule(linears[site])
        has_bias = linear.bias is not None
        pair = nn.Sequential(
            nn.Linear(linear.in_features, rank, bias=False), nn.Linear(rank, linear.out_features, bias=has_bias)
        )
        with torch.no_grad():
            for part in pair:
                part.weight.copy_(torch.randn(part.weight.shape, generator=generator) * part.in_features**-0.5)
            if has_bias:
                pair[1].bias.copy_(linear.bias)
        model.set_submodule(linears[site], pair)


@functools.cache
def encoder_reference(architecture: str, head: str = "Model", factorized: bool = False) -> EncoderReference:
    """The shared pair of an architecture; nothing in it may be changed."""
    model = build_encoder(architecture, head)
    hf = model.config.to_dict()
    ranks = mixed_encoder_ranks(EncoderConfig.from_hf(hf)) if factorized else {}
    factorize_encoder(model, ranks)
    config = EncoderConfig.from_hf(hf, Factorization.of(ranks))
    return EncoderReference(model, config, nest(canonical_encoder(model)))
