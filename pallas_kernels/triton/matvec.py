"""Tile program: products of a few rows with large weights, by multiply and add; memory sets its speed.

A program owns a few rows of a weight and walks the contraction axis in steps. A thread adds up its own neighbours and keeps one
sum for each; threads add up theirs once at the end, so that nothing in the loop waits for another thread.

    weight rows   [rows, k]  [rows, k] ...     16 bytes a thread a row, read once
    x             [k]        [k]       ...     from the cache; the norm's scale is multiplied in, its divisor comes last
    sums          [rows, k / 8]                what a thread read side by side is added up at once

A step as wide as all threads' 16 bytes together (256 elements a warp) gives x the same layout over threads as the weight: then
they meet in registers. A narrower step sends x through shared memory with two barriers each time round.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.triton.call import load, store
from pallas_kernels.triton.plan import Blocks, Member, ProductPlan
from pallas_kernels.triton.tiles import Operands, each_tile, output_rows

_Sums = tuple[tuple[jax.Array, jax.Array], ...]  # for every row of x: products [rows, k / 8] and squares [k / 8]
TOGETHER = 8  # elements of 16 bits that a thread loads at once


def matvec_program(*refs: Any, plan: ProductPlan, blocks: Blocks) -> None:
    """See the module's text; for `Launch` with a grid of all programs of all members."""
    at = Operands.sort(plan, refs)

    def act(number: int, rows: jax.Array) -> None:
        real = rows < plan.members[number].rows
        sums = output_rows(
            plan, number, lambda member: _member_rows(plan, blocks, at, member, rows), at.outputs[number].dtype
        )
        for b, y in enumerate(sums):
            if plan.residual:
                y = y + load(at.residual, b, rows, mask=real).astype(jnp.float32)
            store(at.outputs[number], y, b, rows, mask=real)

    each_tile(plan, blocks, act)


def _member_rows(
    plan: ProductPlan, blocks: Blocks, at: Operands, member: Member, rows: jax.Array
) -> tuple[jax.Array, ...]:
    """float32 [rows] for every row of x: a member's output at ``rows``, bias included. Rows past its end repeat the last."""
    rows = jnp.minimum(rows, member.rows - 1)
    if member.weight is None:
        sums = tuple(load(at.x, b, member.x_start + rows).astype(jnp.float32) for b in range(plan.batch))
    else:
        sums = _products(plan, blocks, at, member, rows)
    if member.bias is None:
        return sums
    bias = load(at.biases[member.bias], rows).astype(jnp.float32)
    return tuple(y + bias for y in sums)


def _products(
    plan: ProductPlan, blocks: Blocks, at: Operands, member: Member, rows: jax.Array
) -> tuple[jax.Array, ...]:
    assert member.weight is not None
    weight = at.weights[member.weight]
    whole, rest = divmod(member.k, blocks.k)

    def step(i: jax.Array, sums: _Sums, count: int | None = None) -> _Sums:
        ks = i * blocks.k + jnp.arange(blocks.k)
        mask = None if count is None else jnp.arange(blocks.k) < count
        tile_mask = None if mask is None else jnp.broadcast_to(mask[None], (blocks.rows, blocks.k))
        tile = load(weight, (member.row_start + rows)[:, None], ks[None], mask=tile_mask, once=True).astype(jnp.float32)
        scale = None if at.scale is None else load(at.scale, ks, mask=mask).astype(jnp.float32)
        new = []
        for b, (products, squares) in enumerate(sums):
            x = load(at.x, b, member.x_start + ks, mask=mask).astype(jnp.float32)
            if scale is not None:
                squares, x = squares + jnp.sum((x * x).reshape(-1, TOGETHER), axis=1), x * scale
            new.append((products + jnp.sum((tile * x[None]).reshape(blocks.rows, -1, TOGETHER), axis=2), squares))
        return tuple(new)

    threads = blocks.k // TOGETHER
    sums: _Sums = ((jnp.zeros((blocks.rows, threads), jnp.float32), jnp.zeros((threads,), jnp.float32)),) * plan.batch
    if whole:
        sums = lax.fori_loop(0, whole, step, sums) if whole > 1 else step(jnp.int32(0), sums)
    if rest:
        sums = step(jnp.int32(whole), sums, rest)
    totals = [jnp.sum(products, axis=1) for products, _ in sums]
    if plan.eps is None:
        return tuple(totals)
    means = [jnp.sum(squares) / member.k for _, squares in sums]
    return tuple(y * lax.rsqrt(mean + plan.eps) for y, mean in zip(totals, means, strict=True))
