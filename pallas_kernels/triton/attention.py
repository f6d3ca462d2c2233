"""The op `attend_cached` for one new token a sequence, as tile programs.

A program serves the query heads that share one kv head, over one part of the positions in the cache (`splits` of equal length,
whatever the sequence's length is, so that a single long sequence fills the GPU). Heads are held in halves, the pairs of RoPE:

    norm, rotate q, k -> the last split writes the new k and v to the cache and begins with them -> its part of the cache
    partial sums [splits, batch, heads, head_dim] and (maximum, sum) -> one more kernel weighs and adds them

Softmax runs online (Milakov and Gimelshein 2018), the merge is that of split decoding (Dao et al. 2023, "Flash-Decoding").
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.norm import Norm
from pallas_kernels.target import target
from pallas_kernels.triton.call import SUPPORTED_DTYPES, Launch, load, power_of_two, store

_NOTHING = -1e30  # a score that no key has; finite, so that differences of it are zero and not NaN
_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """Sizes of an attention kernel; ``slots`` are cache positions read in one step of its loop."""

    heads: int
    kv_heads: int
    head_dim: int
    splits: int
    slots: int
    window: int | None
    q_eps: float | None
    k_eps: float | None
    warps: int = 4
    stages: int = 2

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """The group, padded to what a dot takes."""
        return max(16, power_of_two(self.group))

    @property
    def columns(self) -> int:
        """Half a head, padded to what a dot takes."""
        return max(16, power_of_two(self.head_dim // 2))


def refuses(
    q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, *arrays: jax.Array, **options: Any
) -> str | None:
    """Why these kernels cannot serve a call."""
    if q.shape[1] != 1:
        return f"{q.shape[1]} new tokens; it serves one"
    if not q.dtype == k.dtype == v.dtype == keys.dtype or q.dtype not in SUPPORTED_DTYPES:
        return f"q is {q.dtype} and the cache {keys.dtype}; it serves one of bfloat16, float16, float32"
    head_dim = keys.shape[-1]
    if head_dim % 2 or head_dim > 256:
        return f"head_dim {head_dim}; it serves even ones up to 256"
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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `pallas_kernels.attend_cached`, for one new token a sequence."""
    batch, kv_heads, slots, head_dim = keys.shape
    plan = _plan(batch, q.shape[2] // head_dim, kv_heads, slots, head_dim, window, q_norm, k_norm)
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


def _plan(
    batch: int, heads: int, kv_heads: int, slots: int, head_dim: int, window: int | None, q_norm: Norm | None, k_norm: Norm | None
) -> AttentionPlan:  # fmt: skip
    step = 64 if head_dim <= 128 else 32
    reach = slots if window is None else min(slots, window)
    wanted = 2 * target().cores // (batch * kv_heads)
    splits = max(1, min(wanted, reach // step, 64))
    splits = power_of_two(splits + 1) // 2
    q_eps, k_eps = (None if norm is None else norm.eps for norm in (q_norm, k_norm))
    return AttentionPlan(heads, kv_heads, head_dim, splits, step, window, q_eps, k_eps)


def attend_program(*refs: Any, plan: AttentionPlan) -> None:
    """See the module's text; for `Launch` with a grid (batch * kv_heads, splits)."""
    keys, values, q_ref, k_ref, v_ref, cos_ref, sin_ref, start_ref, lengths_ref, *rest = refs
    q_scale = rest.pop(0) if plan.q_eps is not None else None
    k_scale = rest.pop(0) if plan.k_eps is not None else None
    new_keys, new_values, *parts = rest
    b, head = pl.program_id(0) // plan.kv_heads, pl.program_id(0) % plan.kv_heads
    split = pl.program_id(1)
    half, columns = plan.head_dim // 2, jnp.arange(plan.columns)
    inside = columns < half
    cos, sin = load(cos_ref, b, columns, mask=inside), load(sin_ref, b, columns, mask=inside)
    members = jnp.arange(plan.rows)
    row = head * plan.group + jnp.minimum(members, plan.group - 1)
    dtype = keys.dtype
    q = _halves(q_ref, b, row[:, None] * plan.head_dim + columns[None], inside[None], half)
    q = _rotate(_norm(q, q_scale, plan.q_eps, plan, inside), cos[None], sin[None], dtype)
    k = _halves(k_ref, b, head * plan.head_dim + columns, inside, half)
    k = _rotate(_norm(k, k_scale, plan.k_eps, plan, inside), cos, sin, dtype)
    v = _halves(v_ref, b, head * plan.head_dim + columns, inside, half)
    position, length = load(start_ref, b), load(lengths_ref, b)

    @pl.when(split == plan.splits - 1)
    def _() -> None:
        for cache, new in ((new_keys, k), (new_values, v)):
            store(cache, new[0], b, head, position, columns, mask=inside)
            store(cache, new[1], b, head, position, half + columns, mask=inside)

    own = (split == plan.splits - 1) & (position < length)
    wide = lambda pair: tuple(t.astype(jnp.float32) for t in pair)  # noqa: E731
    products = [jnp.sum(x * y[None], axis=1) for x, y in zip(wide(q), wide(k), strict=True)]
    score = (products[0] + products[1]) * _scale(plan)
    ones = jnp.zeros((plan.rows, 1), jnp.float32)
    sums = tuple(jnp.where(own, ones + t[None], 0.0) for t in wide(v))
    state = (jnp.where(own, score, _NOTHING), jnp.where(own, jnp.ones_like(score), 0.0), *sums)
    state = _over_cache(plan, keys, values, q, b, head, split, position, jnp.minimum(position, length), state)
    _finish(plan, parts, state, b, head, split, members, columns)


def _scale(plan: AttentionPlan) -> float:
    """Of scores, which are taken to the power of two and not of e."""
    return _LOG2_E / math.sqrt(plan.head_dim)


def _halves(
    ref: Any, b: jax.Array | None, index: jax.Array, inside: jax.Array, half: int
) -> tuple[jax.Array, jax.Array]:
    mask = jnp.broadcast_to(inside, index.shape)
    row = () if b is None else (b,)
    return load(ref, *row, index, mask=mask), load(ref, *row, index + half, mask=mask)


def _norm(
    pair: tuple[jax.Array, jax.Array], scale: Any, eps: float | None, plan: AttentionPlan, inside: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The norm over a head, rounded where `rms_norm` rounds."""
    if eps is None:
        return pair
    half = plan.head_dim // 2
    wide = [t.astype(jnp.float32) for t in pair]
    mean = (jnp.sum(wide[0] * wide[0], axis=-1) + jnp.sum(wide[1] * wide[1], axis=-1)) / plan.head_dim
    divisor = lax.rsqrt(mean + eps)
    scales = _halves(scale, None, jnp.arange(plan.columns), inside, half)
    grown = divisor[:, None] if wide[0].ndim == 2 else divisor
    first, second = ((t * grown).astype(s.dtype) * s for t, s in zip(wide, scales, strict=True))
    return first, second


def _rotate(
    pair: tuple[jax.Array, jax.Array], cos: jax.Array, sin: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    first, second = pair[0].astype(jnp.float32), pair[1].astype(jnp.float32)
    return (first * cos - second * sin).astype(dtype), (second * cos + first * sin).astype(dtype)


def _over_cache(
    plan: AttentionPlan, keys: Any, values: Any, q: tuple[jax.Array, jax.Array], b: jax.Array, head: jax.Array,
    split: jax.Array, position: jax.Array, end: jax.Array, state: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Goes on from ``state`` (maximum, sum, both halves of the weighted values) over this split's part of the cache."""
    half, columns = plan.head_dim // 2, jnp.arange(plan.columns)
    begin = jnp.int32(0) if plan.window is None else jnp.maximum(position - (plan.window - 1), 0)
    steps = pl.cdiv(pl.cdiv(jnp.maximum(end - begin, 0), plan.slots), plan.splits)
    first = begin + split * steps * plan.slots
    stop = jnp.minimum(first + steps * plan.slots, end)
    exact = lax.Precision.HIGHEST if keys.dtype == jnp.float32 else None
    dot = partial(jnp.dot, preferred_element_type=jnp.float32, precision=exact)

    def step(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        highest, total, *sums = state
        slots = first + i * plan.slots + jnp.arange(plan.slots)
        real = slots < stop
        tile = lambda cache, offset: load(  # noqa: E731
            cache, b, head, slots[:, None], columns[None] + offset, mask=real[:, None] & (columns < half)[None]
        )
        scores = (dot(q[0], tile(keys, 0).T) + dot(q[1], tile(keys, half).T)) * _scale(plan)
        scores = jnp.where(real[None], scores, _NOTHING)
        new = jnp.maximum(highest, jnp.max(scores, axis=1))
        weights = jnp.where(real[None], jnp.exp2(scores - new[:, None]), 0.0)
        shrink = jnp.exp2(highest - new)
        rounded = weights.astype(keys.dtype)
        sums = [
            s * shrink[:, None] + dot(rounded, tile(values, offset)) for s, offset in zip(sums, (0, half), strict=True)
        ]
        return new, total * shrink + jnp.sum(weights, axis=1), *sums

    return lax.fori_loop(0, pl.cdiv(jnp.maximum(stop - first, 0), plan.slots), step, state)


def _finish(
    plan: AttentionPlan, parts: list[Any], state: tuple[jax.Array, ...], b: jax.Array, head: jax.Array, split: jax.Array,
    members: jax.Array, columns: jax.Array,
) -> None:  # fmt: skip
    highest, total, *sums = state
    half = plan.head_dim // 2
    row = head * plan.group + members
    mask = (members < plan.group)[:, None] & (columns < half)[None]
    if plan.splits == 1:
        divisor = jnp.where(total == 0.0, 1.0, total)[:, None]
        for y, offset in zip(sums, (0, half), strict=True):
            store(parts[0], y / divisor, b, row[:, None] * plan.head_dim + columns[None] + offset, mask=mask)
        return
    for y, offset in zip(sums, (0, half), strict=True):
        store(parts[0], y, split, b, row[:, None], columns[None] + offset, mask=mask)
    for number, y in enumerate((highest, total)):
        store(parts[1], y, split, b, row, number, mask=members < plan.group)


def merge_program(sums_ref: Any, stats_ref: Any, out_ref: Any, *, plan: AttentionPlan) -> None:
    """Adds up the splits of one head; for `Launch` with a grid (batch, heads)."""
    b, head = pl.program_id(0), pl.program_id(1)
    splits, columns = jnp.arange(plan.splits), jnp.arange(power_of_two(plan.head_dim))
    highest, total = (load(stats_ref, splits, b, head, number) for number in (0, 1))
    weights = jnp.exp2(highest - jnp.max(highest, axis=0))
    inside = columns < plan.head_dim
    mask = jnp.broadcast_to(inside[None], (plan.splits, columns.size))
    sums = load(sums_ref, splits[:, None], b, head, columns[None], mask=mask)
    divisor = jnp.sum(weights * total, axis=0)
    y = jnp.sum(weights[:, None] * sums, axis=0) / jnp.where(divisor == 0.0, 1.0, divisor)
    store(out_ref, y, b, head * plan.head_dim + columns, mask=inside)
