"""Attention of many queries over their keys, as tile programs that write no scores and no weights.

A program serves one tile of queries of one head, over the tiles of keys that some query of it sees:

    for each tile of keys:   scores [queries, keys] -> their maximum and sum so far -> weights times values, added up

Softmax runs online (Milakov and Gimelshein 2018), tile by tile as in Dao (2023), "FlashAttention-2". Tiles that every query sees
whole come first and need no mask; in those at the border, places are compared. Rows without a key give zeros.

Sides of tiles are powers of two. A head of another width is held as pieces that are (see `pieces`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.rounding import power_of_two_within
from pallas_kernels.triton.attention_programs import LOG2_E, NOTHING
from pallas_kernels.triton.call import load, store

Tiles = tuple[jax.Array, ...]
"""The pieces of one matrix, side by side."""


@dataclasses.dataclass(frozen=True)
class FlashPlan:
    """Sizes of an attention kernel over many queries.

    Attributes:
      heads, kv_heads, head_dim: of the model.
      queries, keys: of a sequence.
      query_tile, key_tile: how many of them a program holds at once.
      causal, window, padding, has_real: see `pallas_kernels.Visible`.
      scale, softcap: see `pallas_kernels.attend`.
    """

    heads: int
    kv_heads: int
    head_dim: int
    queries: int
    keys: int
    query_tile: int
    key_tile: int
    causal: bool
    window: int | None
    padding: str
    has_real: bool
    scale: float
    softcap: float | None = None

    @property
    def query_tiles(self) -> int:
        return -(-self.queries // self.query_tile)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Columns ``start`` to ``start + size`` of a matrix, in a tile ``tile`` wide; what is beyond ``size`` is zeros."""

    start: int
    size: int
    tile: int

    @property
    def columns(self) -> jax.Array:
        return self.start + jnp.arange(self.tile)

    @property
    def inside(self) -> jax.Array | None:
        """bool [tile], or None where the tile is full."""
        return None if self.size == self.tile else jnp.arange(self.tile) < self.size


def pieces(width: int) -> tuple[Piece, ...]:
    """A width as one or two powers of two, each at least 16: 64 as 64, 80 as 64 + 16, 100 as 64 + 64 of which 28 are empty."""
    first = power_of_two_within(max(width, 16))
    if width <= first:
        return (Piece(0, width, first),)
    rest = width - first
    tile = 16
    while tile < rest:
        tile *= 2
    return (Piece(0, first, first), Piece(first, rest, tile))


@dataclasses.dataclass(frozen=True)
class Span:
    """Where a program's queries are, and which keys they may see."""

    batch: jax.Array
    head: jax.Array
    rows: jax.Array  # [query_tile], numbers of the queries
    places: jax.Array  # [query_tile], their places among the keys
    end: jax.Array  # keys from there on are seen by nobody
    begin: jax.Array  # tile of keys to start with
    whole: jax.Array  # tiles before this one are seen whole by every query
    stop: jax.Array  # tile of keys to stop before


