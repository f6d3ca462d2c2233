"""The kernel of low-rank feed-forward layers, which stores nothing between x and the output.

    x  --first-->  latents  --up-->  activation  --first-->  latents  --up-->  output
       (1) once a tile      (2) 64 inner columns at a time          (3) once a tile

A tile is 128 tokens, 64 for each of two warpgroups; every latent of a token is in one program, so nothing is computed twice. This
is FlashSVD's V2 (Shao et al. 2025), whose V1 stores latents. Latents of (1) go to shared memory as operands; a step of (2)
multiplies them with 64 rows of the up factor, keeps the activation in registers and multiplies it from there; and sums of (2) go to
shared memory in place of the latents for (3).

A third warpgroup copies. Factors come in blocks of 64 x 64 through one ring, in the order in which they are multiplied, and each of
two neighbouring programs copies half of a block to both: all factors go by for each tile, and the second-level cache would
otherwise have to give more bytes than it can. Blocks of x come between them, one for each warpgroup.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.blocks import BLOCK, Blocks, block_of
from pallas_kernels.hopper.feed_forward_sizes import Sizes
from pallas_kernels.hopper.products import activation_of
from pallas_kernels.hopper.ring import HALF, MULTIPLIERS, REGISTERS, ROWS, accumulator, let_go_barriers, swizzled


@partial(jax.jit, static_argnames="sizes")  # see `products`
def run(
    flat: list[jax.Array], first: jax.Array, ups: list[jax.Array], second: jax.Array, biases: list[jax.Array], *, sizes: Sizes
) -> jax.Array:  # fmt: skip
    """The output [tokens, width].

    Args:
      flat: x [tokens, width], and what is added to the output if something is.
      first: factors of all members of up, stacked, [latents, width].
      ups: [inner, rank] of each, and that of down, [width, rank]; ranks are multiples of `BLOCK`.
      second: of down, [rank, inner].
      biases: of the members of up and of down, of those that have one.
      sizes: of the call.
    """
    dtype, peers = flat[0].dtype, sizes.peers

    def body(*refs: Any) -> None:
        operands, (out, held, places, staged, full, empty) = refs[:-6], refs[-6:]
        factors = _Factors.of(sizes, iter(operands), out)
        ring = Blocks(places, full, empty, sizes.stages, peers)
        warpgroup = lax.axis_index("warpgroup")
        row = (lax.axis_index("program") * peers + lax.axis_index("peer")) * ROWS

        @pl.when(warpgroup == MULTIPLIERS)
        def _() -> None:
            plgpu.set_max_registers(REGISTERS["copying"], action="decrease")
            ring.until_all_let_go(_copy(sizes, factors, ring, row))

        @pl.when(warpgroup < MULTIPLIERS)
        def _() -> None:
            plgpu.set_max_registers(REGISTERS["multiplying"], action="increase")
            ring.begin()
            tile = _Tile(sizes, factors, ring, held, staged.at[warpgroup], warpgroup * HALF)
            ring.let_go(ring.after(tile.multiply(row), -1))
            plgpu.wait_smem_to_gmem(0)

    body.__name__ = "feed_forward"
    lines = swizzled(BLOCK)
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((sizes.tokens, sizes.width), dtype),
        grid=(sizes.tiles,),
        grid_names=("program",),
        cluster=(peers,),
        cluster_names=("peer",),
        num_threads=MULTIPLIERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        scratch_types=[
            plgpu.SMEM((sizes.held, ROWS, BLOCK), dtype, transforms=lines),
            plgpu.SMEM((sizes.stages, BLOCK, BLOCK), dtype, transforms=lines),
            plgpu.SMEM((MULTIPLIERS, HALF, BLOCK), dtype, transforms=lines),
            plgpu.Barrier(num_arrivals=1, num_barriers=sizes.stages),
            let_go_barriers(peers, sizes.stages),
        ],
        interpret=plgpu.InterpretGPUParams() if sizes.device.interpret else None,
    )(*flat, first, *ups, second, *biases)


@dataclasses.dataclass(frozen=True)
class _Factors:
    """References to arrays: x, what is added to the output, first and up factors of both pairs, biases where there are any."""

    x: Any
    residual: Any
    first: Any
    ups: tuple[Any, ...]
    second: Any
    last: Any
    biases: tuple[Any, ...]
    out: Any

    @classmethod
    def of(cls, sizes: Sizes, refs: Iterator[Any], out: Any) -> "_Factors":
        """From the operands in order."""
        x = next(refs)
        residual = next(refs) if sizes.has_residual else None
        first = next(refs)
        ups = tuple(next(refs) for _ in sizes.members)
        last, second = next(refs), next(refs)
        biases = tuple(next(refs) if given else None for given in sizes.biased)
        return cls(x, residual, first, ups, second, last, biases, out)


def _copy(sizes: Sizes, factors: _Factors, ring: Blocks, row: jax.Array) -> jax.Array:
    """What the warpgroup that copies does for a tile, in the order of multiplication; gives the place in the ring behind it."""

    def blocks(place: jax.Array, count: int, of: Callable[[jax.Array], Any], shared: bool = True) -> jax.Array:
        def one(n: jax.Array, place: jax.Array) -> jax.Array:
            ring.fill(place, of(n * BLOCK), shared=shared)
            return ring.after(place, 1)

        return lax.fori_loop(0, count, one, place)

    def compress(kind: int, k: jax.Array, place: jax.Array) -> jax.Array:
        start, count = sizes.latents[kind]
        place = blocks(place, MULTIPLIERS, lambda n: block_of(factors.x, row + n, k * BLOCK), shared=False)
        return blocks(place, count, lambda n: block_of(factors.first, start + n, k * BLOCK))

    def between(k: jax.Array, place: jax.Array) -> jax.Array:
        for up, kind in zip(factors.ups, sizes.members, strict=True):
            place = blocks(place, sizes.counts[kind], lambda n, up=up: block_of(up, k * BLOCK, n))
        return blocks(place, sizes.sums, lambda n: block_of(factors.second, n, k * BLOCK))

    def expand(k: jax.Array, place: jax.Array) -> jax.Array:
        return blocks(place, sizes.sums, lambda n: block_of(factors.last, k * BLOCK, n))

    place = jnp.int32(0)
    for kind in range(len(sizes.latents)):
        place = lax.fori_loop(0, sizes.steps, partial(compress, kind), place)
    place = lax.fori_loop(0, sizes.inner // BLOCK, between, place)
    return lax.fori_loop(0, sizes.steps, expand, place)


@dataclasses.dataclass(frozen=True)
class _Tile:
    """What a warpgroup that multiplies does with its ``half`` of a tile; ``held`` and ``staged`` are shared memory."""

    sizes: Sizes
    factors: _Factors
    ring: Blocks
    held: Any
    staged: Any
    half: Any

    def multiply(self, row: jax.Array) -> jax.Array:
        """All of it, of the tile that begins at a row; gives the place in the ring behind the last block."""
        place = jnp.int32(0)
        for kind, count in enumerate(self.sizes.counts):
            place = self._hold(self.sizes.place(kind), count, self._compress, place)
            for of_x in range(MULTIPLIERS):
                self.ring.let_go(self.ring.after(place, -count - 1 - of_x))
        place = self._hold(0, self.sizes.sums, self._between, place)
        return self._expand(place, row)

    @property
    def _own(self) -> Any:
        return pl.ds(self.half, HALF)

    def _hold(self, first: int, count: int, add: Callable[[Any, jax.Array], jax.Array], place: jax.Array) -> jax.Array:
        """Holds what a function adds to so many blocks from ``first`` on, rounded."""

        def in_scope(*sums: Any) -> tuple[list[jax.Array], jax.Array]:
            behind = add(sums, place)
            return [lax.optimization_barrier(total[...].astype(self.held.dtype)) for total in sums], behind

        values, place = pl.run_scoped(in_scope, *[accumulator(BLOCK) for _ in range(count)])
        for n, value in enumerate(values, first):
            self.held.at[n, self._own][...] = value
        plgpu.commit_smem()
        return place

    def _compress(self, sums: Any, place: jax.Array) -> jax.Array:
        ring, apart = self.ring, len(sums) + MULTIPLIERS

        def step(k: jax.Array, place: jax.Array) -> jax.Array:
            # Not for its own alone: who waits for a place now and then does not know how often it has been filled.
            for warpgroup in range(MULTIPLIERS):
                ring.wait(ring.after(place, warpgroup))
            x = ring.places.at[ring.after(place, self.half // HALF)]
            place = ring.after(place, MULTIPLIERS)
            for n, total in enumerate(sums):
                ring.multiply(ring.after(place, n), total, x, before=1 if n else 1 + MULTIPLIERS)
                for of_x in range(MULTIPLIERS if n == 0 else 0):  # the step before has been read
                    ring.let_go(ring.after(place, -apart - 1 - of_x), predicate=k > 0)
            return ring.after(place, len(sums))

        return lax.fori_loop(0, self.sizes.steps, step, place)

    def _between(self, sums: Any, place: jax.Array) -> jax.Array:
        sizes = self.sizes

        def step(k: jax.Array, place: jax.Array) -> jax.Array:
            lifted = []
            for kind, bias in zip(sizes.members, self.factors.biases, strict=False):
                first = sizes.place(kind)
                value, place = self._lifted(place, range(first, first + sizes.counts[kind]), bias, k)
                lifted.append(value)
            y = activation_of(sizes.activation, self.held.dtype)(lifted[0])
            y = (y if len(lifted) == 1 else y * lifted[1]).astype(self.held.dtype)
            if sizes.device.interpret:  # which multiplies nothing but what is in memory
                self.staged[...] = y
                y = self.staged
            for n, total in enumerate(sums):
                self.ring.multiply(self.ring.after(place, n), total, y)
            return self.ring.after(place, len(sums))

        return lax.fori_loop(0, sizes.inner // BLOCK, step, place)

    def _expand(self, place: jax.Array, row: jax.Array) -> jax.Array:
        factors, own = self.factors, pl.ds(row + self.half, HALF)

        def step(k: jax.Array, place: jax.Array) -> jax.Array:
            columns, added = pl.ds(k * BLOCK, BLOCK), None
            if factors.residual is not None:
                added = plgpu.load(factors.residual.at[own, columns], layout=plgpu.Layout.WGMMA, optimized=False)
            y, place = self._lifted(place, range(self.sizes.sums), factors.biases[-1], k)
            if added is not None:
                y += added.astype(jnp.float32)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.staged[...] = y.astype(self.staged.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(self.staged, factors.out.at[own, columns])
            return place

        return lax.fori_loop(0, self.sizes.steps, step, place)

    def _lifted(self, place: jax.Array, held: range, bias: Any, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Products of held blocks with as many of the ring, float32 [HALF, BLOCK]: columns ``k`` of an up factor's output."""

        def in_scope(sums: Any) -> tuple[jax.Array, jax.Array]:
            def step(n: jax.Array, place: jax.Array) -> jax.Array:
                self.ring.multiply(place, sums, self.held.at[held.start + n, self._own])
                return self.ring.after(place, 1)

            behind = lax.fori_loop(0, len(held), step, place)
            return sums[...], behind

        if bias is None:
            return pl.run_scoped(in_scope, accumulator(BLOCK))
        # Asked for first, so that it is there when the products are.
        columns = plgpu.load(bias.at[pl.ds(k * BLOCK, BLOCK)], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
        total, place = pl.run_scoped(in_scope, accumulator(BLOCK))
        return total + lax.broadcast_in_dim(columns.astype(jnp.float32), total.shape, (1,)), place
