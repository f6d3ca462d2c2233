"""The op `attend_cached` for one new token a sequence, as tile programs.

A program serves the query heads that share one kv head, over one part of the positions in the cache (`splits` of equal length,
whatever the sequence's length is, so that a single long sequence fills the GPU). Heads are held in halves, the pairs of RoPE:

    norm and rotate q -> its part of the cache -> the last split adds the new k and v, and writes them to the cache
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

from pallas_kernels.rounding import power_of_two
from pallas_kernels.triton.call import load, store

NOTHING = -1e30  # a score that no key has; finite, so that differences of it are zero and not NaN
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """Sizes of an attention kernel; ``slots`` are cache positions read in one step of its loop.

    ``q_eps`` and ``k_eps`` are of the norms of queries and keys, None without; an offset is added to their scales in float32.
    """

    heads: int
    kv_heads: int
    head_dim: int
    splits: int
    slots: int
    window: int | None
    q_eps: float | None
    k_eps: float | None
    q_offset: float = 0.0
    k_offset: float = 0.0
    scale: float | None = None
    softcap: float | None = None
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
    members = jnp.arange(plan.rows)
    row = head * plan.group + jnp.minimum(members, plan.group - 1)
    # All loads before any arithmetic, so that they are waited for together.
    position, length = load(start_ref, b), load(lengths_ref, b)
    q = _halves(q_ref, b, row[:, None] * plan.head_dim + columns[None], inside[None], half)
    cos, sin = load(cos_ref, b, columns, mask=inside), load(sin_ref, b, columns, mask=inside)
    k = _halves(k_ref, b, head * plan.head_dim + columns, inside, half)
    v = _halves(v_ref, b, head * plan.head_dim + columns, inside, half)
    q = _rotate(_norm(q, q_scale, plan.q_eps, plan.q_offset, plan, inside), cos[None], sin[None], keys.dtype)
    state = _over_cache(plan, keys, values, q, b, head, split, position, jnp.minimum(position, length))
    # The new token comes last: the cache's loads need not wait for its key.
    k = _rotate(_norm(k, k_scale, plan.k_eps, plan.k_offset, plan, inside), cos, sin, keys.dtype)
    last = split == plan.splits - 1

    @pl.when(last)
    def _() -> None:
        for cache, new in ((new_keys, k), (new_values, v)):
            store(cache, new[0], b, head, position, columns, mask=inside)
            store(cache, new[1], b, head, position, half + columns, mask=inside)

    state = _with_new_token(plan, state, q, k, v, last & (position < length))
    _finish(plan, parts, state, b, head, split, members, columns)


def _with_new_token(
    plan: AttentionPlan,
    state: tuple[jax.Array, ...],
    q: tuple[jax.Array, jax.Array],
    k: tuple[jax.Array, jax.Array],
    v: tuple[jax.Array, jax.Array],
    seen: jax.Array,
) -> tuple[jax.Array, ...]:
    """The state after one more key and value, if they are ``seen``."""
    highest, total, *sums = state
    wide = lambda pair: tuple(t.astype(jnp.float32) for t in pair)  # noqa: E731
    products = [jnp.sum(x * y[None], axis=1) for x, y in zip(wide(q), wide(k), strict=True)]
    score = jnp.where(seen, _score(plan, products[0] + products[1]), NOTHING)
    new = jnp.maximum(highest, score)
    weight, shrink = jnp.where(seen, jnp.exp2(score - new), 0.0), jnp.exp2(highest - new)
    sums = [s * shrink[:, None] + weight[:, None] * t[None] for s, t in zip(sums, wide(v), strict=True)]
    return new, total * shrink + weight, *sums


def _score(plan: AttentionPlan, product: jax.Array) -> jax.Array:
    """From a product of query and key: scaled, bounded if that is wanted, and for the power of two in place of that of e."""
    scale = 1 / math.sqrt(plan.head_dim) if plan.scale is None else plan.scale
    if plan.softcap is None:
        return product * (LOG2_E * scale)
    return jnp.tanh(product * (scale / plan.softcap)) * (LOG2_E * plan.softcap)


def _halves(
    ref: Any, b: jax.Array | None, index: jax.Array, inside: jax.Array, half: int
) -> tuple[jax.Array, jax.Array]:
    mask = jnp.broadcast_to(inside, index.shape)
    row = () if b is None else (b,)
    return load(ref, *row, index, mask=mask), load(ref, *row, index + half, mask=mask)


def _norm(
    pair: tuple[jax.Array, jax.Array],
    scale: Any,
    eps: float | None,
    offset: float,
    plan: AttentionPlan,
    inside: jax.Array,
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
    if offset:
        first, second = (t * grown * (s.astype(jnp.float32) + offset) for t, s in zip(wide, scales, strict=True))
        return first.astype(pair[0].dtype), second.astype(pair[1].dtype)
    first, second = ((t * grown).astype(s.dtype) * s for t, s in zip(wide, scales, strict=True))
    return first, second


def _rotate(
    pair: tuple[jax.Array, jax.Array], cos: jax.Array, sin: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    first, second = pair[0].astype(jnp.float32), pair[1].astype(jnp.float32)
    return (first * cos - second * sin).astype(dtype), (second * cos + first * sin).astype(dtype)


def _over_cache(
    plan: AttentionPlan, keys: Any, values: Any, q: tuple[jax.Array, jax.Array], b: jax.Array, head: jax.Array,
    split: jax.Array, position: jax.Array, end: jax.Array,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Maximum of the scores, sum, and both halves of the weighted values over this split's part of the cache."""
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
        scores = _score(plan, dot(q[0], tile(keys, 0).T) + dot(q[1], tile(keys, half).T))
        scores = jnp.where(real[None], scores, NOTHING)
        new = jnp.maximum(highest, jnp.max(scores, axis=1))
        weights = jnp.where(real[None], jnp.exp2(scores - new[:, None]), 0.0)
        shrink = jnp.exp2(highest - new)
        rounded = weights.astype(keys.dtype)
        sums = [
            s * shrink[:, None] + dot(rounded, tile(values, offset)) for s, offset in zip(sums, (0, half), strict=True)
        ]
        return new, total * shrink + jnp.sum(weights, axis=1), *sums

    sums = jnp.zeros((plan.rows, plan.columns), jnp.float32)
    nothing = (jnp.full((plan.rows,), NOTHING, jnp.float32), jnp.zeros((plan.rows,), jnp.float32), sums, sums)
    return lax.fori_loop(0, pl.cdiv(jnp.maximum(stop - first, 0), plan.slots), step, nothing)


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
