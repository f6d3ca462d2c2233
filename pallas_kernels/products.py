"""The op `project`: projections of one input, with the norm before them and what is done with their outputs after."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.activations import ACTIVATIONS, activation_for
from pallas_kernels.norm import LayerNorm, Norm, norm_reference, normed
from pallas_kernels.projection import PackedProjection
from pallas_kernels.registry import Implementation, Op
from pallas_kernels.target import not_nvidia

SUPPORTED_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16), jnp.dtype(jnp.float32))
"""Of kernels; XLA takes any."""

BLOCK_DIAGONAL = "a block-diagonal second factor, as of single heads"
"""What kernels refuse that have no such factors."""


def project_reference(
    x: jax.Array,
    packed: PackedProjection,
    *,
    dtype: jnp.dtype | None = None,
    norm: Norm | LayerNorm | None = None,
    gate: str | None = None,
    residual: jax.Array | None = None,
    product: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, ...]:
    """Each member's ``x @ weight.T + bias``, accumulated in float32; latents are rounded to x's dtype between the factors.

    Args:
      x: [..., d_in].
      packed: the members.
      dtype: of the outputs; x's own if not given.
      norm: applied to x first.
      gate: the name of an activation: two members give one output, ``activation(first) * second``.
      residual: [..., d_out], added to the output of the only member.
      product: for implementations, another way to compute x [..., i] times weight [o, i], contracted over i: [..., o].

    Returns:
      One [..., d_out_i] a member; one alone with a gate.
    """
    product = product or _matrix_product
    if norm is not None:
        x = norm_reference(x, norm)
    latent = product(x, packed.first)
    outputs = []
    for up, bias, start, width in zip(packed.ups, packed.biases, packed.starts, packed.widths, strict=True):
        y = lax.slice_in_dim(latent, start, start + width, axis=-1)
        if up is not None:
            y = _lifted(y.astype(x.dtype), up, product)
        if bias is not None:
            y = y + bias.astype(y.dtype)
        outputs.append(y.astype(dtype or x.dtype))
    if gate is not None:
        gating, gated = outputs
        outputs = [ACTIVATIONS[gate](gating) * gated]
    if residual is not None:
        (y,) = outputs
        outputs = [residual + y]
    return tuple(outputs)


def _lifted(latent: jax.Array, up: jax.Array, product: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """Outputs from a latent [..., groups * rank], each group of them from its own share where ``up`` is block-diagonal."""
    if up.ndim == 2:
        return product(latent, up)
    shares = latent.reshape(*latent.shape[:-1], up.shape[0], up.shape[2])
    return jax.vmap(product, (-2, 0), -2)(shares, up).reshape(*latent.shape[:-1], -1)


def _matrix_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., i] times weight [o, i], contracted over i: float32 [..., o]."""
    return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=jnp.float32)


def _row_reduction(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The same for a single row. XLA makes one row reduction of it, where a dot becomes a padded matrix product: a Llama-2-7B
    step at ratio 0.5 takes 3.1 ms this way and 3.6 to 4.1 ms the other (H200, see bench/NOTES.md)."""
    return (x[..., None, :].astype(jnp.float32) * weight.astype(jnp.float32)).sum(-1)


def _rounded(
    x: jax.Array,
    packed: PackedProjection,
    *,
    dtype: jnp.dtype | None = None,
    norm: Norm | LayerNorm | None = None,
    gate: str | None = None,
    residual: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """`project` of many rows of bfloat16 or float16 by XLA: products are summed in float32 and rounded at once.

    A product in float32 would be written to memory as such, twice the bytes; to a rounded one XLA adds biases and residuals before
    it is written.
    """
    x = x if norm is None else normed(x, norm)
    parts = list(dict.fromkeys(zip(packed.starts, packed.widths, strict=True)))
    if rows(x) >= SEPARATE_ROWS and any(up is not None for up in packed.ups):
        latents = {}
        for start, width in parts:
            # With one x for all of them, XLA would join these products to one, and copy slices of its result.
            x = lax.optimization_barrier(x)
            latents[start] = rounded_product(x, lax.slice_in_dim(packed.first, start, start + width))
    else:
        latent = rounded_product(x, packed.first)
        latents = {start: lax.slice_in_dim(latent, start, start + width, axis=-1) for start, width in parts}
    outputs = []
    for up, bias, start in zip(packed.ups, packed.biases, packed.starts, strict=True):
        y = latents[start] if up is None else _lifted(latents[start], up, rounded_product)
        outputs.append(y if bias is None else y + bias)
    if gate is not None:
        gating, gated = (y.astype(jnp.float32) for y in outputs)
        outputs = [(activation_for(gate, x.dtype)(gating) * gated).astype(x.dtype)]
    return tuple(outputs if residual is None else [residual + y for y in outputs])


SEPARATE_ROWS = 2048
"""From here on, first factors that stand in one array fill a GPU one by one as well as all together."""


def rounded_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., i] times weight [o, i] by XLA, summed in float32 and rounded to x's dtype at once: [..., o]."""
    return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=x.dtype)


def rows(x: jax.Array) -> int:
    """Number of vectors [d_in] in x [..., d_in]."""
    return math.prod(x.shape[:-1])


def adds_as_it_writes(x: jax.Array, packed: PackedProjection) -> bool:
    """Whether what serves `project` for as many vectors as x has can add a residual to its product on the way to memory.

    XLA's products do. Where others are faster, `add_norm` is to add it, for which both are read once more.
    """
    of_width = jax.ShapeDtypeStruct((*x.shape[:-1], packed.first.shape[1]), x.dtype)
    return project.choose(of_width, packed)[0].name == "xla_rounded"


def unsuited(x_dtype: jnp.dtype, weights: Sequence[jax.Array]) -> str | None:
    """Why kernels cannot multiply rows of a dtype by these weights [n, k], or None."""
    for weight in weights:
        if weight.ndim != 2:
            return BLOCK_DIAGONAL
        if x_dtype not in SUPPORTED_DTYPES or weight.dtype != x_dtype:
            return f"x is {x_dtype} and a weight {weight.dtype}; it serves one of bfloat16, float16, float32"
        if weight.shape[1] % 8:
            return f"a weight of shape {weight.shape}, whose rows are no whole multiple of 8 elements"
    return None


def _not_one_row(x: jax.Array, packed: PackedProjection, **options: object) -> str | None:
    return None if rows(x) == 1 else f"{rows(x)} rows; it serves one"


def _rounding_refuses(x: jax.Array, packed: PackedProjection, **options: Any) -> str | None:
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {x.dtype}; it is for bfloat16 and float16"
    if options.get("dtype") not in (None, x.dtype):
        return f"outputs in {options['dtype']}; it rounds to x's own"
    return None


project = Op("project", project_reference)
project.register(Implementation("xla_rounded", _rounded, _rounding_refuses, not_nvidia))
project.register(
    Implementation(
        "xla_rows",
        partial(project_reference, product=_row_reduction),
        refuses=_not_one_row,
        unavailable=not_nvidia,
    )
)
