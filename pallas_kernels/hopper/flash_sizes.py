"""Sizes of the kernel of attention that holds no scores, and which keys its programs read."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.ring import ROWS
from pallas_kernels.target import Target

KEYS = 128
"""Of a tile."""


@dataclasses.dataclass(frozen=True)
class FlashSizes:
    """Of a call; ``scale`` is what scores are multiplied with."""

    device: Target
    batch: int
    heads: int
    kv_heads: int
    queries: int
    head_dim: int
    scale: float


@dataclasses.dataclass(frozen=True)
class Place:
    """A program's: its first query, sequence and head, the place among the keys of the sequence's first query, and its end."""

    sizes: FlashSizes
    row: jax.Array
    sequence: jax.Array
    head: jax.Array
    start: jax.Array
    end: jax.Array

    @property
    def first(self) -> jax.Array:
        """Of the queries, among the keys."""
        return self.start + self.row

    @property
    def tiles(self) -> jax.Array:
        """Of keys that some query sees; one where all queries are padding, whose output does not matter."""
        seen = jnp.minimum(self.first + ROWS, self.end)
        return jnp.where(self.first < self.end, lax.div(seen + KEYS - 1, KEYS), 1)

    @property
    def whole_tiles(self) -> jax.Array:
        """Of keys that every query sees."""
        return jnp.minimum(lax.div(jnp.minimum(self.first + 1, self.end), KEYS), self.tiles)

    @property
    def kv(self) -> jax.Array:
        """The head of keys and values, among those of all sequences."""
        sizes = self.sizes
        return self.sequence * sizes.kv_heads + lax.div(self.head, sizes.heads // sizes.kv_heads)
