"""The multiplying warpgroup: the input of a step, then the products of every item."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.persistent import attend
from pallas_kernels.persistent import code as w
from pallas_kernels.persistent.heads import prepare
from pallas_kernels.persistent.inputs import fill
from pallas_kernels.persistent.items import AttentionItems, PhaseItems
from pallas_kernels.persistent.launch import Place
from pallas_kernels.persistent.outputs import store_words
from pallas_kernels.persistent.products import Start, products, start_of
from pallas_kernels.persistent.ring import Ring
from pallas_kernels.persistent.steps import HALF_TILE, TILE_ROWS, Attention

_SUMS = plgpu.ACC((TILE_ROWS, 8), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
_HALVES = (slice(0, HALF_TILE), slice(HALF_TILE, 2 * HALF_TILE))


def multiply_step(place: Place, ring: Ring, tiles: jax.Array, multiplies: jax.Array) -> jax.Array:
    """Computes this program's items of a phase; gives the number of tiles so far. Who does not multiply helps with the input."""
    phase = place.launch.plan.phase(place.step)
    items = PhaseItems(place, phase)

    def start(i: jax.Array, tile: jax.Array) -> Start:
        """Where the i-th item begins, whose first tile this is."""
        item = items.item(i)
        return start_of(
            place, ring, item, tile, items.split * phase.pieces + item.piece, items.rows(item.row_tile).output
        )

    # Found out before the input is waited for: all that is done after it is what other programs wait for.
    first = start(jnp.int32(0), tiles)

    @pl.when(items.count > 0)
    def _() -> None:
        fill(place, items.team, items.split, items.is_first.astype(jnp.int32))

    def multiply_item(i: jax.Array, carry: Any) -> Any:
        tiles, here = carry
        store_words(place, products(ring, place.launch.plan.input_rows, here), here.output)
        tiles += here.count
        return tiles, lax.cond(i + 1 < items.count, lambda: start(i + 1, tiles), lambda: here)

    tiles, _ = lax.fori_loop(0, jnp.where(multiplies, items.count, 0), multiply_item, (tiles, first))
    return tiles


def attend_step(
    place: Place, ring: Ring, tables: Sequence[Any], lengths: Any, tiles: jax.Array, multiplies: jax.Array
) -> jax.Array:
    """Computes this program's items of an attention; gives the number of tiles so far."""
    attention, heads = place.launch.plan.steps[place.step], place.launch.heads
    assert isinstance(attention, Attention)
    items = AttentionItems(place, attention)

    def attend_item(i: jax.Array, tiles: jax.Array) -> jax.Array:
        item = items.part(i)
        length = lengths[item.row]
        first, begin, end = attend.span(attention, length, items.window, item.part)
        last = length // TILE_ROWS
        newest = ((begin <= last) & (last < end)).astype(jnp.int32)
        prepare(place, item, length, newest, tables)
        plgpu.commit_smem()

        def arrived(which: int, t: jax.Array, tile: jax.Array) -> jax.Array:
            """The slot of a tile of keys (0) or values (1), the new token's in it."""
            slot, here = ring.await_tile(tile), (t == last).astype(jnp.int32)
            attend.insert(place, ring.slots, slot, length - last * TILE_ROWS, which, here)
            plgpu.commit_smem()
            return slot

        def over_tile(t: jax.Array, carry: Any) -> Any:
            tiles, largest, sums, low, high = carry
            scores = _scores(heads, ring, arrived(0, t, tiles))
            ring.give_back(tiles)
            largest, sums, scale = attend.softmax(place, scores, (largest, sums), t * TILE_ROWS, first, length)
            low, high = _weighed(heads, ring, arrived(1, t, tiles + 1), low * scale, high * scale)
            ring.give_back(tiles + 1)
            return tiles + 2, largest, sums, low, high

        none = tuple(map(_filled, (w.NOTHING, 0.0, 0.0, 0.0)))
        tiles, largest, sums, low, high = lax.fori_loop(begin, end, over_tile, (tiles, *none))
        attend.finish(place, item, (low, high), (largest, sums))
        return tiles

    return lax.fori_loop(0, jnp.where(multiplies, items.count, 0), attend_item, tiles)


def _filled(value: float) -> jax.Array:
    return plgpu.layout_cast(jnp.full((TILE_ROWS, 8), value, jnp.float32), plgpu.Layout.WGMMA)


def _scores(heads: Any, ring: Ring, slot: jax.Array) -> jax.Array:
    """A tile of keys times the queries: [slots, heads]."""

    def compute(*sums: Any) -> jax.Array:
        for half, columns in enumerate(_HALVES):
            plgpu.wgmma(sums[half], ring.slots.at[slot, half], heads.at[0, :, columns].T)
        plgpu.wgmma_wait(0)
        return sums[0][...] + sums[1][...]

    return pl.run_scoped(compute, *[_SUMS] * 2)


def _weighed(heads: Any, ring: Ring, slot: jax.Array, low: jax.Array, high: jax.Array) -> Any:
    """Adds a tile of values, transposed, times the softmax's weights: both halves of columns, [64, heads] each."""
    weights = heads.at[1, :, _HALVES[0]]

    def compute(sums: Any) -> None:
        for half in range(2):
            plgpu.wgmma(sums[half], ring.slots.at[slot, half].T, weights.T)
        plgpu.wgmma_wait(0)

    init: Callable[[jax.Array], Any] = plgpu.ACC.init  # pyright: ignore[reportPrivateImportUsage]
    return pl.run_state(compute)((init(low), init(high)))
