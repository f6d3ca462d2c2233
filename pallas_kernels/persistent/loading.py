"""The loading warpgroup: tiles of all items of a step in order, whatever their inputs."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.persistent.ahead import fetch_ahead
from pallas_kernels.persistent.attend import span
from pallas_kernels.persistent.items import AttentionItems, PhaseItems
from pallas_kernels.persistent.launch import Place
from pallas_kernels.persistent.ring import Ring
from pallas_kernels.persistent.steps import TILE_K, TILE_ROWS, Attention, Phase


def load_step(place: Place, ring: Ring, lengths: Any, tiles: jax.Array) -> jax.Array:
    """Loads the tiles of this program's items of a step; gives the number of tiles so far."""
    step = place.launch.plan.steps[place.step]
    plan = place.launch.plan
    if place.step in (0, plan.in_layer):  # behind the head there are none, but those of the head must be known
        ring.know_maps((place.layer + 1) * plan.operands, plan.operands, beside=True)
    fetch_ahead(place, ring)
    if isinstance(step, Attention):
        return _load_cache(place, step, ring, lengths, tiles)
    return _load_weights(place, step, ring, tiles) if isinstance(step, Phase) else tiles


def _load_weights(place: Place, phase: Phase, ring: Ring, tiles: jax.Array) -> jax.Array:
    items, first_operand = PhaseItems(place, phase), place.layer * place.launch.plan.operands
    first_column = items.split * items.team.k_tiles

    def load_item(i: jax.Array, tiles: jax.Array) -> jax.Array:
        item = items.item(i)
        rows = items.rows(item.row_tile)

        def load_tile(k: jax.Array, tiles: jax.Array) -> jax.Array:
            column = (first_column + item.begin + k) * TILE_K
            return ring.load(first_operand + rows.weight, rows.row, column, tiles)

        return lax.fori_loop(0, item.count, load_tile, tiles)

    return lax.fori_loop(0, items.count, load_item, tiles)


def _load_cache(place: Place, attention: Attention, ring: Ring, lengths: Any, tiles: jax.Array) -> jax.Array:
    """Keys and values in turn, 64 slots of a head a tile."""
    items, plan = AttentionItems(place, attention), place.launch.plan
    first_operand = place.layer * plan.operands

    def load_item(i: jax.Array, tiles: jax.Array) -> jax.Array:
        item = items.part(i)
        _, begin, end = span(attention, lengths[item.row], items.window, item.part)
        first_slot = (item.row * attention.kv_heads + item.head) * plan.slots

        def load_pair(t: jax.Array, tiles: jax.Array) -> jax.Array:
            for operand in (attention.keys, attention.values):
                tiles = ring.load(first_operand + operand, first_slot + t * TILE_ROWS, jnp.int32(0), tiles)
            return tiles

        return lax.fori_loop(begin, end, load_pair, tiles)

    return lax.fori_loop(0, items.count, load_item, tiles)
