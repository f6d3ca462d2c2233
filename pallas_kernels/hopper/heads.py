"""The op `project_heads` for low-rank members: their second factors, rotation and both orders in memory in one kernel.

A tile is some heads of 128 tokens. Element i of a head and the one that it is paired with, half a head on, are held by the same
thread, so that a tile is rotated where its sums are. Attention by cuDNN reads keys and values token by token, the cache holds them
head by head: each is written twice, and neither is read for that.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.products import unsuited_factors
from pallas_kernels.hopper.ring import HALF, ROWS, STEP, Ring, Tiling, launch, tiling, write
from pallas_kernels.norm import Norm
from pallas_kernels.products import rounded_product, rows
from pallas_kernels.projection import PackedProjection
from pallas_kernels.target import Target, target


def refuses(
    x: jax.Array,
    qkv: PackedProjection,
    cos: jax.Array,
    sin: jax.Array,
    head_dim: int,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
) -> str | None:
    """Why this kernel cannot serve a call."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {x.dtype}; it serves bfloat16 and float16"
    if q_norm is not None or k_norm is not None or any(bias is not None for bias in qkv.biases):
        return "biases or norms of heads"
    if head_dim not in (64, 128) or cos.shape[-1] * 2 != head_dim:
        return f"heads of {head_dim} rotated in {2 * cos.shape[-1]} columns; it serves whole ones of 64 and 128"
    if x.shape[1] % ROWS:
        return f"{x.shape[1]} tokens; it serves multiples of {ROWS}"
    if any(n % 128 for n in qkv.d_outs):
        return f"{min(qkv.d_outs)} columns; it serves multiples of 128"
    return unsuited_factors(x.dtype, qkv)


def project_heads(
    x: jax.Array, qkv: PackedProjection, cos: jax.Array, sin: jax.Array, head_dim: int, q_norm: None = None,
    k_norm: None = None,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """As `pallas_kernels.project_heads`; products are rounded before they are rotated."""
    batch, tokens, _ = x.shape
    latents = rounded_product(x, qkv.first).reshape(rows(x), -1)
    cos, sin = (table.reshape(rows(x), -1) for table in (cos, sin))
    of = {"head_dim": head_dim, "tokens": tokens, "device": target()}
    q, k, v, keys, values = _second(latents, qkv, cos, sin, **of)
    by_head = (a.reshape(batch, tokens, -1, head_dim).swapaxes(1, 2) for a in (q, k, v))
    return *by_head, keys, values


@partial(jax.jit, static_argnames=("head_dim", "tokens", "device"))  # see `products`
def _second(
    latents: jax.Array,
    qkv: PackedProjection,
    cos: jax.Array,
    sin: jax.Array,
    *,
    head_dim: int,
    tokens: int,
    device: Target,
) -> list[jax.Array]:
    """q, k and v [rows, heads * head_dim], and the latter two [batch, kv_heads, tokens, head_dim]."""
    count, ups = latents.shape[0], [up for up in qkv.ups if up is not None]
    of = tiling(device, count, qkv.d_outs, [c for c in (128, 256) if all(n % c == 0 for n in qkv.d_outs)])
    steps = [up.shape[1] // STEP for up in ups]
    ends, total = [], 0
    for n in qkv.d_outs:
        total += of.count(n)
        ends.append(total)

    def member(tile: jax.Array) -> jax.Array:
        return (tile >= ends[0]).astype(jnp.int32) + (tile >= ends[1]).astype(jnp.int32)

    def steps_of(tile: jax.Array) -> jax.Array | int:
        if len(set(steps)) == 1:
            return steps[0]
        return jnp.where(tile < ends[0], steps[0], jnp.where(tile < ends[1], steps[1], steps[2]))

    def corner(tile: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
        """First row and column in an output."""
        return of.corner(tile - (ends[number - 1] if number else 0))

    def copy(ring: Ring, first: jax.Array, tile: jax.Array, refs: Sequence[Any]) -> None:
        for number, start in enumerate(qkv.starts):

            @pl.when(member(tile) == number)
            def _(number: int = number, start: int = start) -> None:
                row, column = corner(tile, number)
                part = refs[0].at[pl.ds(row, ROWS), pl.ds(start, steps[number] * STEP)]
                ring.fill(first, steps[number], part, refs[1 + number].at[pl.ds(column, of.columns)])

    def multiply(ring: Ring, first: jax.Array, tile: jax.Array, refs: Sequence[Any], staged: Any) -> None:
        rounded = lax.optimization_barrier(ring.multiply(first, steps_of(tile)).astype(latents.dtype))
        tables, outs, cached = refs[4:6], refs[6:9], [None, *refs[9:]]
        for number in range(3):

            @pl.when(member(tile) == number)
            def _(number: int = number) -> None:
                row, column = corner(tile, number)
                row += lax.axis_index("warpgroup") * HALF
                place = _Place(row, column, head_dim, tokens, outs[number], cached[number])
                _finish(of, place, rounded, tables if number < 2 else None, staged)

    dtype, batch = latents.dtype, count // tokens
    flat = [jax.ShapeDtypeStruct((count, n), dtype) for n in qkv.d_outs]
    by_head = [jax.ShapeDtypeStruct((batch, n // head_dim, tokens, head_dim), dtype) for n in qkv.d_outs[1:]]
    operands = (latents, *ups, cos, sin)
    return launch("project_heads", of, total, steps_of, operands, [*flat, *by_head], multiply, copy)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a warpgroup's part of a tile belongs: first row and column in ``out`` [rows, columns], and in the cache's order."""

    row: jax.Array
    column: jax.Array
    head_dim: int
    tokens: int
    out: Any
    cached: Any

    def of(self, start: int, columns: int) -> list[Any]:
        """References to so many columns of it."""
        rows = pl.ds(self.row, HALF)
        found = [self.out.at[rows, pl.ds(self.column + start, columns)]]
        if self.cached is not None:
            head = lax.div(self.column, self.head_dim) + start // self.head_dim
            own = pl.ds(lax.rem(self.row, self.tokens), HALF), pl.ds(start % self.head_dim, columns)
            found.append(self.cached.at[lax.div(self.row, self.tokens), head, *own])
        return found


def _finish(of: Tiling, place: _Place, rounded: jax.Array, tables: Sequence[Any] | None, staged: Any) -> None:
    """Rotates products [HALF, columns] of some heads, and writes them."""
    piece, half = of.piece, place.head_dim // 2
    number = 0
    for start in range(0, of.columns, place.head_dim):
        for inner in range(0, half, piece):
            columns = [start + inner, start + inner + half]
            first, second = (rounded[:, c : c + piece].astype(jnp.float32) for c in columns)
            if tables is not None:
                at = pl.ds(place.row, HALF), pl.ds(inner, piece)
                cos, sin = (plgpu.load(table.at[at], layout=plgpu.Layout.WGMMA, optimized=False) for table in tables)
                first, second = first * cos - second * sin, second * cos + first * sin
            for c, values in zip(columns, (first, second), strict=True):
                write(staged, number, values, *place.of(c, piece))
                number += 1
