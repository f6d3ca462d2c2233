"""Tile program: products of several rows (a batch) with large weights, on tensor cores.

The weight tile is the large operand of the dot and the batch, padded to 16, the small one, so that no part of the machine works
on padding alone:

    [rows, k] weight  .  [k, batch] x   ->   [rows, batch]

Tiles of both are loaded ahead of the dots that use them (`stages`). Where a weight has few rows, several programs share them, each
over its part of the contraction axis (`splits`), and write partial sums [splits, batch, rows] in float32 for the caller to add up.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.triton.call import load, padded_batch, store
from pallas_kernels.triton.plan import Blocks, Member, ProductPlan
from pallas_kernels.triton.tiles import Operands, each_tile, output_rows


def matmul_program(*refs: Any, plan: ProductPlan, blocks: Blocks) -> None:
    """See the module's text; for `Launch` with a grid (all programs of all members, splits)."""
    at = Operands.sort(plan, refs)
    split = pl.program_id(1)

    def act(number: int, rows: jax.Array) -> None:
        y = output_rows(
            plan, number, lambda member: _member_rows(plan, blocks, at, member, rows, split), at.outputs[number].dtype
        )
        batch = jnp.arange(padded_batch(plan.batch))
        real = (batch < plan.batch)[None] & (rows < plan.members[number].rows)[:, None]
        if plan.residual:
            y = y + load(at.residual, batch[None], rows[:, None], mask=real).astype(jnp.float32)
        leading = (split,) if blocks.splits > 1 else ()
        store(at.outputs[number], y, *leading, batch[None], rows[:, None], mask=real)

    each_tile(plan, blocks, act)


def _member_rows(
    plan: ProductPlan, blocks: Blocks, at: Operands, member: Member, rows: jax.Array, split: jax.Array
) -> jax.Array:
    """float32 [rows, padded batch]: a member's output at ``rows``, bias included. Rows past its end repeat the last."""
    rows = jnp.minimum(rows, member.rows - 1)
    batch = jnp.arange(padded_batch(plan.batch))
    if member.weight is None:
        real = jnp.broadcast_to((batch < plan.batch)[None], (blocks.rows, batch.size))
        y = load(at.x, batch[None], member.x_start + rows[:, None], mask=real).astype(jnp.float32)
    else:
        y = _product(plan, blocks, at, member, rows, split)
    if member.bias is None:
        return y
    return y + load(at.biases[member.bias], rows).astype(jnp.float32)[:, None]


def _product(
    plan: ProductPlan, blocks: Blocks, at: Operands, member: Member, rows: jax.Array, split: jax.Array
) -> jax.Array:
    assert member.weight is not None
    weight = at.weights[member.weight]
    batch = jnp.arange(padded_batch(plan.batch))
    whole, rest = divmod(member.k, blocks.k)
    precision = lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None

    def step(i: jax.Array, total: jax.Array, count: int | jax.Array | None = None) -> jax.Array:
        ks = i * blocks.k + jnp.arange(blocks.k)
        real = jnp.broadcast_to((batch < plan.batch)[:, None], (batch.size, blocks.k))
        tile_mask = None
        if count is not None:
            mask = jnp.arange(blocks.k) < count
            real, tile_mask = real & mask[None], jnp.broadcast_to(mask[None], (blocks.rows, blocks.k))
        tile = load(weight, (member.row_start + rows)[:, None], ks[None], mask=tile_mask, once=True)
        x = load(at.x, batch[:, None], member.x_start + ks[None], mask=real)
        return total + jnp.dot(tile, x.T, preferred_element_type=jnp.float32, precision=precision)

    total = jnp.zeros((blocks.rows, batch.size), jnp.float32)
    if blocks.splits == 1:
        total = lax.fori_loop(0, whole, step, total) if whole else total
        return step(jnp.int32(whole), total, rest) if rest else total
    steps = pl.cdiv(pl.cdiv(member.k, blocks.k), blocks.splits)
    first = split * steps
    total = lax.fori_loop(first, jnp.minimum(first + steps, whole), step, total)
    if not rest:
        return total
    tail = rest * (split == blocks.splits - 1).astype(jnp.int32)
    return step(jnp.int32(whole), total, tail)
