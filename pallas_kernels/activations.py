"""Activations by name, and as kernels can have them: Pallas-Triton has no error function, and XLA's is slow."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
}

# erf(x / sqrt 2) = x P(x^2) within 6e-5 where |x| <= 4.2: a fit by least squares, reweighted towards equal errors.
_REACH = 4.2
_ODD = (
    7.976691608626775e-01, -1.3244415970698276e-01, 1.9481883780641772e-02, -2.1729189686155613e-03,
    1.7967203287883453e-04, -1.057914239567096e-05, 4.1449598228639015e-07, -9.591344868189182e-09,
    9.847663299133794e-11,
)  # fmt: skip
# Abramowitz and Stegun 7.1.26, within 1.5e-7 everywhere.
_SLOPE = 0.3275911
_EXACT = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def erf_over_root_two(x: jax.Array, *, exact: bool) -> jax.Array:
    """erf(x / sqrt 2) of float32, within 6e-5, or within 1.5e-7 if ``exact``, which takes a division and an exponential."""
    if not exact:
        x = jnp.clip(x, -_REACH, _REACH)
        return x * _horner(x * x, _ODD)
    size = jnp.abs(x) * math.sqrt(0.5)
    t = 1.0 / (1.0 + _SLOPE * size)
    rest = t * _horner(t, _EXACT) * jnp.exp(-size * size)
    return jnp.where(x < 0, rest - 1.0, 1.0 - rest)


def _horner(x: jax.Array, coefficients: tuple[float, ...]) -> jax.Array:
    total = jnp.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total


def activation_for(name: str, dtype: jnp.dtype) -> Callable[[jax.Array], jax.Array]:
    """The activation of float32 values whose results are rounded to ``dtype``, from arithmetic that every kernel has."""
    if name == "gelu":
        return lambda x: 0.5 * x * (1.0 + erf_over_root_two(x, exact=dtype == jnp.float32))
    return ACTIVATIONS[name]
