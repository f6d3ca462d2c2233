"""Palu's projection under its published names: a first factor for all heads, a second one for every group of them."""

from collections.abc import Sequence

import torch
from torch import nn


class HeadwiseLowRankModule(nn.Module):
    def __init__(self, ranks: Sequence[int], d_in: int, d_out: int, bias: bool):
        super().__init__()
        self.ranks = list(ranks)
        self.VT = nn.Linear(d_in, sum(ranks), bias=False)
        self.U = nn.ModuleList([nn.Linear(rank, d_out // len(ranks), bias=bias) for rank in ranks])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        latents = torch.split(self.VT(x), self.ranks, dim=-1)
        return torch.cat([second(latent) for second, latent in zip(self.U, latents, strict=True)], dim=-1)


def group_heads(model: nn.Module, ranks: dict[str, list[int]], seed: int = 4) -> None:
    """Replaces linear layers, named by module path, with random factors of these ranks by group."""
    torch.manual_seed(seed)
    for path, of_groups in ranks.items():
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        module = HeadwiseLowRankModule(of_groups, linear.in_features, linear.out_features, linear.bias is not None)
        for parameter in module.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        model.set_submodule(path, module)
