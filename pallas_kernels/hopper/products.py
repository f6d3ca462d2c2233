"""The op `project` for low-rank members: their second factors, and of a gate and what it gates the activation, in one kernel.

By itself the activation reads both products and writes their result, 270 MB a layer for 4096 tokens of Llama-2-7B. Here a program
computes a tile of the gate, keeps it rounded in registers, and computes the same tile of what it gates. First factors are XLA's.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.activations import activation_for
from pallas_kernels.hopper.ring import HALF, ROWS, STEP, Ring, launch, tiling, write
from pallas_kernels.norm import LayerNorm, Norm, normed
from pallas_kernels.products import rounded_product, rows, unsuited
from pallas_kernels.projection import PackedProjection
from pallas_kernels.target import Target, target

COLUMNS, GATED_COLUMNS = range(128, 257, 16), range(128, 209, 16)
"""Of a tile. With more, sums, and the gate's tile where there is one, no longer fit into registers."""


def refuses(
    x: jax.Array,
    packed: PackedProjection,
    *,
    dtype: jnp.dtype | None = None,
    norm: Norm | LayerNorm | None = None,
    gate: str | None = None,
    residual: jax.Array | None = None,
) -> str | None:
    """Why this kernel cannot serve a call."""
    if len(packed.ups) != (1 if gate is None else 2):
        return f"{len(packed.ups)} members; it serves one, or a gate and what it gates"
    if residual is not None or any(bias is not None for bias in packed.biases):
        return "biases or a residual"
    if x.dtype not in (jnp.bfloat16, jnp.float16) or dtype not in (None, x.dtype):
        return f"{x.dtype} to {jnp.dtype(dtype or x.dtype)}; it serves bfloat16 and float16 to the same"
    if rows(x) < ROWS or rows(x) % ROWS:
        return f"{rows(x)} rows; it serves multiples of {ROWS}"
    return unsuited_factors(x.dtype, packed)


def unsuited_factors(dtype: jnp.dtype, packed: PackedProjection) -> str | None:
    """Why tiles cannot be made of second factors, or None."""
    ups = [up for up in packed.ups if up is not None]
    if len(ups) < len(packed.ups):
        return "a dense member; it is for second factors"
    if (reason := unsuited(dtype, ups)) is not None:
        return reason
    if any(width % STEP for width in (*packed.widths, *packed.starts)):
        return f"ranks {packed.widths}; it serves multiples of {STEP}"
    narrow = [n for n in packed.d_outs if n % STEP]
    return f"{narrow[0]} columns; it serves multiples of {STEP}" if narrow else None


def project(
    x: jax.Array,
    packed: PackedProjection,
    *,
    dtype: None = None,
    norm: Norm | LayerNorm | None = None,
    gate: str | None = None,
    residual: None = None,
) -> tuple[jax.Array, ...]:
    """As `pallas_kernels.project`; products are rounded, an activation is not."""
    x = x if norm is None else normed(x, norm)
    latents = rounded_product(x, packed.first)
    ups = [up for up in packed.ups if up is not None]
    y = _second(latents.reshape(-1, latents.shape[-1]), ups, starts=packed.starts, gate=gate, device=target())
    return (y.reshape(*x.shape[:-1], -1),)


@partial(
    jax.jit, static_argnames=("starts", "gate", "device")
)  # lowering takes half a second: once, not in every layer
def _second(
    latents: jax.Array, ups: Sequence[jax.Array], *, starts: tuple[int, ...], gate: str | None, device: Target
) -> jax.Array:
    """latents[:, start:] up', each of as many latents as it has columns; of two the activation of the first times the second."""
    tokens, d_out = latents.shape[0], ups[0].shape[0]
    of = tiling(device, tokens, [d_out], COLUMNS if gate is None else GATED_COLUMNS)
    steps = [up.shape[1] // STEP for up in ups]

    def copy(ring: Ring, first: jax.Array, tile: jax.Array, refs: Sequence[Any]) -> None:
        row, column = of.corner(tile)
        x, *weights, _ = refs
        for weight, start, count in zip(weights, starts, steps, strict=True):
            part = x.at[pl.ds(row, ROWS), pl.ds(start, count * STEP)]
            ring.fill(first, count, part, weight.at[pl.ds(column, of.columns)])
            first += count

    def multiply(ring: Ring, first: jax.Array, tile: jax.Array, refs: Sequence[Any], staged: Any) -> None:
        row, column = of.corner(tile)
        row += lax.axis_index("warpgroup") * HALF
        gating = None
        if gate is not None:
            # Without the barrier the compiler rounds after the other product, and has no registers for both until then.
            gating = lax.optimization_barrier(ring.multiply(first, steps[0]).astype(latents.dtype))
            first += steps[0]
        total = lax.optimization_barrier(ring.multiply(first, steps[-1]).astype(latents.dtype))
        for number, start in enumerate(range(0, of.columns, of.piece)):
            values = total[:, start : start + of.piece]
            if gating is not None:
                active = activation_of(gate, latents.dtype)(gating[:, start : start + of.piece].astype(jnp.float32))
                values = active * values.astype(jnp.float32)
            write(staged, number, values, refs[-1].at[pl.ds(row, HALF), pl.ds(column + start, of.piece)])

    count, shape = of.count(d_out), jax.ShapeDtypeStruct((tokens, d_out), latents.dtype)
    name = "project_up" if gate is None else "project_gated"
    return launch(name, of, count, lambda tile: sum(steps), (latents, *ups), [shape], multiply, copy)[0]


def activation_of(name: str | None, dtype: jnp.dtype) -> Callable[[jax.Array], jax.Array]:
    """Of float32 values, without divisions: they and an accurate hyperbolic tangent would take longer than the product."""
    if name == "silu":
        return lambda x: x * _logistic(x)
    if name == "gelu_tanh":
        return lambda x: x * _logistic(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
    assert name is not None
    return activation_for(name, dtype)


def _logistic(x: jax.Array) -> jax.Array:
    root = lax.rsqrt(1.0 + jnp.exp(-x))
    return root * root
