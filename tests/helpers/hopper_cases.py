"""Calls that Hopper's kernels of prompts serve, small, and what they must give: PyTorch in float64."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from prompt_kernel_cases import TORCH_ACTIVATIONS, FeedForwardCase, PromptCase

from pallas_kernels import PackedProjection, Projection, pack


@dataclasses.dataclass(frozen=True)
class GatedCase:
    """A gate and what it gates, of some ranks."""

    tokens: int
    width: int
    inner: int
    ranks: tuple[int, int]
    activation: str = "silu"


@dataclasses.dataclass(frozen=True)
class HeadsCase:
    """Queries, keys and values of sequences, of some ranks."""

    batch: int
    tokens: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ranks: tuple[int, int, int]


GATED = {
    "ranks that differ": GatedCase(256, 40, 320, (128, 64)),
    "gelu": GatedCase(128, 40, 64, (64, 64), "gelu"),
    "tanh": GatedCase(128, 40, 64, (64, 64), "gelu_tanh"),
}
ATTENDED = {
    "one tile": PromptCase(2, 1, 64, 128, (128,)),
    "after others, grouped": PromptCase(4, 2, 64, 256, (439, 300), start=183),
    "after others, of which some ended": PromptCase(2, 1, 64, 128, (311, 183, 90, 0), start=183),
    "heads of 128, a tile of padding": PromptCase(2, 2, 128, 256, (256, 100)),
}
HEADS = {
    "ranks that differ, grouped": HeadsCase(2, 128, 40, 2, 1, 128, (128, 64, 192)),
    "heads of 64": HeadsCase(1, 256, 40, 4, 2, 64, (64, 64, 64)),
}
FEED_FORWARDS = {
    "a bias and what is added": FeedForwardCase(256, 128, 192, (120,), 72, "gelu", bias=True, residual=True),
    "gated, ranks that differ": FeedForwardCase(384, 128, 64, (72, 136), 64, "silu", bias=True),
    "more latents behind": FeedForwardCase(128, 64, 128, (24,), 200, "gelu_tanh", residual=True),
}


def _draw(rng: np.random.Generator, dtype: str, *shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape) * shape[-1] ** -0.5, dtype)


def _packed(rng: np.random.Generator, dtype: str, width: int, *members: tuple[int, int]) -> PackedProjection:
    return pack([Projection(down=_draw(rng, dtype, r, width), up=_draw(rng, dtype, n, r)) for n, r in members])


def gated_call(case: GatedCase, dtype: str) -> tuple[Any, ...]:
    """Arguments of `project`."""
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((1, case.tokens, case.width)), dtype)
    return x, _packed(rng, dtype, case.width, *((case.inner, rank) for rank in case.ranks))


def gated_exact(x: Any, packed: PackedProjection, activation: str) -> np.ndarray:
    """The same by PyTorch."""
    gating, gated = products_exact(x, packed)
    return (TORCH_ACTIVATIONS[activation](gating) * gated).numpy()


def heads_call(case: HeadsCase, dtype: str) -> tuple[Any, ...]:
    """Arguments of `project_heads`."""
    rng = np.random.default_rng(4)
    counts = [case.heads * case.head_dim, *[case.kv_heads * case.head_dim] * 2]
    packed = _packed(rng, dtype, case.width, *zip(counts, case.ranks, strict=True))
    x = jnp.asarray(rng.standard_normal((case.batch, case.tokens, case.width)), dtype)
    angles = rng.uniform(0, 6, (case.batch, case.tokens, case.head_dim // 2))
    return x, packed, *(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin)), case.head_dim


def heads_exact(x: Any, packed: PackedProjection, cos: Any, sin: Any, head_dim: int) -> list[np.ndarray]:
    """The same by PyTorch, the last two results once more."""
    turn = torch.complex(_wide(cos), _wide(sin))[:, None]
    found = []
    for number, y in enumerate(products_exact(x, packed)):
        heads = y.unflatten(-1, (-1, head_dim)).transpose(1, 2)
        if number < 2:
            turned = torch.complex(*heads.chunk(2, -1)) * turn
            heads = torch.cat([turned.real, turned.imag], -1)
        found.append(heads.numpy())
    return [*found, *found[1:]]


def products_exact(x: Any, packed: PackedProjection) -> list[torch.Tensor]:
    """Each member's product."""
    first = _wide(packed.first)
    return [
        _wide(x) @ first[start : start + width].T @ _wide(up).T
        for up, start, width in zip(packed.ups, packed.starts, packed.widths, strict=True)
    ]


def _wide(array: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(array, np.float64))
