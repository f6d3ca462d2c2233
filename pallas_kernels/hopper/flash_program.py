"""The kernel of attention that holds no scores: a program has 128 queries of a head, and runs through the keys before their ends.

    copying       k v  k v  k v ...       128 keys and values of the head at a time
                  |
    ring          [ k | k ] [ v | v ]     a place is filled once both warpgroups have let go of what was there
                  |
    multiplying   scores = q k'           64 queries each; scores, and their weights, stay in registers
                  sums += weights v       of the tile before, at once with the next one's scores

The order is FlashAttention's (Dao et al. 2022), the roles of the warpgroups and their turns those of its third version (Shah et al.
2024). Keys that some query must not see are in the last tiles alone, which a loop of their own masks.
"""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.flash_sizes import KEYS, FlashSizes, Place
from pallas_kernels.hopper.ring import HALF, MULTIPLIERS, REGISTERS, ROWS, accumulator, swizzled

STAGES = 2
LEAST = -1e30
"""What a score is that does not count: far below all others, and finite, so that nothing becomes no number."""


class Sums(NamedTuple):
    """Of 64 queries, over the tiles of keys so far: weighted values float32 [HALF, head_dim], those of the last tile not yet among
    them; sums of weights and the largest scores, float32 [HALF]; weights of the last tile [HALF, KEYS]."""

    values: jax.Array
    total: jax.Array
    largest: jax.Array
    weights: Any


