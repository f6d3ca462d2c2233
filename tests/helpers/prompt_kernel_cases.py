"""Calls of the ops of prompts and encoders over odd sizes, and what they must give: PyTorch in float64, one sequence at a time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional

from pallas_kernels import LayerNorm, Norm, PackedProjection, Projection, Visible, pack

TORCH_ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


@dataclasses.dataclass(frozen=True)
class PromptCase:
    """Attention of whole or half-read sequences.

    Attributes:
      ends: real tokens of each sequence, padding on the right.
      tokens: queries of a sequence; the keys are ``start`` more.
      left: places of padding on the left, in every sequence that is longer than it.
      ranks: of queries, keys and values where they come from rank space; of single heads if ``own``.
      rotary: rotates queries and keys.
    """

    heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    ends: tuple[int, ...]
    start: int = 0
    causal: bool = True
    window: int | None = None
    left: int = 0
    ranks: tuple[int, int, int] = (16, 16, 16)
    own: bool = True
    rotary: bool = False

    def visible(self) -> Visible:
        keys = self.tokens + self.start
        real = None
        if self.left:
            real = np.ones((len(self.ends), keys), bool)
            for row, end in enumerate(self.ends):
                real[row, : self.left if end > self.left else 0] = False
        return Visible(
            jnp.asarray(self.ends, jnp.int32), None if real is None else jnp.asarray(real),
            jnp.int32(self.start) if self.start else None, causal=self.causal, window=self.window,
        )  # fmt: skip


ATTENDED = {
    "causal": PromptCase(4, 2, 64, 200, (200, 120, 0)),
    "after others": PromptCase(2, 1, 80, 150, (333, 200), start=183),
    "window, padding on the left": PromptCase(2, 2, 20, 133, (133, 90, 1), causal=False, window=11, left=70),
    "causal window": PromptCase(2, 1, 128, 190, (190,), window=70),
    "both directions": PromptCase(3, 3, 32, 257, (257, 128), causal=False),
    "few queries": PromptCase(2, 1, 40, 7, (97,), start=90, left=20),
}
STREAMED = {
    "own ranks": PromptCase(4, 4, 16, 133, (133, 70, 0), causal=False),
    "ranks that differ, padding on the left": PromptCase(
        4, 2, 24, 133, (133, 90, 1), causal=False, left=70, ranks=(9, 20, 33)
    ),
    "rotation and a window": PromptCase(
        4, 2, 32, 133, (133, 80), causal=False, window=10, ranks=(40, 24, 16), own=False, rotary=True
    ),
    "causal, shared ranks": PromptCase(4, 2, 32, 150, (150, 40), ranks=(40, 24, 70), own=False),
    "heads of 64": PromptCase(2, 2, 64, 140, (140,), causal=False, ranks=(48, 48, 48), rotary=True),
}


def real_queries(visible: Visible, queries: int) -> np.ndarray:
    """bool [batch, queries]: those before their sequence's end."""
    return np.asarray(visible.starts)[:, None] + np.arange(queries) < np.asarray(visible.ends)[:, None]


def attended_call(case: PromptCase, dtype: str) -> tuple[Any, ...]:
    """Arguments of `attend`, random."""
    rng, batch = np.random.default_rng(0), len(case.ends)
    shapes = [(batch, case.heads, case.tokens), *[(batch, case.kv_heads, case.tokens + case.start)] * 2]
    return *(jnp.asarray(rng.standard_normal((*s, case.head_dim)), dtype) for s in shapes), case.visible()


def attended_exact(q: Any, k: Any, v: Any, visible: Visible) -> np.ndarray:
    """`attend` by PyTorch, its padded rows cut out."""
    mask = torch.tensor(np.asarray(visible.mask(q.shape[2], k.shape[2])))
    out = functional.scaled_dot_product_attention(*map(_wide, (q, k, v)), mask[:, None], enable_gqa=True)
    out = out.transpose(1, 2).flatten(2)
    return torch.where(mask.any(-1)[..., None], out, 0.0).numpy()


