"""Blocks of factors, 64 x 64 elements, on their way through a ring in shared memory, for kernels that multiply them one by one.

A block is let go of when the product behind it has begun, as only then it is sure to have been read. So a program begins with all
places but the last let go of: that one is, by the first product.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

BLOCK = 64
"""Rows and columns: 128 bytes of a row, a line of swizzled shared memory."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """``places`` [stages, BLOCK, BLOCK] in shared memory, and what says that a block is there, and that its place is free."""

    places: Any
    full: Any
    empty: Any
    stages: int
    peers: int

    def _stage(self, number: jax.Array) -> jax.Array:
        return number & (self.stages - 1) if self.stages == 16 else lax.rem(number + self.stages, self.stages)

    def begin(self) -> None:
        """Of each warpgroup that multiplies, first of all."""
        for place in range(self.stages - 1):
            plgpu.barrier_arrive(self.empty.at[place])

    def after(self, place: jax.Array, count: int | jax.Array) -> jax.Array:
        """The place so many behind another one, or before it if ``count`` is below zero, at most once around."""
        moved = place + count
        if self.stages & (self.stages - 1) == 0:
            return moved & (self.stages - 1)
        if isinstance(count, int) and count < 0:
            return jnp.where(moved < 0, moved + self.stages, moved)
        return jnp.where(moved >= self.stages, moved - self.stages, moved)

    def fill(self, place: jax.Array, block: Any, *, shared: bool = True) -> None:
        """Copies a block of an array, together with the peers if it is ``shared``; beyond the array's last row it is zero."""
        together = "peer" if shared and self.peers > 1 else None
        plgpu.barrier_wait(self.empty.at[place])
        plgpu.copy_gmem_to_smem(block, self.places.at[place], self.full.at[place], collective_axes=together)

    def wait(self, place: jax.Array) -> None:
        """Until a block is there."""
        plgpu.barrier_wait(self.full.at[place])

    def multiply(self, place: jax.Array, sums: Any, x: Any, before: int = 1) -> None:
        """sums += x block', while what was begun last comes to its end: the block so many places ``before``."""
        self.wait(place)
        plgpu.wgmma(sums, x, self.places.at[place].transpose((1, 0)))
        plgpu.wgmma_wait(1)
        self.let_go(self.after(place, -before))

    def let_go(self, place: jax.Array, predicate: Any = None) -> None:
        """Of a block that has been read."""
        plgpu.barrier_arrive(self.empty.at[place], predicate=predicate)

    def until_all_let_go(self, place: jax.Array) -> None:
        """Of the warpgroup that copies, last of all: a peer must not find this program's barriers gone."""

        def one(_: jax.Array, place: jax.Array) -> jax.Array:
            plgpu.barrier_wait(self.empty.at[place])
            return self.after(place, 1)

        lax.fori_loop(0, self.stages, one, place)


def block_of(array: Any, row: jax.Array, column: jax.Array) -> Any:
    """The block of an array in memory that begins there."""
    return array.at[pl.ds(row, BLOCK), pl.ds(column, BLOCK)]
