"""The persistent kernel: one launch that runs all phases of a segment. See the package's text for how."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.persistent import words as w
from pallas_kernels.persistent.inputs import Inputs, fill
from pallas_kernels.persistent.outputs import store_plain, store_words
from pallas_kernels.persistent.plan import TILE_K, TILE_ROWS, Phase, Segment

TILES_IN_FLIGHT = 3
"""Tiles that a program has asked for and not got: 48 KiB a core. Fewer leave memory idle, more make words wait behind weights."""

_SUMS = plgpu.ACC((TILE_ROWS, 8), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
_TENSOR_K = 64  # columns of a tile that one tensor-core instruction group takes


@partial(jax.jit, static_argnums=(0, 2))  # layers of the same shapes are traced and lowered once
def run_segment(segment: Segment, operands: tuple[jax.Array, ...], eps: float) -> tuple[jax.Array, ...]:
    """Runs a segment.

    Args:
      segment: its phases; they name operands by number.
      operands: the residual stream [batch, width] and the plain input [batch, k] first, then norm scales and weights.
      eps: of the norms.

    Returns:
      The new residual stream [batch, width], then the plain outputs [batch, rows] of each group.
    """
    plain, outputs = _outputs(segment)

    def segment_kernel(*refs: Any) -> None:
        given, made = refs[: len(operands)], refs[len(operands) : len(operands) + len(outputs)]
        activations, slots, small, full, empty = refs[len(operands) + len(outputs) :]
        words = pl.get_global(plgpu.SemaphoreType.REGULAR((segment.words,)))
        scales = {j: given[segment.phases[j].source.scale or 0] for j in segment.streams}
        inputs = Inputs(words, given[0], given[1], scales, made[0])
        outs, ring = dict(zip(plain, made[1:], strict=True)), _Ring(slots, full, empty)
        warpgroup, phases = lax.axis_index("warpgroup"), range(len(segment.phases))

        @pl.when(warpgroup == 1)
        def _() -> None:
            tiles = jnp.int32(0)
            for number in phases:
                tiles = _load_phase(segment, number, given, ring, tiles)

        @pl.when(warpgroup == 0)
        def _() -> None:
            _clear(segment, activations)
            tiles = jnp.int32(0)
            for number in phases:
                tiles = _multiply_phase(segment, number, eps, inputs, outs, activations, small, ring, tiles)

    stages = segment.stages
    tiles = segment.activation_tiles
    return plgpu.kernel(
        segment_kernel,
        out_type=tuple(outputs),
        grid=(segment.programs,),
        grid_names=("program",),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        scratch_types=[
            plgpu.SMEM((tiles, 8, TILE_K), jnp.bfloat16, transforms=w.TILED),
            plgpu.SMEM((stages, TILE_ROWS, TILE_K), jnp.bfloat16, transforms=w.TILED),
            plgpu.SMEM((64,), jnp.float32),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ],
    )(*operands)


def _outputs(segment: Segment) -> tuple[list[tuple[int, int]], list[jax.ShapeDtypeStruct]]:
    """(phase, group) of the plain outputs; shapes of the residual stream and of these."""
    plain = [(j, i) for j, phase in enumerate(segment.phases) if phase.plain for i in range(len(phase.groups))]
    shapes = [jax.ShapeDtypeStruct((segment.batch, segment.width), jnp.bfloat16)]
    for j, i in plain:
        shapes.append(jax.ShapeDtypeStruct((segment.batch, segment.phases[j].groups[i].rows), jnp.bfloat16))
    return plain, shapes


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Weight tiles in shared memory, and for each slot whether it has been filled and whether it may be filled again."""

    tiles: Any
    full: Any
    empty: Any

    @property
    def stages(self) -> int:
        return self.tiles.shape[0]

    def give_back(self, tile: jax.Array) -> None:
        """Frees the slot of a tile, by its number among all that this program loads."""
        plgpu.barrier_arrive(self.empty.at[lax.rem(tile, self.stages)])


def _load_phase(segment: Segment, number: int, operands: tuple[Any, ...], ring: _Ring, tiles: jax.Array) -> jax.Array:
    """The loading warpgroup: tiles of all items of a phase in order, whatever their inputs. Gives the number of tiles so far."""
    phase = segment.phases[number]

    def load_item(i: jax.Array, tiles: jax.Array) -> jax.Array:
        row_tile, split = _item(segment, number, i)

        def load_tile(k: jax.Array, tiles: jax.Array) -> jax.Array:
            slot = lax.rem(tiles, ring.stages)

            @pl.when(tiles >= ring.stages)
            def _() -> None:
                plgpu.barrier_wait(ring.empty.at[slot])

            @pl.when(tiles >= TILES_IN_FLIGHT)
            def _() -> None:
                plgpu.barrier_wait(ring.full.at[lax.rem(tiles - TILES_IN_FLIGHT, ring.stages)])

            def copy(group: int, tile: jax.Array) -> None:
                chosen = phase.groups[group]
                row = chosen.row_start + tile * TILE_ROWS
                column = (split * phase.k_tiles + k) * TILE_K
                view = operands[chosen.weight].at[pl.ds(row, TILE_ROWS), pl.ds(column, TILE_K)]
                plgpu.copy_gmem_to_smem(view, ring.tiles.at[slot], ring.full.at[slot])

            _by_group(segment, number, row_tile, copy)
            return tiles + 1

        return lax.fori_loop(0, phase.k_tiles, load_tile, tiles)

    return lax.fori_loop(0, _item_count(segment, number), load_item, tiles)