def span(plan: FlashPlan, ends: Any, starts: Any) -> Span:
    """Of this program, in a grid of one axis: tiles of queries, last first, then heads, then sequences."""
    program = pl.program_id(0)
    # A causal program does more the later its queries are: those that take longest start first.
    tile = plan.query_tiles - 1 - program % plan.query_tiles
    head = (program // plan.query_tiles) % plan.heads
    batch = program // (plan.query_tiles * plan.heads)
    first = tile * plan.query_tile
    rows = first + jnp.arange(plan.query_tile)
    start, end = load(starts, batch), jnp.minimum(load(ends, batch), plan.keys)
    last = start + jnp.minimum(first + plan.query_tile, plan.queries)  # behind the last query
    stop, whole = pl.cdiv(end, plan.key_tile), end // plan.key_tile
    begin = jnp.int32(0)
    if plan.causal:
        stop = jnp.minimum(stop, pl.cdiv(last, plan.key_tile))
        whole = jnp.minimum(whole, (start + first + 1) // plan.key_tile)
    if plan.window is not None:
        begin = jnp.maximum(start + first - (plan.window - 1), 0) // plan.key_tile
        stop = jnp.minimum(stop, pl.cdiv(last + plan.window - 1, plan.key_tile))
    if plan.has_real or plan.window is not None:
        whole = begin
    if plan.padding != "sighted":  # queries behind the end see nothing, whatever the others of their tile see
        stop = jnp.where(start + first < end, stop, begin)
    return Span(batch, head, rows, start + rows, end, begin, jnp.clip(whole, begin, stop), stop)


def attention(
    plan: FlashPlan,
    at: Span,
    real: Any,
    scores: Callable[[jax.Array, jax.Array | None], jax.Array],
    values: Callable[[jax.Array, jax.Array | None], Tiles],
    value_pieces: Sequence[Piece],
    dtype: jnp.dtype,
) -> Tiles:
    """Weighted sums of the values [query_tile, piece], in float32.

    Args:
      plan: sizes.
      at: this program's work.
      real: reference of `Visible.real`, or None.
      scores: (places of keys, which of them exist or None for all) -> products of queries and keys, unscaled.
      values: likewise, pieces of the values [keys, piece].
      value_pieces: those.
      dtype: that weights are rounded to.
    """
    # Scores are taken to the power of two and not of e; bounded ones are scaled before the tangent, and by the bound after.
    scale = LOG2_E * (plan.scale if plan.softcap is None else plan.softcap)
    exact = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    dot = partial(jnp.dot, preferred_element_type=jnp.float32, precision=exact)

    def step(tile: jax.Array, state: tuple[jax.Array, ...], border: bool) -> tuple[jax.Array, ...]:
        highest, total, *sums = state
        places = tile * plan.key_tile + jnp.arange(plan.key_tile)
        existing = places < plan.keys if border and plan.keys % plan.key_tile else None
        products = scores(places, existing)
        if plan.softcap is not None:
            products = jnp.tanh(products * (plan.scale / plan.softcap))
        if border:
            products = jnp.where(_seen(plan, at, real, places), products, NOTHING)
        new = jnp.maximum(highest, jnp.max(products, axis=1) * scale)
        weights = jnp.exp2(products * scale - new[:, None])
        shrink = jnp.exp2(highest - new)
        rounded = weights.astype(dtype)
        sums = [s * shrink[:, None] + dot(rounded, v) for s, v in zip(sums, values(places, existing), strict=True)]
        return new, total * shrink + jnp.sum(weights, axis=1), *sums

    # The maximum starts above what a masked score is, so that a row that sees nothing has no weight.
    rows = (plan.query_tile,)
    state = (
        jnp.full(rows, NOTHING * scale / 2, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        *(jnp.zeros((plan.query_tile, piece.tile), jnp.float32) for piece in value_pieces),
    )
    state = lax.fori_loop(at.begin, at.whole, partial(step, border=False), state)
    _, total, *sums = lax.fori_loop(at.whole, at.stop, partial(step, border=True), state)
    divisor = jnp.where(total == 0.0, 1.0, total)[:, None]
    return tuple(s / divisor for s in sums)


def _seen(plan: FlashPlan, at: Span, real: Any, places: jax.Array) -> jax.Array:
    """bool [query_tile, key_tile]."""
    seen = jnp.broadcast_to((places < at.end)[None], (plan.query_tile, plan.key_tile))
    if plan.causal:
        seen = seen & (places[None] <= at.places[:, None])
    if plan.window is not None:
        distance = at.places[:, None] - places[None]
        seen = seen & (distance < plan.window) & (distance > -plan.window)
    if plan.has_real:
        seen = seen & (load(real, at.batch, jnp.minimum(places, plan.keys - 1)) != 0)[None]
    return seen


def sighted(plan: FlashPlan, at: Span, real: Any) -> jax.Array | None:
    """bool [query_tile]: queries that are no padding; None where padding is as good as any, or does not matter."""
    if plan.padding != "blind":
        return None
    seeing = at.places < at.end
    if plan.has_real:
        seeing = seeing & (load(real, at.batch, jnp.minimum(at.places, plan.keys - 1)) != 0)
    return seeing


def tile_mask(rows: jax.Array | None, columns: jax.Array | None, shape: tuple[int, int]) -> jax.Array | None:
    """bool of a shape from what holds for its rows and for its columns; None where all of both do."""
    masks = ([] if rows is None else [rows[:, None]]) + ([] if columns is None else [columns[None]])
    if not masks:
        return None
    return jnp.broadcast_to(masks[0] if len(masks) == 1 else masks[0] & masks[1], shape)


def write_rows(
    plan: FlashPlan, at: Span, out: Any, tiles: Tiles, of: Sequence[Piece], seeing: jax.Array | None
) -> None:
    """Stores a head's rows [batch, queries, heads * head_dim]; zeros where a query sees nothing."""
    existing = at.rows < plan.queries if plan.queries % plan.query_tile else None
    for tile, piece in zip(tiles, of, strict=True):
        kept = tile if seeing is None else jnp.where(seeing[:, None], tile, 0.0)
        columns = at.head * plan.head_dim + piece.columns
        mask = tile_mask(existing, piece.inside, (plan.query_tile, piece.tile))
        store(out, kept, at.batch, at.rows[:, None], columns[None], mask=mask)


def flash_program(*refs: Any, plan: FlashPlan) -> None:
    """Attention of q [batch, heads, queries, head_dim] over k and v [batch, kv_heads, keys, head_dim]; for `Launch`."""
    q_ref, k_ref, v_ref, ends, starts, *rest = refs
    real = rest.pop(0) if plan.has_real else None
    (out,) = rest
    at = span(plan, ends, starts)
    kv_head = at.head // (plan.heads // plan.kv_heads)
    parts = pieces(plan.head_dim)
    exact = lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
    rows = jnp.minimum(at.rows, plan.queries - 1)
    q = tuple(
        load(
            q_ref,
            at.batch,
            at.head,
            rows[:, None],
            p.columns[None],
            mask=tile_mask(None, p.inside, (rows.size, p.tile)),
        )
        for p in parts
    )

    def tiles(ref: Any, places: jax.Array, existing: jax.Array | None) -> Tiles:
        masks = (tile_mask(existing, p.inside, (places.size, p.tile)) for p in parts)
        return tuple(
            load(ref, at.batch, kv_head, places[:, None], p.columns[None], mask=mask)
            for p, mask in zip(parts, masks, strict=True)
        )

    def scores(places: jax.Array, existing: jax.Array | None) -> jax.Array:
        products = (
            jnp.dot(x, y.T, preferred_element_type=jnp.float32, precision=exact)
            for x, y in zip(q, tiles(k_ref, places, existing), strict=True)
        )
        return sum(products, start=jnp.zeros((), jnp.float32)) if len(parts) > 1 else next(products)

    sums = attention(plan, at, real, scores, partial(tiles, v_ref), parts, q_ref.dtype)
    write_rows(plan, at, out, sums, parts, sighted(plan, at, real))
