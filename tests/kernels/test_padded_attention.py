"""Attention of padded sequences against PyTorch: padding on either side, biases of grouped heads, windows, rotation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pallas_kernels import PackedProjection, Projection, Visible, attend_padded, pack, prefer

BATCH, TOKENS, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 5, 133, 22, 4, 2, 6
LEFT = 70  # more than a tile of any kernel, so that some sequence has a whole tile without a token


def lengths_mask() -> np.ndarray:
    """Whole, padded on the left, padded on the right, one token alone, none."""
    real = np.zeros((BATCH, TOKENS), bool)
    real[0], real[1, LEFT:], real[2, :-LEFT], real[3, 40] = True, True, True, True
    return real


def visible(window: int | None = None) -> Visible:
    """The same as ops take it."""
    ends = np.where(lengths_mask(), np.arange(1, TOKENS + 1), 0).max(1).astype(np.int32)
    return Visible(ends, lengths_mask(), causal=False, window=None if window is None else window + 1)


def projections(ranks: tuple[int | None, ...], kv_heads: int = KV_HEADS) -> tuple[list[Projection], PackedProjection]:
    rng = np.random.default_rng(0)
    draw = lambda *shape: (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)  # noqa: E731
    made = []
    for heads, rank in zip((HEADS, kv_heads, kv_heads), ranks, strict=True):
        d_out = heads * HEAD_DIM
        if rank is None:
            made.append(Projection(weight=draw(d_out, WIDTH), bias=draw(d_out)))
        else:
            made.append(Projection(down=draw(rank, WIDTH), up=draw(d_out, rank), bias=draw(d_out)))
    return made, pack(made)


def inputs() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((BATCH, TOKENS, WIDTH)).astype(np.float32)


def by_torch(
    x: np.ndarray, made: list[Projection], real: np.ndarray, window: int | None, tables: Any = None
) -> np.ndarray:
    """Each sequence alone, its padding cut out, by PyTorch's own attention; zeros elsewhere."""
    out = np.zeros((BATCH, TOKENS, HEADS * HEAD_DIM), np.float32)
    for b in range(BATCH):
        at = np.flatnonzero(real[b])
        if not at.size:
            continue
        heads = []
        for n, p in enumerate(made):
            y = torch.nn.functional.linear(torch.tensor(x[b, at]), torch.tensor(np.asarray(p)), torch.tensor(p.bias))
            y = y.reshape(at.size, -1, HEAD_DIM).transpose(0, 1)
            if tables is not None and n < 2:
                turn = torch.complex(*(torch.tensor(t[b, at]) for t in tables))
                y = torch.complex(*y.chunk(2, -1)) * turn
                y = torch.cat([y.real, y.imag], -1)
            heads.append(y[None])
        near = None if window is None else torch.tensor(np.abs(at[:, None] - at) <= window)
        y = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=near, enable_gqa=True)
        out[b, at] = y[0].transpose(0, 1).flatten(1).numpy()
    return out


@pytest.mark.parametrize("implementation", ["products", "xla"])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("ranks", [(None, None, None), (5, 8, 3), (None, 4, None)])
def test_every_row_is_pytorchs_or_zero(ranks: tuple[int | None, ...], window: int | None, implementation: str) -> None:
    made, packed = projections(ranks)
    x, real = inputs(), lengths_mask()
    x[~real] = 1e30  # what padding holds shows nowhere
    with prefer(implementation):
        got = np.asarray(jax.jit(lambda *a: attend_padded(*a, head_dim=HEAD_DIM))(x, packed, visible(window)))
    np.testing.assert_allclose(got, by_torch(x, made, real, window), rtol=0, atol=2e-6)
    assert (got[real] != 0).any(-1).all()  # no real row was left unwritten
    assert (got[~real] == 0).all()


def test_rotation_of_queries_and_keys() -> None:
    made, packed = projections((5, 8, 3), kv_heads=HEADS)
    x, real = inputs(), lengths_mask()
    angles = np.random.default_rng(2).uniform(0, 6, (BATCH, TOKENS, HEAD_DIM // 2)).astype(np.float32)
    tables = (np.cos(angles), np.sin(angles))
    got = attend_padded(x, packed, visible(), head_dim=HEAD_DIM, tables=tables)
    np.testing.assert_allclose(got, by_torch(x, made, real, None, tables), rtol=0, atol=2e-6)


def test_results_have_the_dtype_of_the_input() -> None:
    _, packed = projections((5, 8, 3))
    half = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), packed)
    got = attend_padded(jnp.asarray(inputs(), jnp.bfloat16), half, visible(), head_dim=HEAD_DIM)
    assert got.dtype == jnp.bfloat16
    want = np.asarray(attend_padded(inputs(), packed, visible(), head_dim=HEAD_DIM))
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=0, atol=0.05)
