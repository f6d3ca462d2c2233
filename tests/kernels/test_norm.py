"""Norms against PyTorch's, and what an offset to the scale is for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pallas_kernels import LayerNorm, Norm, add_norm, assume_target, normed
from pallas_kernels.target import H200

X = np.random.default_rng(0).standard_normal((3, 24)).astype(np.float32)
SCALE, BIAS = (np.random.default_rng(n).standard_normal(24).astype(np.float32) for n in (1, 2))


def test_norms_are_those_of_torch() -> None:
    x, scale, bias = map(torch.tensor, (X, SCALE, BIAS))
    for norm, want in (
        (Norm(SCALE, 1e-2), torch.nn.functional.rms_norm(x, (24,), scale, 1e-2)),
        (Norm(SCALE, 1e-2, 1.0), torch.nn.functional.rms_norm(x, (24,), 1 + scale, 1e-2)),
        (LayerNorm(SCALE, BIAS, 1e-2), torch.nn.functional.layer_norm(x, (24,), scale, bias, 1e-2)),
    ):
        np.testing.assert_allclose(normed(jnp.asarray(X), norm), want, rtol=0, atol=2e-6)


def test_an_offset_is_added_in_float32() -> None:
    """1 + 0.003 is 1 in bfloat16."""
    scale = jnp.full(24, 0.003, jnp.bfloat16)
    with_offset = normed(jnp.asarray(X), Norm(scale, 1e-5, 1.0))
    np.testing.assert_allclose(
        with_offset, 1.003 * np.asarray(normed(jnp.asarray(X), Norm(jnp.ones(24), 1e-5))), rtol=2e-5
    )


@pytest.mark.parametrize("norm", [Norm(SCALE, 1e-2, 1.0), LayerNorm(SCALE, BIAS, 1e-2)], ids=["offset", "layer"])
def test_the_kernel_of_many_rows_gives_the_same(norm: Norm | LayerNorm) -> None:
    x, added = (np.random.default_rng(n).standard_normal((70, 24)).astype(np.float32) for n in (3, 4))
    with assume_target(dataclasses.replace(H200, interpret=True)):
        total, got = jax.jit(lambda x, added: add_norm(x, added, norm, implementation="triton"))(x, added)
    np.testing.assert_allclose(total, x + added, rtol=0, atol=1e-6)
    np.testing.assert_allclose(got, normed(jnp.asarray(x + added), norm), rtol=0, atol=2e-6)
