"""The loading warpgroup: tiles of all items of a step in order, whatever their inputs."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.persistent.attend import span
from pallas_kernels.persistent.items import Items
from pallas_kernels.persistent.launch import Place
from pallas_kernels.persistent.plan import TILE_K, TILE_ROWS, Attention
from pallas_kernels.persistent.ring import Ring


def load_step(place: Place, ring: Ring, lengths: Any, tiles: jax.Array) -> jax.Array:
    """Loads the tiles of this program's items of a step; gives the number of tiles so far."""
    items, plan = Items(place), place.launch.plan
    first_operand = place.layer * plan.operands
    if isinstance(items.step, Attention):
        return _load_cache(items, items.step, ring, lengths, plan.slots, first_operand, tiles)
    k_tiles, chosen = items.numbers["k_tiles"], items

    def load_item(i: jax.Array, tiles: jax.Array) -> jax.Array:
        row_tile, split = chosen.tile(i)
        rows = chosen.rows(row_tile)

        def load_tile(k: jax.Array, tiles: jax.Array) -> jax.Array:
            return ring.load(first_operand + rows.weight, rows.row, (split * k_tiles + k) * TILE_K, tiles)

        return lax.fori_loop(0, k_tiles, load_tile, tiles)

    return lax.fori_loop(0, items.count, load_item, tiles)


def _load_cache(
    items: Items, attention: Attention, ring: Ring, lengths: Any, slots: int, first_operand: jax.Array, tiles: jax.Array
) -> jax.Array:
    """Keys and values in turn, 64 slots of a head a tile."""
    operands: Sequence[int] = (attention.keys, attention.values)

    def load_item(i: jax.Array, tiles: jax.Array) -> jax.Array:
        item = items.part(i)
        _, begin, end = span(attention, lengths[item.row], items.numbers["window"], item.part)
        first_slot = (item.row * attention.kv_heads + item.head) * slots

        def load_pair(t: jax.Array, tiles: jax.Array) -> jax.Array:
            for operand in operands:
                tiles = ring.load(first_operand + operand, first_slot + t * TILE_ROWS, jnp.int32(0), tiles)
            return tiles

        return lax.fori_loop(begin, end, load_pair, tiles)

    return lax.fori_loop(0, items.count, load_item, tiles)
