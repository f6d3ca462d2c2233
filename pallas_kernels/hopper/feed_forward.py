"""The op `feed_forward` for low-rank layers of encoders as one kernel, which stores nothing between x and the output."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.hopper import feed_forward_program
from pallas_kernels.hopper.blocks import BLOCK
from pallas_kernels.hopper.feed_forward_sizes import MOST_SUMS, sizes_of
from pallas_kernels.hopper.ring import ROWS
from pallas_kernels.products import rows, unsuited
from pallas_kernels.projection import PackedProjection

LEAST_BUSY = 0.7
"""Of the device; with less, kernels of smaller tiles are taken to be faster."""


def refuses(
    x: jax.Array, up: PackedProjection, down: PackedProjection, *, activation: str, residual: jax.Array | None = None
) -> str | None:
    """Why this kernel cannot serve a call."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {x.dtype}; it serves bfloat16 and float16"
    ups = [u for u in (*up.ups, *down.ups) if u is not None]
    if len(ups) < len(up.ups) + len(down.ups):
        return "a dense projection, which has no rank space"
    if (reason := unsuited(x.dtype, [up.first, down.first, *ups])) is not None:
        return reason
    if rows(x) < ROWS or rows(x) % ROWS:
        return f"{rows(x)} tokens; it serves multiples of {ROWS}"
    uneven = [n for n in (x.shape[-1], *up.d_outs, *down.d_outs) if n % BLOCK]
    if uneven:
        return f"{uneven[0]} columns; it serves multiples of {BLOCK}"
    sizes = sizes_of(x, up, down, activation, residual is not None)
    if max(sizes.sums, *sizes.counts) > MOST_SUMS or not sizes.stages:
        return f"ranks {', '.join(map(str, (*up.widths, *down.widths)))} are more than a program can hold"
    return None


def slower(x: jax.Array, up: PackedProjection, down: PackedProjection, **options: Any) -> str | None:
    """Why others are expected to serve a call sooner, or None."""
    sizes = sizes_of(x, up, down, "", has_residual=False)
    at_once = sizes.device.cores // sizes.peers
    turns = -(-sizes.tiles // at_once)
    busy = sizes.tiles / (turns * at_once)
    return f"{rows(x)} tokens, with which {1 - busy:.0%} of the device would be idle" if busy < LEAST_BUSY else None


def feed_forward(
    x: jax.Array, up: PackedProjection, down: PackedProjection, *, activation: str, residual: jax.Array | None = None
) -> jax.Array:
    """As `pallas_kernels.feed_forward`; latents are rounded, and so is what goes into the second pair."""
    sizes = sizes_of(x, up, down, activation, residual is not None)
    # Blocks may go beyond the last row of an array, but not beyond its last column.
    ups = [jnp.pad(u, ((0, 0), (0, -u.shape[1] % BLOCK))) for u in (*up.ups, *down.ups) if u is not None]
    biases = [b for b in (*up.biases, *down.biases) if b is not None]
    flat = [a.reshape(rows(x), -1) for a in (x, residual) if a is not None]
    return feed_forward_program.run(flat, up.first, ups, down.first, biases, sizes=sizes).reshape(x.shape)
