"""Attention in the persistent kernel: one new token a sequence, over the cache and itself.

An item is one kv head of one sequence and a part of its positions. Keys and values come through the ring like weights, 64 slots a
tile, and are multiplied like them: scores are a tile of keys times up to eight queries, and what is attended is the transpose of
a tile of values times the softmax's weights. The new token's key and value are put into their tiles in shared memory, and into
the cache for the steps to come. Parts are put together by who reads them.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.persistent import code as w
from pallas_kernels.persistent.code import Value
from pallas_kernels.persistent.items import Part
from pallas_kernels.persistent.launch import BY_WARP, FRESH_KEY, FRESH_VALUE, Emitter, Place
from pallas_kernels.persistent.products import PRODUCTS
from pallas_kernels.persistent.steps import HALF_TILE, HEADS_BYTES, TILE_BYTES, TILE_ROWS, Attention
from pallas_kernels.persistent.words import store_word

WEIGHTS_TILE = HEADS_BYTES // 2  # byte of `Launch.heads` where the softmax's weights lie, behind the queries


def span(
    attention: Attention, length: jax.Array, window: jax.Array, part: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """First position that is seen by a query at position ``length``; first tile of a part's slots, and where they end."""
    first = jnp.where(window > 0, jnp.maximum(length + 1 - window, 0), 0)
    begin, end = first // TILE_ROWS, length // TILE_ROWS + 1
    tiles = (end - begin + attention.parts - 1) // attention.parts
    begin = begin + part * tiles
    return first, begin, jnp.minimum(begin + tiles, end)


