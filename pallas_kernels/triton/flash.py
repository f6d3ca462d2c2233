"""The op `attend` in Pallas-Triton: attention of many queries that holds no scores."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels.attention import Visible, unsuited_dtypes
from pallas_kernels.products import SUPPORTED_DTYPES
from pallas_kernels.target import target
from pallas_kernels.triton.call import Launch
from pallas_kernels.triton.flash_programs import FlashPlan, flash_program, pieces


def refuses(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: Visible,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> str | None:
    """Why this kernel cannot serve a call."""
    if (reason := unsuited_dtypes(q, k, v, SUPPORTED_DTYPES)) is not None:
        return reason
    if q.shape[3] > 256:
        return f"head_dim {q.shape[3]}; it serves up to 256"
    return None


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: Visible,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """As `pallas_kernels.attend`."""
    batch, heads, queries, head_dim = q.shape
    query_tile, key_tile, warps, stages = _sizes(head_dim, queries, q.dtype.itemsize)
    plan = flash_plan(visible, heads, k.shape[1], head_dim, queries, k.shape[2], query_tile, key_tile)
    plan = dataclasses.replace(plan, scale=plan.scale if scale is None else scale, softcap=softcap)
    (out,) = Launch(
        flash_program,
        (("plan", plan),),
        name="flash",
        grid=(plan.query_tiles * heads * batch,),
        outputs=(jax.ShapeDtypeStruct((batch, queries, heads * head_dim), q.dtype),),
        warps=warps,
        stages=stages,
    )(q, k, v, *visibility(visible))
    return out


def flash_plan(
    visible: Visible, heads: int, kv_heads: int, head_dim: int, queries: int, keys: int, query_tile: int, key_tile: int
) -> FlashPlan:
    """The plan of a kernel with these sizes."""
    return FlashPlan(
        heads, kv_heads, head_dim, queries, keys, query_tile, key_tile, visible.causal, visible.window,
        visible.padding, visible.real is not None, 1 / math.sqrt(head_dim),
    )  # fmt: skip


def visibility(visible: Visible) -> tuple[jax.Array, ...]:
    """The operands that say which keys queries see."""
    real = () if visible.real is None else (visible.real.astype(jnp.int32),)
    return (visible.ends, visible.starts, *real)


def _sizes(head_dim: int, queries: int, itemsize: int) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps, and tiles of keys in flight."""
    width = sum(piece.tile for piece in pieces(head_dim))
    few = queries <= 64
    if itemsize == 4:
        query_tile, key_tile, warps, stages = (32 if few else 64), 32, 4, 1
    elif width <= 64:
        query_tile, key_tile, warps, stages = (64, 64, 4, 3) if few else (128, 128, 8, 3)
    elif width <= 128:
        query_tile, key_tile, warps, stages = (64, 64, 4, 2) if few else (128, 64, 8, 3)
    else:
        query_tile, key_tile, warps, stages = 64, 32, 4, 2
    # The queries' tile, and those of keys and values in flight.
    while stages > 1 and itemsize * width * (query_tile + 2 * stages * key_tile) > target().shared_memory:
        stages -= 1
    return query_tile, key_tile, warps, stages