def streamed_call(case: PromptCase, dtype: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `attend_padded`, random; padding holds large numbers."""
    rng, batch, width = np.random.default_rng(1), len(case.ends), 40

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) * shape[-1] ** -0.5, dtype)

    members = []
    for heads, rank in zip((case.heads, case.kv_heads, case.kv_heads), case.ranks, strict=True):
        down = draw(heads * rank if case.own else rank, width)
        up = draw(heads, case.head_dim, rank) if case.own else draw(heads * case.head_dim, rank)
        members.append(Projection(down=down, up=up, bias=draw(heads * case.head_dim)))
    visible = case.visible()
    x = rng.standard_normal((batch, case.tokens, width))
    angles = rng.uniform(0, 6, (batch, case.tokens, case.head_dim // 2))
    tables = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    real = np.asarray(visible.mask(case.tokens, case.tokens).any(-1))
    x[~real] = 1e3
    options = {"head_dim": case.head_dim, "tables": tables if case.rotary else None}
    return (jnp.asarray(x, dtype), pack(members), visible), options


def streamed_exact(x: Any, qkv: PackedProjection, visible: Visible, *, head_dim: int, tables: Any) -> np.ndarray:
    """`attend_padded` by PyTorch."""
    first = _wide(qkv.first)
    heads = []
    for n, (up, bias, start, width) in enumerate(zip(qkv.ups, qkv.biases, qkv.starts, qkv.widths, strict=True)):
        latent, up = _wide(x) @ first[start : start + width].T, _wide(up)
        if up.ndim == 3:
            y = torch.einsum("btgr,gor->btgo", latent.unflatten(-1, (up.shape[0], -1)), up).flatten(2)
        else:
            y = latent @ up.T
        y = (y + _wide(bias)).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        if tables is not None and n < 2:
            turned = torch.complex(*y.chunk(2, -1)) * torch.complex(*map(_wide, tables))[:, None]
            y = torch.cat([turned.real, turned.imag], -1)
        heads.append(y)
    return attended_exact(*heads, visible)


@dataclasses.dataclass(frozen=True)
class FeedForwardCase:
    """Layers of some ranks, one for up or two for gate and up, and one for down."""

    tokens: int
    width: int
    inner: int
    ranks: tuple[int, ...]
    down_rank: int
    activation: str
    bias: bool = False
    residual: bool = False


FEED_FORWARDS = {
    "gelu": FeedForwardCase(133, 40, 104, (24,), 40, "gelu", bias=True, residual=True),
    "gated": FeedForwardCase(200, 64, 256, (40, 72), 88, "silu"),
    "gated gelu": FeedForwardCase(128, 64, 200, (32, 8), 24, "gelu", bias=True),
    "programs that share tokens": FeedForwardCase(133, 40, 1000, (24,), 40, "gelu", bias=True),
    "gated, programs that share tokens": FeedForwardCase(200, 64, 400, (40, 24), 88, "silu", residual=True),
    "tanh": FeedForwardCase(260, 64, 200, (16,), 24, "gelu_tanh", residual=True),
}


def feed_forward_call(case: FeedForwardCase, dtype: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `feed_forward`, random."""
    rng = np.random.default_rng(2)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) * shape[-1] ** -0.5, dtype)

    def projection(d_out: int, d_in: int, rank: int) -> Projection:
        return Projection(down=draw(rank, d_in), up=draw(d_out, rank), bias=draw(d_out) if case.bias else None)

    up = pack([projection(case.inner, case.width, rank) for rank in case.ranks])
    down = pack([projection(case.width, case.inner, case.down_rank)])
    x, residual = (jnp.asarray(rng.standard_normal((1, case.tokens, case.width)), dtype) for _ in range(2))
    return (x, up, down), {"activation": case.activation, "residual": residual if case.residual else None}


def feed_forward_exact(
    x: Any, up: PackedProjection, down: PackedProjection, *, activation: str, residual: Any
) -> np.ndarray:
    """`feed_forward` by PyTorch."""
    parts = _linear(_wide(x), up)
    inner = TORCH_ACTIVATIONS[activation](parts[0])
    (y,) = _linear(inner if len(parts) == 1 else inner * parts[1], down)
    return (y if residual is None else y + _wide(residual)).numpy()


def norm_exact(x: Any, norm: Norm | LayerNorm, added: Any = None) -> np.ndarray:
    """A norm by PyTorch, of a sum that is rounded to x's dtype first if something is added."""
    wide = _wide(x if added is None else x + added)
    shape = (wide.shape[-1],)
    if isinstance(norm, Norm):
        return functional.rms_norm(wide, shape, _wide(norm.scale), norm.eps).numpy()
    bias = None if norm.bias is None else _wide(norm.bias)
    return functional.layer_norm(wide, shape, _wide(norm.scale), bias, norm.eps).numpy()


def _linear(x: torch.Tensor, packed: PackedProjection) -> list[torch.Tensor]:
    members = zip(packed.ups, packed.biases, packed.starts, packed.widths, strict=True)
    return [
        functional.linear(
            x @ _wide(packed.first)[start : start + width].T, _wide(up), None if bias is None else _wide(bias)
        )
        for up, bias, start, width in members
    ]


def _wide(array: Any) -> torch.Tensor:
    return array if isinstance(array, torch.Tensor) else torch.tensor(np.asarray(array, np.float64))
