"""Dobi-SVD's remapping in PyTorch: factors as 8-bit codes and a scale for every vector, a tail in float16."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def codebook() -> torch.Tensor:
    """The signed dynamic map of 8 bits: for i from 0 to 6, centres of 2^i equal parts of [0.1, 1], times 10^(i - 6)."""
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        centres = (edges[:-1] + edges[1:]) / 2.0
        values += [10.0 ** (i - 6) * centres, -(10.0 ** (i - 6)) * centres]
    return torch.cat(values).sort().values


class SVDTransformLayerRemapping(nn.Module):
    """A projection by two factors that were decoded to float16; its forward pass here is in float32."""

    def __init__(self, entry: Mapping[str, Any]):
        super().__init__()
        self.us, self.vt = (nn.Parameter(factor.float(), requires_grad=False) for factor in decode(entry))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.vt.T @ self.us.T


def decode(entry: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """us [d_out, rank] and vt [rank, d_in] in float16."""
    code = codebook()
    us = code[entry["us_quan"].long()].T * entry["us_absmax"].float()
    vt = torch.diag(entry["vt_absmax"].float()) @ code[entry["vt_quan"].long()]
    if entry["tuple_info"] is not None:
        side, tail = entry["tuple_info"]
        us = torch.cat((us, tail)) if side == "us" else us
        vt = torch.cat((vt, tail), dim=1) if side == "vt" else vt
    return us.half(), vt.half()


def encode(weight: torch.Tensor, rank: int) -> dict[str, Any]:
    """The singular values go to the longer factor, and what is longer of it than the other is not encoded."""
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    us, vt, s = u[:, :rank], vt[:rank], s[:rank]
    d_out, d_in = weight.shape
    if d_out >= d_in:
        us = us * s
    else:
        vt = s[:, None] * vt
    length, tail = min(d_out, d_in), None
    if d_out != d_in:
        tail = ("us", us[length:].half()) if d_out > d_in else ("vt", vt[:, length:].half())
    us_quan, us_absmax = _quantize(us[:length].T)
    vt_quan, vt_absmax = _quantize(vt[:, :length])
    return {
        "us_quan": us_quan,
        "vt_quan": vt_quan,
        "us_absmax": us_absmax,
        "vt_absmax": vt_absmax,
        "tuple_info": tail,
    }


def remap(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Replaces linear layers by their decoded factors; returns the codes by module path."""
    codes = {}
    for path, rank in ranks.items():
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear) and linear.bias is None
        codes[path] = encode(linear.weight, rank)
        model.set_submodule(path, SVDTransformLayerRemapping(codes[path]))
    return codes


def _quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    absmax = rows.abs().amax(1)
    distances = (rows / absmax[:, None]).unsqueeze(-1) - codebook()
    return distances.abs().argmin(-1).to(torch.uint8), absmax.half()