def _clear(segment: Segment, activations: Any) -> None:
    """Rows of activations beyond the batch stay zero."""

    @w.emitted(plgpu.RefType(w.TILED))
    def clear(context: Any, activations: Any) -> None:
        w.clear(w.address(activations), segment.activation_tiles * 8 * TILE_K * 2)

    clear(activations)
    plgpu.commit_smem()


def _multiply_phase(
    segment: Segment, number: int, eps: float, inputs: Inputs, outputs: dict[tuple[int, int], Any], activations: Any, small: Any,
    ring: _Ring, tiles: jax.Array,
) -> jax.Array:  # fmt: skip
    """The multiplying warpgroup: the input of a phase, then every item's products. Gives the number of tiles so far."""
    phase = segment.phases[number]
    count = _item_count(segment, number)

    @pl.when(count > 0)
    def _() -> None:
        # The number of programs is a multiple of the splits, so all items of this program have the same one.
        row_tile, split = _item(segment, number, jnp.int32(0))
        fill(segment, number, eps, inputs, activations, small, split, (row_tile == 0).astype(jnp.int32))
        plgpu.commit_smem()

    def multiply_item(i: jax.Array, tiles: jax.Array) -> jax.Array:
        row_tile, split = _item(segment, number, i)

        def with_sums(even: Any, odd: Any) -> jax.Array:
            end = _products(phase.k_tiles, tiles, _slice_tile(phase, row_tile), (even, odd), activations, ring)
            products = even[...] + odd[...]
            ring.give_back(end + ring.stages - 1)
            if not phase.plain:
                store_words(segment, number, inputs.words, products, split, row_tile * TILE_ROWS)
                return end

            def store(group: int, tile: jax.Array) -> None:
                store_plain(segment, number, group, outputs[number, group], small, products, tile * TILE_ROWS)

            _by_group(segment, number, row_tile, store)
            return end

        return pl.run_scoped(with_sums, *[_SUMS] * 2)

    return lax.fori_loop(0, count, multiply_item, tiles)


def _slice_tile(phase: Phase, row_tile: jax.Array) -> jax.Array:
    """First activation tile of the slice that a row tile reads."""
    found, begin = jnp.int32(0), 0
    for group in phase.groups:
        found = jnp.where(row_tile >= begin, phase.slice_of(group) * phase.k_tiles, found)
        begin += group.row_tiles
    return found


def _products(
    count: int, tiles: jax.Array, first: jax.Array, sums: tuple[Any, Any], activations: Any, ring: _Ring
) -> jax.Array:
    """Adds up weight tiles times activations. Two sums, so that an instruction need not wait for the one before; a slot is given
    back one tile late, when its instructions are known to have ended. The last one is left to the caller."""

    def multiply_tile(k: jax.Array, tiles: jax.Array) -> jax.Array:
        slot = lax.rem(tiles, ring.stages)
        plgpu.barrier_wait(ring.full.at[slot])
        parts = TILE_K // _TENSOR_K
        for part in range(parts):
            columns = slice(part * _TENSOR_K, (part + 1) * _TENSOR_K)
            plgpu.wgmma(sums[part % 2], ring.tiles.at[slot, :, columns], activations.at[first + k, :, columns].T)
        plgpu.wgmma_wait(parts)

        @pl.when(k > 0)
        def _() -> None:
            ring.give_back(tiles + ring.stages - 1)

        return tiles + 1

    return lax.fori_loop(0, count, multiply_tile, tiles)


def _item_count(segment: Segment, number: int) -> jax.Array:
    """How many items of a phase this program has."""
    first = _first_item(segment, number)
    return lax.div(segment.phases[number].items - first + segment.programs - 1, segment.programs)


def _item(segment: Segment, number: int, i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(row tile, split) of this program's i-th item of a phase."""
    item = _first_item(segment, number) + i * segment.programs
    splits = segment.phases[number].splits
    return lax.div(item, splits), lax.rem(item, splits)


def _first_item(segment: Segment, number: int) -> jax.Array:
    return lax.rem(lax.axis_index("program") + segment.first_item(number, 0), segment.programs)


def _by_group(segment: Segment, number: int, row_tile: jax.Array, act: Callable[[int, jax.Array], None]) -> None:
    """``act(group, row tile within it)`` for the group that a row tile of a phase belongs to."""
    begin = 0
    for index, group in enumerate(segment.phases[number].groups):

        @pl.when((row_tile >= begin) & (row_tile < begin + group.row_tiles))
        def _(index: int = index, begin: int = begin) -> None:
            act(index, row_tile - begin)

        begin += group.row_tiles
