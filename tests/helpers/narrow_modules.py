"""Attention and feed-forward layers narrower than the base model's, as Eigen Attention and MoDeGPT compute them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, rotate_half


def _draw(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return module


def _put(narrow: torch.Tensor, places: torch.Tensor, full: int) -> torch.Tensor:
    """Heads [tokens, heads * width] with their columns at ``places`` [heads, width] of full ones, and zeros elsewhere."""
    heads, width = places.shape
    whole = torch.zeros(len(narrow), heads, full)
    return whole.scatter(2, places.expand(len(narrow), heads, width), narrow.unflatten(1, (heads, width))).flatten(1)


def _cut(x: torch.Tensor, heads: int, width: int) -> torch.Tensor:
    """The first columns of full heads."""
    return x.unflatten(1, (heads, -1))[..., :width].flatten(1)


def _heads(x: torch.Tensor, width: int) -> torch.Tensor:
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)


class LlamaEigenAttention(nn.Module):
    """Keys go through one small matrix that all heads share; the values' is in the output projection already."""

    def __init__(self, old: LlamaAttention, rank_kq: int, rank_v: int):
        super().__init__()
        config = old.config
        kv, self.head_dim, bias = config.num_key_value_heads, old.head_dim, config.attention_bias
        self.widths, hidden = (rank_kq // kv, rank_v // kv), config.hidden_size
        self.q_proj = old.q_proj
        self.k_proj_low = nn.Linear(hidden, rank_kq, bias=bias)
        self.k_proj_up = nn.Linear(self.widths[0], self.head_dim, bias=False)
        self.v_proj_low = nn.Linear(hidden, rank_v, bias=bias)
        self.o_proj_up = nn.Linear(config.num_attention_heads * self.widths[1], hidden, bias=bias)
        for module in (self.k_proj_low, self.k_proj_up, self.v_proj_low, self.o_proj_up):
            _draw(module)

    def forward(self, hidden_states: torch.Tensor, position_embeddings: Any, **_: Any) -> tuple[torch.Tensor, None]:
        cos, sin = (table[:, None] for table in position_embeddings)
        q = _heads(self.q_proj(hidden_states), self.head_dim)
        k = self.k_proj_up(_heads(self.k_proj_low(hidden_states), self.widths[0]))
        v = _heads(self.v_proj_low(hidden_states), self.widths[1])
        q, k = (x * cos + rotate_half(x) * sin for x in (q, k))
        return self.o_proj_up(_attend(q, k, v, self.head_dim**-0.5)), None

    def project(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """What a projection of full heads makes of x [tokens, d_in] if it means the same."""
        if name == "k_proj":
            return self.k_proj_up(self.k_proj_low(x).unflatten(1, (-1, self.widths[0]))).flatten(1)
        if name == "v_proj":
            columns = torch.arange(self.widths[1]).tile(self.v_proj_low.out_features // self.widths[1], 1)
            return _put(self.v_proj_low(x), columns, self.head_dim)
        return (
            self.q_proj(x) if name == "q_proj" else self.o_proj_up(_cut(x, x.shape[1] // self.head_dim, self.widths[1]))
        )


class NarrowAttention(nn.Module):
    """MoDeGPT's: ``kept`` [kv_heads, width] are the columns that its heads were cut down to, rotated as such."""

    def __init__(self, old: LlamaAttention, kept: torch.Tensor):
        super().__init__()
        config, self.kept, bias = old.config, kept, old.config.attention_bias
        self.width, self.head_dim = kept.shape[1], old.head_dim
        for name, count in zip("qkv", (config.num_attention_heads, *[config.num_key_value_heads] * 2), strict=True):
            setattr(self, f"{name}_proj", _draw(nn.Linear(config.hidden_size, count * self.width, bias=bias)))
        self.o_proj = _draw(nn.Linear(config.num_attention_heads * self.width, config.hidden_size, bias=bias))

    def forward(self, hidden_states: torch.Tensor, position_embeddings: Any, **_: Any) -> tuple[torch.Tensor, None]:
        q, k, v = (_heads(getattr(self, f"{name}_proj")(hidden_states), self.width) for name in "qkv")

        def rotated(x: torch.Tensor) -> torch.Tensor:
            columns = self.kept.repeat_interleave(x.shape[1] // len(self.kept), 0)
            cos, sin = (table[:, :, columns].transpose(1, 2) for table in position_embeddings)
            return x * cos + rotate_half(x) * sin

        return self.o_proj(_attend(rotated(q), rotated(k), v, self.width**-0.5)), None

    def project(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """What a projection of full heads makes of x [tokens, d_in] if it means the same."""
        if name == "o_proj":
            return self.o_proj(_cut(x, x.shape[1] // self.head_dim, self.width))
        y = getattr(self, name)(x)
        columns = self.kept.repeat_interleave(y.shape[1] // self.kept.numel(), 0)
        scale = (self.head_dim / self.width) ** 0.5 if name == "q_proj" else 1.0
        return scale * _put(
            y, torch.arange(self.width).expand_as(columns) if name == "v_proj" else columns, self.head_dim
        )


class NarrowMLP(nn.Module):
    def __init__(self, old: LlamaMLP, width: int, full: int):
        super().__init__()
        self.full = full
        hidden, bias = old.config.hidden_size, old.config.mlp_bias
        self.gate_proj = _draw(nn.Linear(hidden, width, bias=bias))
        self.up_proj = _draw(nn.Linear(hidden, width, bias=bias))
        self.down_proj = _draw(nn.Linear(width, hidden, bias=bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    def project(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The same as a layer as wide as the widest."""
        if name == "down_proj":
            return self.down_proj(x[:, : self.down_proj.in_features])
        y = getattr(self, name)(x)
        return nn.functional.pad(y, (0, self.full - y.shape[1]))


def eigen_attention(model: nn.Module, ranks: Sequence[tuple[int, int]], seed: int = 5) -> None:
    """Replaces every layer's attention, of these ranks of keys and of values."""
    torch.manual_seed(seed)
    for layer, (rank_kq, rank_v) in zip(model.model.layers, ranks, strict=True):
        layer.self_attn = LlamaEigenAttention(layer.self_attn, rank_kq, rank_v)


def narrow(
    model: nn.Module, kept: Sequence[torch.Tensor], widths: Sequence[int], seed: int = 6
) -> dict[str, list[int]]:
    """Replaces every layer's attention and feed-forward layer; returns what MoDeGPT adds to the configuration."""
    torch.manual_seed(seed)
    added: dict[str, list[int]] = {f"{name}_ranks": [] for name in ("q", "k", "v", "o", "gate")}
    for layer, columns, width in zip(model.model.layers, kept, widths, strict=True):
        layer.self_attn, layer.mlp = NarrowAttention(layer.self_attn, columns), NarrowMLP(layer.mlp, width, max(widths))
        attention = layer.self_attn
        for name in "qkv":
            added[f"{name}_ranks"].append(getattr(attention, f"{name}_proj").out_features)
        added["o_ranks"].append(attention.o_proj.in_features)
        added["gate_ranks"].append(width)
    return added
