"""The op `attend_cached` in Pallas-Triton, for one new token a sequence."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.norm import Norm
from pallas_kernels.products import SUPPORTED_DTYPES
from pallas_kernels.rounding import power_of_two, power_of_two_within
from pallas_kernels.target import target
from pallas_kernels.triton.attention_programs import AttentionPlan, attend_program, merge_program
from pallas_kernels.triton.call import Launch

_SCORES = 8 * 1024  # bytes of shared memory for queries and scores, at most


def refuses(
    q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, *arrays: jax.Array, **options: Any
) -> str | None:
    """Why these kernels cannot serve a call."""
    if q.shape[1] != 1:
        return f"{q.shape[1]} new tokens; it serves one"
    if not q.dtype == k.dtype == v.dtype == keys.dtype or q.dtype not in SUPPORTED_DTYPES:
        return f"q is {q.dtype} and the cache {keys.dtype}; it serves one of bfloat16, float16, float32"
    head_dim, rotated = keys.shape[-1], 2 * arrays[1].shape[-1]
    if head_dim % 2 or head_dim > 256:
        return f"head_dim {head_dim}; it serves even ones up to 256"
    if rotated not in (0, head_dim):
        return f"{rotated} of {head_dim} columns of a head rotated; it rotates all or none"
    return None


def attend_cached(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    start: jax.Array,
    lengths: jax.Array,
    *,
    window: int | None = None,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `pallas_kernels.attend_cached`, for one new token a sequence."""
    batch, kv_heads, _, head_dim = keys.shape
    plan = _plan(keys, q.shape[2] // head_dim, window, q_norm, k_norm)
    plan = dataclasses.replace(plan, scale=scale, softcap=softcap)
    if not cos.shape[-1]:  # nothing is rotated, which is a rotation by nothing
        cos, sin = (jnp.full((batch, 1, head_dim // 2), value, jnp.float32) for value in (1, 0))
    start = jnp.broadcast_to(start, (batch,))
    operands = [keys, values, q[:, 0], k[:, 0], v[:, 0], cos[:, 0], sin[:, 0], start, lengths]
    operands += [norm.scale for norm in (q_norm, k_norm) if norm is not None]
    caches = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (keys, values)]
    if plan.splits == 1:
        parts = [jax.ShapeDtypeStruct((batch, plan.heads * head_dim), q.dtype)]
    else:
        shape = (plan.splits, batch, plan.heads)
        parts = [jax.ShapeDtypeStruct((*shape, n), jnp.float32) for n in (head_dim, 2)]
    constants = (("plan", plan),)
    keys, values, *results = Launch(
        attend_program, constants, name="attend", grid=(batch * kv_heads, plan.splits), outputs=(*caches, *parts),
        warps=plan.warps, stages=plan.stages, aliases=((0, 0), (1, 1)),
    )(*operands)  # fmt: skip
    if plan.splits > 1:
        merged = jax.ShapeDtypeStruct((batch, plan.heads * head_dim), q.dtype)
        warps = max(1, min(8, plan.splits * power_of_two(head_dim) // 1024))
        results = Launch(
            merge_program, constants, name="attend_merge", grid=(batch, plan.heads), outputs=(merged,), warps=warps
        )(*results)
    return results[0][:, None], keys, values


def _plan(keys: jax.Array, heads: int, window: int | None, q_norm: Norm | None, k_norm: Norm | None) -> AttentionPlan:
    batch, kv_heads, slots, head_dim = keys.shape
    step = 64 if head_dim <= 128 else 32
    reach = slots if window is None else min(slots, window)
    wanted = 2 * target().cores // (batch * kv_heads)
    splits = power_of_two_within(max(1, min(wanted, reach // step, 64)))
    q_eps, k_eps = (None if norm is None else norm.eps for norm in (q_norm, k_norm))
    q_offset, k_offset = (0.0 if norm is None else norm.offset for norm in (q_norm, k_norm))
    plan = AttentionPlan(
        heads, kv_heads, head_dim, splits, step, window, q_eps, k_eps, q_offset=q_offset, k_offset=k_offset
    )
    tiles = 4 * plan.columns * step * keys.dtype.itemsize  # keys and values, both halves
    return dataclasses.replace(plan, stages=max(1, min(plan.stages, target().shared_memory // (tiles + _SCORES))))