@partial(jax.jit, static_argnames="sizes")  # see `products`
def run(
    q: jax.Array, k: jax.Array, v: jax.Array, ends: jax.Array, starts: jax.Array, *, sizes: FlashSizes
) -> jax.Array:
    """[batch, queries, heads * head_dim] from queries like that, keys and values [batch * kv_heads, keys, head_dim]."""
    tiles, lines = sizes.queries // ROWS, swizzled(64)
    dtype, wide = q.dtype, (KEYS, sizes.head_dim)

    def body(q: Any, k: Any, v: Any, ends: Any, starts: Any, out: Any, *held: Any) -> None:
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
        # The last queries have most keys: first.
        head, row = lax.div(program, tiles), (tiles - 1 - lax.rem(program, tiles)) * ROWS
        sequence = lax.div(head, sizes.heads)
        place = Place(sizes, row, sequence, lax.rem(head, sizes.heads), starts[sequence], ends[sequence])
        ring = _Ring(*held)

        @pl.when(warpgroup == MULTIPLIERS)
        def _() -> None:
            plgpu.set_max_registers(REGISTERS["copying"], action="decrease")
            _copy(place, ring, k, v)

        @pl.when(warpgroup < MULTIPLIERS)
        def _() -> None:
            plgpu.set_max_registers(REGISTERS["multiplying"], action="increase")
            _multiply(place, ring, q, out, warpgroup)

    body.__name__ = "flash"
    barrier = partial(plgpu.Barrier, num_barriers=STAGES)
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, dtype),
        grid=(sizes.batch * sizes.heads * tiles,),
        grid_names=("program",),
        num_threads=MULTIPLIERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        scratch_types=[
            plgpu.SMEM((MULTIPLIERS, HALF, sizes.head_dim), dtype, transforms=lines),
            plgpu.SMEM((STAGES, *wide), dtype, transforms=lines),
            plgpu.SMEM((STAGES, *wide), dtype, transforms=lines),
            plgpu.Barrier(num_arrivals=1, num_barriers=MULTIPLIERS),
            *[barrier(num_arrivals=1)] * 2,
            *[barrier(num_arrivals=MULTIPLIERS)] * 2,
            plgpu.Barrier(num_arrivals=1, num_barriers=MULTIPLIERS),
            *[plgpu.SMEM((MULTIPLIERS, HALF, KEYS), dtype, transforms=lines)] * bool(sizes.device.interpret),
        ],
        interpret=plgpu.InterpretGPUParams() if sizes.device.interpret else None,
    )(q, k, v, ends, starts)


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Shared memory: queries of each warpgroup, keys, values; what says that they are there, and have been read; and, where
    it is interpreted, weights."""

    queries: Any
    keys: Any
    values: Any
    queries_full: Any
    keys_full: Any
    values_full: Any
    keys_empty: Any
    values_empty: Any
    turn: Any
    weights: Any = None


def _copy(place: Place, ring: _Ring, k: Any, v: Any) -> None:
    def tile(n: jax.Array, _: None) -> None:
        stage, rows = lax.rem(n, STAGES), pl.ds(n * KEYS, KEYS)
        for array, to, full, empty in (
            (k, ring.keys, ring.keys_full, ring.keys_empty),
            (v, ring.values, ring.values_full, ring.values_empty),
        ):
            plgpu.barrier_wait(empty.at[stage])
            plgpu.copy_gmem_to_smem(array.at[place.kv, rows], to.at[stage], full.at[stage])

    lax.fori_loop(0, place.tiles, tile, None)
    for stage in range(STAGES):  # no barrier ends with something unseen
        plgpu.barrier_wait(ring.keys_empty.at[stage])
        plgpu.barrier_wait(ring.values_empty.at[stage])


def _multiply(place: Place, ring: _Ring, q: Any, out: Any, warpgroup: jax.Array) -> None:
    sizes, own = place.sizes, pl.ds(place.row + warpgroup * HALF, HALF)
    columns, mine = pl.ds(place.head * sizes.head_dim, sizes.head_dim), ring.queries.at[warpgroup]
    for stage in range(STAGES):
        plgpu.barrier_arrive(ring.keys_empty.at[stage])
        plgpu.barrier_arrive(ring.values_empty.at[stage])
    plgpu.copy_gmem_to_smem(q.at[place.sequence, own, columns], mine, ring.queries_full.at[warpgroup])
    plgpu.barrier_wait(ring.queries_full.at[warpgroup])
    plgpu.barrier_arrive(ring.turn.at[0], predicate=warpgroup == 1)
    half = _Half(place, ring, mine, warpgroup)
    sums = half.begin()
    sums = lax.fori_loop(1, place.whole_tiles, partial(half.step, masked=False), sums)
    sums = lax.fori_loop(jnp.maximum(place.whole_tiles, 1), place.tiles, partial(half.step, masked=True), sums)
    mine[...] = half.end(sums).astype(mine.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(mine, out.at[place.sequence, own, columns])
    pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(ring.turn.at[0]))
    plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class _Half:
    """The queries of a ``warpgroup``, ``mine`` in shared memory. The two multiply in turns, and one finds weights meanwhile."""

    place: Place
    ring: _Ring
    mine: Any
    warpgroup: jax.Array

    def begin(self) -> Sums:
        """With the first tile of keys."""
        plgpu.barrier_wait(self.ring.keys_full.at[0])
        self._begin_turn()

        def in_scope(scores: Any) -> jax.Array:
            plgpu.wgmma(scores, self.mine, self.ring.keys.at[0].transpose((1, 0)))
            return scores[...]

        scores = pl.run_scoped(in_scope, accumulator(KEYS))
        plgpu.barrier_arrive(self.ring.keys_empty.at[0])
        self._end_turn()
        values = jnp.zeros((HALF, self.place.sizes.head_dim), jnp.float32)
        none = Sums(values, jnp.zeros(HALF, jnp.float32), jnp.full(HALF, LEAST, jnp.float32), None)
        return self._weighed(none, scores, jnp.int32(0), masked=True)

    def step(self, n: jax.Array, sums: Sums, *, masked: bool) -> Sums:
        """Scores of a tile, and the values of the tile before; then weights of the tile."""
        ring, stage, before = self.ring, lax.rem(n, STAGES), lax.rem(n - 1, STAGES)
        plgpu.barrier_wait(ring.keys_full.at[stage])
        plgpu.barrier_wait(ring.values_full.at[before])
        self._begin_turn()

        def in_scope(scores: Any) -> tuple[jax.Array, jax.Array]:
            plgpu.wgmma(scores, self.mine, ring.keys.at[stage].transpose((1, 0)))
            values = self._with_values(sums, before)
            return scores[...], values

        scores, values = pl.run_scoped(in_scope, accumulator(KEYS))
        plgpu.barrier_arrive(ring.keys_empty.at[stage])
        plgpu.barrier_arrive(ring.values_empty.at[before])
        self._end_turn()
        return self._weighed(sums._replace(values=values), scores, n, masked=masked)

    def end(self, sums: Sums) -> jax.Array:
        """With the values of the last tile: what comes out."""
        last = lax.rem(self.place.tiles - 1, STAGES)
        plgpu.barrier_wait(self.ring.values_full.at[last])
        values = self._with_values(sums, last)
        plgpu.barrier_arrive(self.ring.values_empty.at[last])
        return values * _wide(1 / sums.total, values.shape)

    def _with_values(self, sums: Sums, stage: jax.Array) -> jax.Array:
        y = self.ring.values.at[stage]

        def add(total: Any) -> None:
            plgpu.wgmma(total, sums.weights, y)
            plgpu.wgmma_wait(0)

        if not self.place.sizes.device.interpret:
            return pl.run_state(add)(_started(sums.values))
        kept = self.ring.weights.at[self.warpgroup]  # multiplied is nothing but what is in memory
        kept[...] = sums.weights

        def in_scope(total: Any) -> jax.Array:
            plgpu.wgmma(total, kept, y)
            return total[...]

        return sums.values + pl.run_scoped(in_scope, accumulator(self.place.sizes.head_dim))

    def _weighed(self, sums: Sums, scores: jax.Array, n: jax.Array, *, masked: bool) -> Sums:
        """With a tile's weights in place of those of the one before, and all that was summed made less if a score is larger."""
        place, shape = self.place, scores.shape
        scores *= place.sizes.scale * math.log2(math.e)
        if masked:
            key = lax.broadcasted_iota(jnp.int32, shape, 1) + n * KEYS
            query = lax.broadcasted_iota(jnp.int32, shape, 0) + place.first + self.warpgroup * HALF
            scores = jnp.where((key <= query) & (key < place.end), scores, LEAST)
        top = jnp.maximum(sums.largest, scores.max(axis=1))
        weights, less = jnp.exp2(scores - _wide(top, shape)), jnp.exp2(sums.largest - top)
        values = sums.values * _wide(less, sums.values.shape)
        return Sums(values, sums.total * less + weights.sum(axis=1), top, weights.astype(self.mine.dtype))

    def _begin_turn(self) -> None:
        plgpu.barrier_wait(self.ring.turn.at[self.warpgroup])

    def _end_turn(self) -> None:
        plgpu.barrier_arrive(self.ring.turn.at[1 - self.warpgroup])


def _started(values: jax.Array) -> Any:
    return plgpu.ACC.init(values)  # pyright: ignore[reportPrivateImportUsage]


def _wide(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, (0,))
