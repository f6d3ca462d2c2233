"""Basis Sharing's classes: a basis that the layers of a group have in common, and coefficients of every layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralMLP

BLOCKS = dict.fromkeys("qkvo", "self_attn") | dict.fromkeys(("gate", "up", "down"), "mlp")
SHARED, PRIVATE = ([0, 1], [2, 3]), ([0], [1], [2], [3])
GROUPS = {stem: PRIVATE if stem in ("o", "down") else SHARED for stem in BLOCKS}
RANKS = {stem: 5 + index for index, stem in enumerate(BLOCKS)}


class Basis(nn.Linear):
    def __init__(self, num_basis: int, nx: int):
        super().__init__(nx, num_basis, bias=False)


class Coefficient(nn.Linear):
    def __init__(self, nf: int, num_basis: int, bias: bool = False):
        super().__init__(num_basis, nf, bias=bias)


def _project(stem: str):
    def forward(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        basis = block.__dict__["bases"].get(stem, nn.Identity())
        coefficient = block._modules[f"{stem}_proj"]
        assert coefficient is not None
        return coefficient(basis(x))

    return forward


# Their forward passes apply the basis before what keeps the name of the dense projection.
_ATTENTION = {f"{stem}_proj": _project(stem) for stem in "qkvo"}
_MLP = {f"{stem}_proj": _project(stem) for stem in ("gate", "up", "down")}
_CLASSES = {
    LlamaAttention: type("ShareLlamaAttention", (LlamaAttention,), _ATTENTION),
    LlamaMLP: type("ShareLlamaMLP", (LlamaMLP,), _MLP),
    MistralAttention: type("ShareMistralAttention", (MistralAttention,), _ATTENTION),
    MistralMLP: type("ShareMistralMLP", (MistralMLP,), _MLP),
}


def share_bases(
    model: transformers.PreTrainedModel,
    groups: Mapping[str, Sequence[Sequence[int]]] = GROUPS,
    ranks: Mapping[str, Sequence[int]] | None = None,
    in_blocks: bool = True,
) -> dict[str, int]:
    """Replaces the projections named by the keys of ``groups``; returns ranks by module path.

    ``ranks`` are those of every group, by default `RANKS` for all groups. ``in_blocks``: the basis is a member of every block too,
    as in the Llama classes, not of the model alone.
    """
    torch.manual_seed(3)
    made = {}
    for stem, layers_of in groups.items():
        bases = nn.ModuleDict()
        model.model.add_module(f"{stem}_basis", bases)
        for number, layers in enumerate(layers_of):
            rank = RANKS[stem] if ranks is None else ranks[stem][number]
            basis = Basis(rank, _linear(model, stem, layers[0]).in_features)
            for layer in layers:
                bases[str(layer)] = basis
                block, dense = _block(model, stem, layer), _linear(model, stem, layer)
                if in_blocks:
                    block.add_module(f"{stem}_basis", basis)
                coefficient = Coefficient(dense.out_features, rank, dense.bias is not None)
                if dense.bias is not None:
                    coefficient.bias.copy_(dense.bias)
                block._modules[f"{stem}_proj"] = coefficient
                block.__dict__.setdefault("bases", {})[stem] = basis
                made[f"model.layers.{layer}.{BLOCKS[stem]}.{stem}_proj"] = rank
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            block.__dict__.setdefault("bases", {})
            block.__class__ = _CLASSES[type(block)]
    return made


def share_config(groups: Mapping[str, Sequence[Sequence[int]]] = GROUPS) -> dict[str, Any]:
    """What they add to the configuration."""
    return {f"{stem}_groups": list(map(list, groups[stem])) for stem in groups} | {
        f"num_basis_{stem}": RANKS[stem] for stem in groups
    }


def _linear(model: transformers.PreTrainedModel, stem: str, layer: int) -> nn.Linear:
    linear = _block(model, stem, layer)._modules[f"{stem}_proj"]
    assert isinstance(linear, nn.Linear)
    return linear


def _block(model: transformers.PreTrainedModel, stem: str, layer: int) -> nn.Module:
    return getattr(model.model.layers[layer], BLOCKS[stem])
