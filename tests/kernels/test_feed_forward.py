"""Feed-forward layers and LayerNorm against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from pallas_kernels import ACTIVATIONS, LayerNorm, Projection, feed_forward, layer_norm, pack, prefer

TORCH = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "tanh": torch.tanh,
}
WIDTH, INNER = 14, 26


def projection(d_out: int, d_in: int, rank: int | None, seed: int) -> Projection:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)  # noqa: E731
    if rank is None:
        return Projection(weight=draw(d_out, d_in), bias=draw(d_out))
    return Projection(down=draw(rank, d_in), up=draw(d_out, rank), bias=draw(d_out))


def linear(x: torch.Tensor, p: Projection) -> torch.Tensor:
    return functional.linear(x, torch.tensor(np.asarray(p)), torch.tensor(p.bias))


def test_every_activation_is_compared() -> None:
    assert ACTIVATIONS.keys() == TORCH.keys()


@pytest.mark.parametrize("implementation", ["products", "xla"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_agrees_with_torch(activation: str, gated: bool, implementation: str) -> None:
    up = [projection(INNER, WIDTH, rank, seed) for rank, seed in ((5, 0), (None, 1))][: 1 + gated]
    down = projection(WIDTH, INNER, 7, 2)
    x, residual = np.random.default_rng(3).standard_normal((2, 3, 9, WIDTH)).astype(np.float32)
    inner = TORCH[activation](linear(torch.tensor(x), up[0]))
    want = linear(inner * linear(torch.tensor(x), up[1]) if gated else inner, down)
    with prefer(implementation):
        alone = feed_forward(x, pack(up), pack([down]), activation=activation)
        added = feed_forward(x, pack(up), pack([down]), activation=activation, residual=residual)
    np.testing.assert_allclose(alone, want, rtol=0, atol=3e-6)
    np.testing.assert_allclose(added, want + torch.tensor(residual), rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_layer_norm_agrees_with_torch(has_bias: bool, dtype: jnp.dtype) -> None:
    rng = np.random.default_rng(0)
    # Far from zero: E[x^2] - E[x]^2 would lose its digits.
    x = jnp.asarray(30 + rng.standard_normal((5, 37)), dtype)
    scale, bias = (jnp.asarray(rng.standard_normal(37), dtype) for _ in range(2))
    got = jax.jit(layer_norm)(x, LayerNorm(scale, bias if has_bias else None, 1e-3))
    as_torch = [torch.tensor(np.asarray(a, np.float64)) for a in (x, scale, bias)]
    want = functional.layer_norm(as_torch[0], (37,), as_torch[1], as_torch[2] if has_bias else None, 1e-3)
    assert got.dtype == dtype
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=0, atol=2e-5 if dtype == jnp.float32 else 2e-2)
