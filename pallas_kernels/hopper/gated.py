"""The op `project` for a gate and what it gates, low rank: both second factors and the activation in one kernel.

By itself the activation reads both products and writes their result, 270 MB a layer for 4096 tokens of Llama-2-7B. Here a program
computes a tile of the gate, keeps it rounded in registers, and computes the same tile of what it gates.
"""

import math
from collections.abc import Callable, Sequence
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

COLUMNS = range(128, 209, 16)
"""Of a tile. With more, its sums and the gate's tile no longer fit into registers."""


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
    if gate is None:
        return "no gate"
    if residual is not None or any(bias is not None for bias in packed.biases):
        return "biases or a residual beside the gate"
    if any(up is None for up in packed.ups):
        return "a dense member; it is for second factors"
    if x.dtype not in (jnp.bfloat16, jnp.float16) or dtype not in (None, x.dtype):
        return f"{x.dtype} to {jnp.dtype(dtype or x.dtype)}; it serves bfloat16 and float16 to the same"
    if rows(x) < ROWS or rows(x) % ROWS:
        return f"{rows(x)} rows; it serves multiples of {ROWS}"
    ups = [up for up in packed.ups if up is not None]
    if (reason := unsuited(x.dtype, ups)) is not None:
        return reason
    if any(width % STEP for width in (*packed.widths, *packed.starts)):
        return f"ranks {packed.widths}; it serves multiples of {STEP}"
    return f"{ups[0].shape[0]} columns; it serves multiples of {STEP}" if ups[0].shape[0] % STEP else None


def project(
    x: jax.Array,
    packed: PackedProjection,
    *,
    dtype: None = None,
    norm: Norm | LayerNorm | None = None,
    gate: str,
    residual: None = None,
) -> tuple[jax.Array, ...]:
    """As `pallas_kernels.project`; both products are rounded, the activation is not."""
    x = x if norm is None else normed(x, norm)
    latents = rounded_product(x, packed.first)
    gating, gated = (up for up in packed.ups if up is not None)
    y = _second(latents.reshape(-1, latents.shape[-1]), gating, gated, packed.starts, gate)
    return (y.reshape(*x.shape[:-1], -1),)


def _second(latents: jax.Array, gating: jax.Array, gated: jax.Array, starts: tuple[int, ...], gate: str) -> jax.Array:
    """activation(latents[:, starts[0]:] gating') * (latents[:, starts[1]:] gated'), each of as many latents as it has columns."""
    tokens, inner = latents.shape[0], gating.shape[0]
    of = tiling(tokens, [inner], COLUMNS)
    steps = [weight.shape[1] // STEP for weight in (gating, gated)]
    activation = _activation(gate, latents.dtype)

    def corner(tile: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First row and column; tiles of the same columns come one after the other, so that a weight is read once."""
        return lax.rem(tile, of.row_tiles) * ROWS, lax.div(tile, of.row_tiles) * of.columns

    def copy(ring: Ring, first: jax.Array, tile: jax.Array, refs: Sequence[Any]) -> None:
        row, column = corner(tile)
        for weight, start, count in zip(refs[1:3], starts, steps, strict=True):
            part = refs[0].at[pl.ds(row, ROWS), pl.ds(start, count * STEP)]
            ring.fill(first, count, part, weight.at[pl.ds(column, of.columns)])
            first += count

    def multiply(ring: Ring, first: jax.Array, tile: jax.Array, refs: Sequence[Any], staged: Any) -> None:
        row, column = corner(tile)
        row += lax.axis_index("warpgroup") * HALF
        # Without the barrier the compiler rounds after the other product, and has no registers for both until then.
        rounded = lax.optimization_barrier(ring.multiply(first, steps[0]).astype(latents.dtype))

        total = ring.multiply(first + steps[0], steps[1])
        for number, start in enumerate(range(0, of.columns, of.piece)):
            piece = slice(start, start + of.piece)
            active = activation(rounded[:, piece].astype(jnp.float32))
            out = refs[-1].at[pl.ds(row, HALF), pl.ds(column + start, of.piece)]
            write(staged, number, active * total[:, piece].astype(latents.dtype).astype(jnp.float32), out)

    shape = jax.ShapeDtypeStruct((tokens, inner), latents.dtype)
    count = of.row_tiles * -(-inner // of.columns)
    operands = (latents, gating, gated)
    return launch("project_gated", of, count, lambda tile: sum(steps), operands, [shape], multiply, copy)[0]


def _activation(name: str, dtype: jnp.dtype) -> Callable[[jax.Array], jax.Array]:
    """Of float32 values, without divisions: they and the hyperbolic tangent that is accurate take longer than the product."""
    if name == "silu":
        return lambda x: x * _logistic(x)
    if name == "gelu_tanh":
        return lambda x: x * _logistic(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
    return activation_for(name, dtype)


def _logistic(x: jax.Array) -> jax.Array:
    root = lax.rsqrt(1.0 + jnp.exp(-x))
    return root * root
