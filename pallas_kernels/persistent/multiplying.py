"""The multiplying warpgroup: the input of a step, then the products of every item."""

import dataclasses
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
from pallas_kernels.persistent.items import AttentionItems, Item, PhaseItems
from pallas_kernels.persistent.launch import Place
from pallas_kernels.persistent.outputs import store_words
from pallas_kernels.persistent.ring import Ring
from pallas_kernels.persistent.steps import HALF_TILE, TILE_ROWS, Attention, Phase

_SUMS = plgpu.ACC((TILE_ROWS, 8), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
_HALVES = (slice(0, HALF_TILE), slice(HALF_TILE, 2 * HALF_TILE))


def multiply_step(place: Place, ring: Ring, tiles: jax.Array, multiplies: jax.Array) -> jax.Array:
    """Computes this program's items of a phase; gives the number of tiles so far. Who does not multiply helps with the input."""
    phase = place.launch.plan.steps[place.step]
    assert isinstance(phase, Phase)
    items = PhaseItems(place, phase)
    held = _Held.of(ring, items, tiles, place.launch.plan.held_tiles(place.step))

    @pl.when(items.count > 0)
    def _() -> None:
        fill(place, items.team, items.split, items.is_first.astype(jnp.int32))

    def multiply_item(i: jax.Array, carry: Any) -> Any:
        tiles, of_first = carry
        item, done = items.item(i), 0 if of_first is None else of_first[0]

        def with_sums(even: Any, odd: Any) -> jax.Array:
            end = _products(place.launch.activations, ring, item, tiles, done, (even, odd))
            products = even[...] + odd[...]
            if of_first is None:
                ring.give_back(end - 1)
            else:
                products += of_first[1]
                ring.give_back(end - 1, done < item.count)
            store_words(place, products, items.split * phase.pieces + item.piece, items.rows(item.row_tile).output)
            return end

        end = pl.run_scoped(with_sums, *[_SUMS] * 2)
        return end, None if of_first is None else (jnp.int32(0), _filled(0.0))

    start = tiles, None
    if held is not None:
        start = tiles + held.count, (held.count, held.products(place.launch.activations))
    end, _ = lax.fori_loop(0, jnp.where(multiplies, items.count, 0), multiply_item, start)
    return end


@dataclasses.dataclass(frozen=True)
class _Held:
    """Tiles in registers, the first of a program's first item; none of them if the item has fewer.

    Who waits for an input holds what it will multiply first, and its slots of the ring go to others: so memory has as many tiles
    more to bring.
    """

    count: jax.Array
    halves: list[list[jax.Array]]  # of each tile; they mean nothing where the count is 0
    begin: jax.Array  # of the input's tiles

    @classmethod
    def of(cls, ring: Ring, items: PhaseItems, tiles: jax.Array, count: int) -> "_Held | None":
        """So many tiles, taken out of the ring as soon as they are there; None for none."""
        if not count:
            return None
        first = items.item(jnp.int32(0))
        there = (items.count > 0) & (first.count >= count)
        halves = []
        for tile in (tiles + number for number in range(count)):
            slot = ring.await_tile(tile, there)
            halves.append([plgpu.load(ring.slots.at[slot, half], layout=plgpu.Layout.WGMMA) for half in range(2)])
            ring.give_back(tile, there)
        return cls(jnp.where(there, count, 0), halves, jnp.where(there, first.begin, 0))

    def products(self, activations: Any) -> jax.Array:
        """Their sum once the input is there, [64, 8]."""

        def add_up(*sums: Any) -> jax.Array:
            w.emitted()(lambda context: w.ready_for_products())()
            for number, halves in enumerate(self.halves):
                for half, columns in enumerate(_HALVES):
                    plgpu.wgmma(sums[half], halves[half], activations.at[self.begin + number, :, columns].T)
            plgpu.wgmma_wait(0)
            return jnp.where(self.count > 0, sums[0][...] + sums[1][...], 0.0)

        return pl.run_scoped(add_up, *[_SUMS] * 2)


def _products(
    activations: Any, ring: Ring, item: Item, tiles: jax.Array, done: jax.Array | int, sums: tuple[Any, Any]
) -> jax.Array:
    """Adds up an item's weight tiles times activations, but for the first that are ``done``.

    Two sums, so that no instruction waits for the one before; a slot is given back one tile late, when its instructions are known
    to have ended. The last one is left to the caller.
    """

    def multiply_tile(k: jax.Array, tiles: jax.Array) -> jax.Array:
        slot = ring.await_tile(tiles)
        w.emitted()(lambda context: w.ready_for_products())()
        for half, columns in enumerate(_HALVES):
            plgpu.wgmma(sums[half], ring.slots.at[slot, half], activations.at[item.begin + k, :, columns].T)
        plgpu.wgmma_wait(2)
        ring.give_back(tiles - 1, k > done)
        return tiles + 1

    return lax.fori_loop(done, item.count, multiply_tile, tiles)


def attend_step(
    place: Place, ring: Ring, tables: Sequence[Any], lengths: Any, tiles: jax.Array, multiplies: jax.Array
) -> jax.Array:
    """Computes this program's items of an attention; gives the number of tiles so far."""
    attention, activations = place.launch.plan.steps[place.step], place.launch.activations
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
            scores = _scores(activations, ring, arrived(0, t, tiles))
            ring.give_back(tiles)
            largest, sums, scale = attend.softmax(place, scores, (largest, sums), t * TILE_ROWS, first, length)
            low, high = _weighed(activations, ring, arrived(1, t, tiles + 1), low * scale, high * scale)
            ring.give_back(tiles + 1)
            return tiles + 2, largest, sums, low, high

        none = tuple(map(_filled, (w.NOTHING, 0.0, 0.0, 0.0)))
        tiles, largest, sums, low, high = lax.fori_loop(begin, end, over_tile, (tiles, *none))
        attend.finish(place, item, (low, high), (largest, sums))
        return tiles

    return lax.fori_loop(0, jnp.where(multiplies, items.count, 0), attend_item, tiles)


def _filled(value: float) -> jax.Array:
    return plgpu.layout_cast(jnp.full((TILE_ROWS, 8), value, jnp.float32), plgpu.Layout.WGMMA)


def _scores(activations: Any, ring: Ring, slot: jax.Array) -> jax.Array:
    """A tile of keys times the queries: [slots, heads]."""

    def compute(*sums: Any) -> jax.Array:
        for half, columns in enumerate(_HALVES):
            plgpu.wgmma(sums[half], ring.slots.at[slot, half], activations.at[0, :, columns].T)
        plgpu.wgmma_wait(0)
        return sums[0][...] + sums[1][...]

    return pl.run_scoped(compute, *[_SUMS] * 2)


def _weighed(activations: Any, ring: Ring, slot: jax.Array, low: jax.Array, high: jax.Array) -> Any:
    """Adds a tile of values, transposed, times the softmax's weights: both halves of columns, [64, heads] each."""
    weights = activations.at[1, :, _HALVES[0]]

    def compute(sums: Any) -> None:
        for half in range(2):
            plgpu.wgmma(sums[half], ring.slots.at[slot, half].T, weights.T)
        plgpu.wgmma_wait(0)

    init: Callable[[jax.Array], Any] = plgpu.ACC.init  # pyright: ignore[reportPrivateImportUsage]
    return pl.run_state(compute)((init(low), init(high)))
