"""The middle of a low-rank feed-forward layer as one tile program: what lies between the two inner factors is never stored.

    latents [tokens, rank]  ->  up factor  ->  activation  ->  first factor of down  ->  latents [tokens, rank]
                                [tokens, inner], a few columns of it at a time, on chip

A program holds one tile of tokens with the latents that it reads and those that it adds up, and goes through the inner columns.
Where there are fewer tiles than cores, several programs share one, each with a part of the inner columns; their sums are added up
outside. This is FlashSVD's feed-forward kernel V1 (Shao et al. 2025) with every latent of a token in one program, so that nothing
is computed twice. A gate has latents and a factor of its own, of another rank if need be.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.activations import activation_for
from pallas_kernels.rounding import power_of_two_within
from pallas_kernels.triton.call import load, store
from pallas_kernels.triton.flash_programs import Piece, Tiles, pieces, tile_mask

TOKENS = 128
"""Of a program. With fewer, it waits for the factors more than it multiplies: 0.76 and 1.0 ms with 64, 0.47 with 128 (BERT-base,
64 x 512 tokens, rank 307, H200); so ranks that need more registers or shared memory are left to products."""

FEWEST_COLUMNS = 192
"""Inner columns of a program: a few steps, beside which reading its latents and writing its sums is little."""


def inner_splits(tokens: int, inner: int, cores: int) -> int:
    """Programs that share a tile of tokens: a power of two, so that as many cores as possible have one."""
    return power_of_two_within(max(1, min(cores // -(-tokens // TOKENS), inner // FEWEST_COLUMNS)))


@dataclasses.dataclass(frozen=True)
class Inner:
    """A member of the up projection: the first column of its latents, their number, and whether it has a bias."""

    start: int
    rank: int
    has_bias: bool

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return pieces(self.rank)


@dataclasses.dataclass(frozen=True)
class FeedForwardPlan:
    """Sizes of the kernel.

    Attributes:
      members: one, or two: the gate and what it gates.
      activation: its name.
      tokens, inner, rank: rows, inner columns, and latents of the result.
      token_tile, inner_tile: how many a program holds at once.
      splits: programs of a tile of tokens, each with its share of the inner columns.
    """

    members: tuple[Inner, ...]
    activation: str
    tokens: int
    inner: int
    rank: int
    token_tile: int
    inner_tile: int
    splits: int = 1

    @property
    def steps(self) -> int:
        """Of a program's loop."""
        return -(-self.inner // (self.inner_tile * self.splits))


def feed_forward_program(*refs: Any, plan: FeedForwardPlan) -> None:
    """See the module's text; for `Launch` with programs [tiles of tokens, splits], the output [splits, tokens, rank]."""
    latents, *rest = refs
    ups = tuple(rest.pop(0) for _ in plan.members)
    down = rest.pop(0)
    biases = tuple(rest.pop(0) if member.has_bias else None for member in plan.members)
    (out,) = rest
    dtype = latents.dtype
    exact = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    rows = pl.program_id(0) * plan.token_tile + jnp.arange(plan.token_tile)
    existing = rows < plan.tokens if plan.tokens % plan.token_tile else None
    activation = activation_for(plan.activation, dtype)

    def dot(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.dot(x, y, preferred_element_type=jnp.float32, precision=exact)

    given = tuple(_read(latents, rows, existing, member.start, member.pieces) for member in plan.members)

    first = pl.program_id(1) * plan.steps

    def step(i: jax.Array, sums: Tiles) -> Tiles:
        inner = (first + i) * plan.inner_tile + jnp.arange(plan.inner_tile)
        within = inner < plan.inner if plan.inner % (plan.inner_tile * plan.splits) else None
        lifted = []
        for member, x, up, bias in zip(plan.members, given, ups, biases, strict=True):
            total = jnp.zeros((plan.token_tile, plan.inner_tile), jnp.float32)
            for piece, latent in zip(member.pieces, x, strict=True):
                total = total + dot(latent, _read(up, inner, within, 0, (piece,))[0].T)
            if bias is not None:
                total = total + load(bias, inner, mask=within).astype(jnp.float32)[None]
            lifted.append(total)
        y = activation(lifted[0])
        y = (y if len(lifted) == 1 else y * lifted[1]).astype(dtype)
        # Columns beyond the inner width meet zeros of the factor.
        return tuple(
            total + dot(y, _read_transposed(down, piece, inner, within).T)
            for total, piece in zip(sums, pieces(plan.rank), strict=True)
        )

    nothing = tuple(jnp.zeros((plan.token_tile, piece.tile), jnp.float32) for piece in pieces(plan.rank))
    sums = lax.fori_loop(0, plan.steps, step, nothing)
    for total, piece in zip(sums, pieces(plan.rank), strict=True):
        mask = tile_mask(existing, piece.inside, total.shape)
        store(out, total, pl.program_id(1), rows[:, None], piece.columns[None], mask=mask)


def _read(ref: Any, rows: jax.Array, existing: jax.Array | None, start: int, of: tuple[Piece, ...]) -> Tiles:
    """Rows of a matrix, in pieces of columns from ``start`` on."""
    masks = (tile_mask(existing, piece.inside, (rows.size, piece.tile)) for piece in of)
    return tuple(
        load(ref, rows[:, None], start + piece.columns[None], mask=mask) for piece, mask in zip(of, masks, strict=True)
    )


def _read_transposed(ref: Any, piece: Piece, columns: jax.Array, within: jax.Array | None) -> jax.Array:
    """[piece, columns] of a matrix."""
    return load(
        ref, piece.columns[:, None], columns[None], mask=tile_mask(piece.inside, within, (piece.tile, columns.size))
    )
