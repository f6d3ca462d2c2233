"""Attention from rank space, as a tile program: queries, keys and values are never held whole.

Where projections are low rank, a token's query of a head is ``U_q p_q + b_q``, with ``p_q`` its latent. A program (one tile of
queries of one head, see `flash_programs`) reads latents alone:

    without rotation    scores = (U_q p_q + b_q) . (U_k p_k + b_k) = (U_k^T (U_q p_q + b_q)) . p_k + (what is the same for all keys)

Softmax does not see the last term. So the first factor of the keys is applied to the tile of queries, once, and keys stay in
rank space, as in the absorbed form of multi-head latent attention (DeepSeek-AI 2024). With rotation, which stands between the
factors, keys are rebuilt tile by tile instead, in halves, the pairs of RoPE.

    values              sum of w (U_v p_v + b_v) = U_v (sum of w p_v) + b_v, as the weights w add up to 1

so values stay in rank space until the end. This is FlashSVD's rank streaming (Shao et al. 2025), with the absorption that its
kernels leave out.

Latents [batch, tokens, columns] are what the packed first factors give. Those of a head are its own where the second factors are
of single heads; else all heads read the same ones.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.triton.call import load
from pallas_kernels.triton.flash_programs import (
    FlashPlan,
    Piece,
    Span,
    Tiles,
    attention,
    pieces,
    sighted,
    span,
    tile_mask,
    write_rows,
)


@dataclasses.dataclass(frozen=True)
class Latent:
    """Where one of queries, keys and values has its latents, and what its second factor is like.

    Attributes:
      start: first column.
      rank: columns of a head.
      is_own: each head has columns of its own, one after the other.
      has_bias: behind the second factor.
    """

    start: int
    rank: int
    is_own: bool
    has_bias: bool

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return pieces(self.rank)


@dataclasses.dataclass(frozen=True)
class StreamingPlan:
    """Sizes, and where latents are; ``rotary`` says that queries and keys are rotated."""

    flash: FlashPlan
    q: Latent
    k: Latent
    v: Latent
    rotary: bool

    @property
    def halves(self) -> tuple[tuple[Piece, ...], ...]:
        """The columns of a head in the groups that rotation keeps apart: both halves, or one group of all."""
        if not self.rotary:
            return (pieces(self.flash.head_dim),)
        half = self.flash.head_dim // 2
        (piece,) = pieces(half)
        return (piece,), (dataclasses.replace(piece, start=half),)


@dataclasses.dataclass(frozen=True)
class _Factor:
    """References of one second factor [heads, head_dim, rank] and its bias [heads * head_dim], for one head."""

    latent: Latent
    up: Any
    bias: Any
    head: jax.Array
    head_dim: int
    dot: Any

    def lifted(self, latents: Tiles, columns: Piece) -> jax.Array:
        """float32 [tokens, piece]: some columns of the head from latents [tokens, rank], bias included."""
        total = None
        for x, ranks in zip(latents, self.latent.pieces, strict=True):
            y = self.dot(x, self._tile(columns, ranks).T)
            total = y if total is None else total + y
        assert total is not None
        if self.bias is None:
            return total
        bias = load(self.bias, self.head * self.head_dim + columns.columns, mask=columns.inside)
        return total + bias.astype(jnp.float32)[None]

    def absorbed(self, columns: Sequence[Piece], rows: Tiles) -> Tiles:
        """[tokens, rank pieces]: rows of a head [tokens, columns] times this factor, without its bias."""
        found = []
        for ranks in self.latent.pieces:
            total = None
            for part, x in zip(columns, rows, strict=True):
                y = self.dot(x, self._tile(part, ranks))
                total = y if total is None else total + y
            assert total is not None
            found.append(total.astype(rows[0].dtype))
        return tuple(found)

    def _tile(self, columns: Piece, ranks: Piece) -> jax.Array:
        mask = tile_mask(columns.inside, ranks.inside, (columns.tile, ranks.tile))
        return load(self.up, self.head, columns.columns[:, None], ranks.columns[None], mask=mask)


def streaming_program(*refs: Any, plan: StreamingPlan) -> None:
    """See the module's text; for `Launch`."""
    latents, q_up, k_up, v_up, ends, starts, *rest = refs
    take = lambda wanted: rest.pop(0) if wanted else None  # noqa: E731
    real = take(plan.flash.has_real)
    q_bias, k_bias, v_bias = take(plan.q.has_bias), take(plan.k.has_bias and plan.rotary), take(plan.v.has_bias)
    cos, sin = take(plan.rotary), take(plan.rotary)
    (out,) = rest
    flash = plan.flash
    at = span(flash, ends, starts)
    kv_head = at.head // (flash.heads // flash.kv_heads)
    exact = lax.Precision.HIGHEST if latents.dtype == jnp.float32 else None
    dot = partial(jnp.dot, preferred_element_type=jnp.float32, precision=exact)
    of_q = _Factor(plan.q, q_up, q_bias, at.head, flash.head_dim, dot)
    of_k = _Factor(plan.k, k_up, k_bias, kv_head, flash.head_dim, dot)
    of_v = _Factor(plan.v, v_up, v_bias, kv_head, flash.head_dim, dot)

    def read(latent: Latent, head: jax.Array, rows: jax.Array, existing: jax.Array | None) -> Tiles:
        first = latent.start + (head * latent.rank if latent.is_own else 0)
        masks = (tile_mask(existing, p.inside, (rows.size, p.tile)) for p in latent.pieces)
        return tuple(
            load(latents, at.batch, rows[:, None], (first + p.columns)[None], mask=mask)
            for p, mask in zip(latent.pieces, masks, strict=True)
        )

    def rotated(halves: list[jax.Array], rows: jax.Array) -> Tiles:
        (piece,) = plan.halves[0]
        mask = tile_mask(None, piece.inside, (rows.size, piece.tile))
        c, s = (load(table, at.batch, rows[:, None], piece.columns[None], mask=mask) for table in (cos, sin))
        first, second = (half.astype(latents.dtype).astype(jnp.float32) for half in halves)
        turned = first * c - second * s, second * c + first * s
        return tuple(t.astype(latents.dtype) for t in turned)

    rows = jnp.minimum(at.rows, flash.queries - 1)
    q_latents = read(plan.q, at.head, rows, None)
    wide = [of_q.lifted(q_latents, part) for half in plan.halves for part in half]
    rounded = tuple(w.astype(latents.dtype) for w in wide)
    q = rotated(wide, rows) if plan.rotary else of_k.absorbed(plan.halves[0], rounded)

    def scores(places: jax.Array, existing: jax.Array | None) -> jax.Array:
        k = read(plan.k, kv_head, places, existing)
        if plan.rotary:
            k = rotated([of_k.lifted(k, half) for (half,) in plan.halves], jnp.minimum(places, flash.keys - 1))
        total = dot(q[0], k[0].T)
        for x, y in zip(q[1:], k[1:], strict=True):
            total = total + dot(x, y.T)
        return total

    sums = attention(flash, at, real, scores, partial(read, plan.v, kv_head), plan.v.pieces, latents.dtype)
    latent_sums = tuple(s.astype(latents.dtype) for s in sums)
    lifted = tuple(of_v.lifted(latent_sums, part) for part in pieces(flash.head_dim))
    write_rows(flash, at, out, lifted, pieces(flash.head_dim), _seeing(flash, at, real))


def _seeing(flash: FlashPlan, at: Span, real: Any) -> jax.Array | None:
    """Rows that have a bias: those that see a key. Where padding sees too, that is every row of a sequence that is not empty."""
    seeing = sighted(flash, at, real)
    return jnp.broadcast_to(at.end > 0, at.rows.shape) if seeing is None else seeing