def insert(place: Place, tiles: Any, slot: jax.Array, row: jax.Array, which: int, here: jax.Array) -> None:
    """Emits the copying of the new token's key (0) or value (1) into its row of a tile, if it is ``here``."""

    columns = _attention(place).head_dim

    def body(e: Emitter, scalars: list[Value], refs: list[Value], arrays: Any) -> None:
        slot, row, here = scalars
        lane = w.thread()
        chosen = w.both(w.below(lane, w.integer(columns // 4)), w.below(w.integer(0), here))
        within = w.tile_offset(w.mul(lane, w.integer(4)), row)
        to = w.add(w.add(w.as_integer(refs[0]), w.mul(slot, w.integer(TILE_BYTES))), within)
        source = w.add(w.add(e.small, w.integer(FRESH_VALUE if which else FRESH_KEY)), w.mul(lane, w.integer(8)))
        w.copy_shared(to, source, chosen)

    place.emit(body, [slot, row, here], [tiles], ref_type=plgpu.RefType(w.TILED))


def softmax(
    place: Place, scores: Any, state: Sequence[Any], begin: jax.Array, first: jax.Array, length: jax.Array
) -> Any:
    """Emits the softmax's weights of one tile's scores [slots, heads], laid out for the tensor cores.

    ``state`` is two arrays of the same shape: in every row a head's largest score so far, as a power of two, and this thread's part
    of the sum of weights. Gives both anew, and what earlier sums are to be multiplied with. ``begin`` is the position of the tile's
    first slot; a query sees positions from ``first`` to ``length``.
    """

    attention = _attention(place)

    def body(e: Emitter, scalars: list[Value], refs: Any, arrays: Any) -> Any:
        begin, first, length = scalars
        scores, largest, sums = arrays
        seen = _entries(scores)
        in_bits = w.number(math.log2(math.e) / math.sqrt(attention.head_dim))
        masked = []
        for value, row, _ in seen:
            position = w.add(begin, row)
            hidden = w.either_of(w.below(position, first), w.below(length, position))
            masked.append(w.select(hidden, w.number(w.NOTHING), w.mul_f(value, in_bits)))
        old = [value for value, _, _ in _entries(largest)[:2]]
        tops = [w.max_f(masked[0], masked[2]), w.max_f(masked[1], masked[3])]
        tops = [w.max_f(o, t) for o, t in zip(old, _over_rows(e, tops, w.max_f), strict=True)]
        scale = [w.power_of_two(w.sub_f(o, t)) for o, t in zip(old, tops, strict=True)]
        weights = [
            w.select(w.below_float(m, 0.5 * w.NOTHING), w.number(0.0), w.power_of_two(w.sub_f(m, tops[i % 2])))
            for i, m in enumerate(masked)
        ]
        for weight, (_, row, column) in zip(weights, seen, strict=True):
            w.store_activation(e.heads, w.activation_offset(row, column, w.integer(WEIGHTS_TILE)), weight)
        parts = [value for value, _, _ in _entries(sums)[:2]]
        added = [
            w.add_f(w.mul_f(p, s), w.add_f(weights[i], weights[i + 2]))
            for i, (p, s) in enumerate(zip(parts, scale, strict=True))
        ]
        return _alike(scores, tops), _alike(scores, added), _alike(scores, scale)

    return place.emit(body, [begin, first, length], arrays=[scores, *state], returns=(PRODUCTS,) * 3)


def finish(place: Place, item: Part, attended: Sequence[Any], state: Sequence[Any]) -> None:
    """Emits the storing of what was attended, two arrays [64 columns, heads], and of the logarithm of its weight, as words."""
    attention, plan = _attention(place), place.launch.plan

    def body(e: Emitter, scalars: list[Value], refs: Any, arrays: Any) -> None:
        row, head, part = scalars
        *halves, largest, sums = arrays
        w.meet()
        top = [value for value, _, _ in _entries(largest)[:2]]
        whole = _over_rows(e, [value for value, _, _ in _entries(sums)[:2]], w.add_f)
        some = [w.positive(s) for s in whole]
        inverse = [w.select(p, w.div_f(w.number(1.0), s), w.number(0.0)) for p, s in zip(some, whole, strict=True)]
        logs = [
            w.select(p, w.add_f(t, w.logarithm(s)), w.number(w.NOTHING))
            for p, t, s in zip(some, top, whole, strict=True)
        ]
        base, rows = e.base(place.step), w.add(w.mul(part, w.integer(plan.batch)), row)
        first_head = w.add(w.mul(rows, w.integer(attention.heads)), w.mul(head, w.integer(attention.group)))
        for half, values in enumerate(halves):
            for i, (value, column, query) in enumerate(_entries(values)):
                column = w.add(column, w.integer(half * HALF_TILE))
                at = w.add(w.mul(w.add(first_head, query), w.integer(attention.head_dim)), column)
                at = w.add(at, w.integer(plan.offset("sums", place.step)))
                real = w.both(
                    w.below(query, w.integer(attention.group)), w.below(column, w.integer(attention.head_dim))
                )
                store_word(base, w.mul(at, w.integer(4)), w.mul_f(value, inverse[i % 2]), e.epoch, real)
        alone = w.below(w.thread(), w.integer(4))
        for log, (_, _, query) in zip(logs, _entries(largest)[:2], strict=True):
            of_row = w.add(w.mul(row, w.integer(attention.heads)), w.mul(head, w.integer(attention.group)))
            at = w.add(w.mul(w.add(of_row, query), w.integer(attention.parts)), part)
            at = w.add(at, w.integer(plan.offset("weights", place.step)))
            real = w.both(alone, w.below(query, w.integer(attention.group)))
            store_word(base, w.mul(at, w.integer(4)), log, e.epoch, real)

    place.emit(body, [item.row, item.head, item.part], arrays=[*attended, *state])


def _attention(place: Place) -> Attention:
    found = place.launch.plan.steps[place.step]
    assert isinstance(found, Attention)
    return found


def _entries(array: Any) -> list[tuple[Value, Value, Value]]:
    """(value, row, column) of a thread's elements of an array [64, 8]: two columns of a row, and the same of the row 8 below."""
    found: list[tuple[Value, Value, Value]] = []
    array.foreach(lambda value, at: found.append((value, w.as_index(at[0]), w.as_index(at[1]))))
    assert len(found) == 4
    return found


def _alike(array: Any, by_column: list[Value]) -> Any:
    """An array of the same layout, the same in every row."""
    turn = iter([0, 1, 0, 1])
    return array.foreach(lambda value, at: by_column[next(turn)], create_array=True)


def _over_rows(e: Emitter, by_column: list[Value], join: Any) -> list[Value]:
    """Joins the values of all threads that have the same columns."""
    for distance in (4, 8, 16):
        by_column = [join(value, w.partner(value, distance)) for value in by_column]
    warp, lane = w.quotient(w.thread(), 32), w.remainder(w.thread(), 32)
    pair = w.mul(w.both(lane, w.integer(3)), w.integer(8))
    for i, value in enumerate(by_column):
        at = w.add(w.add(w.integer(BY_WARP + 4 * i), w.mul(warp, w.integer(32))), pair)
        w.store_shared(e.small, at, value, w.below(lane, w.integer(4)))
    w.meet()
    found = []
    for i in range(2):
        parts = [w.load_shared(e.small, w.add(w.integer(BY_WARP + 4 * i + 32 * j), pair)) for j in range(4)]
        joined = parts[0]
        for other in parts[1:]:
            joined = join(joined, other)
        found.append(joined)
    return found
