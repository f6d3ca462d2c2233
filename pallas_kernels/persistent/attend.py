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
from pallas_kernels.persistent.plan import HALF_TILE, TILE_BYTES, TILE_K, TILE_ROWS, Attention
from pallas_kernels.persistent.words import differ, store_word

WEIGHTS_TILE = 8 * TILE_K * 2  # byte of the activations where the softmax's weights lie, behind the queries
_SHAPE = plgpu.ShapeDtypeStruct((TILE_ROWS, 8), jnp.float32, layout=plgpu.Layout.WGMMA)  # pyright: ignore


def span(
    attention: Attention, length: jax.Array, window: jax.Array, part: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """First position that is seen by a query at position ``length``; first tile of a part's slots, and where they end."""
    first = jnp.where(window > 0, jnp.maximum(length + 1 - window, 0), 0)
    begin, end = first // TILE_ROWS, length // TILE_ROWS + 1
    tiles = (end - begin + attention.parts - 1) // attention.parts
    begin = begin + part * tiles
    return first, begin, jnp.minimum(begin + tiles, end)


def prepare(place: Place, item: Part, length: jax.Array, newest: jax.Array, tables: Sequence[Any]) -> None:
    """Emits the loading of a kv head's queries, normed and rotated; and if ``newest``, of the new token's key and value."""
    attention = _attention(place)

    def body(e: Emitter, scalars: list[Value], refs: list[Value], arrays: Any) -> None:
        _Heads(e, attention, *scalars, *refs).run()

    place.emit(body, [item.row, item.head, length, newest], tables)


class _Heads:
    """A warp takes a head: the queries' first, then the key's and the value's. A thread takes four columns of it."""

    def __init__(
        self,
        e: Emitter,
        attention: Attention,
        row: Value,
        head: Value,
        length: Value,
        newest: Value,
        cos: Value,
        sin: Value,
    ):
        self.e, self.of, self.row, self.head, self.length, self.newest = e, attention, row, head, length, newest
        self.warp, self.lane = w.quotient(w.thread(), 32), w.remainder(w.thread(), 32)
        self.half = attention.head_dim // 2
        # Threads beyond the last column take the last four again, but hand on zeros.
        column = w.mul(self.lane, w.integer(4))
        self.inside = w.below(column, w.integer(attention.head_dim))
        self.place, self.column = column, w.smaller(column, w.integer(attention.head_dim - 4))
        at = w.add(w.mul(row, w.integer(self.half)), w.both(self.column, w.integer(self.half - 1)))
        self.cos, self.sin = (w.load_floats(table, w.mul(at, w.integer(4))) for table in (cos, sin))

    def run(self) -> None:
        w.meet()  # nobody multiplies the last input any more
        for number in range(self.of.group + 2):
            with w.when(w.equal(self.warp, w.integer(number % 4))):
                if number < self.of.group:
                    self._query(number)
                    continue
                with w.when(w.below(w.integer(0), self.newest)):
                    if number == self.of.group:
                        self._keep(self._rotated(self._normed(self._columns(1, self.head), 1)), self.of.keys, FRESH_KEY)
                    else:
                        self._keep(self._columns(2, self.head), self.of.values, FRESH_VALUE)

    def _query(self, number: int) -> None:
        head = w.add(w.mul(self.head, w.integer(self.of.group)), w.integer(number))
        values = self._rotated(self._normed(self._columns(0, head), 0))
        w.store_activations(
            self.e.activations, w.activation_offset(self.place, w.integer(number), w.integer(0)), values
        )

    def _columns(self, which: int, head: Value) -> list[Value]:
        """Of a head of the queries (0), keys (1) or values (2), as projected."""
        within = w.add(w.mul(head, w.integer(self.of.head_dim)), self.column)
        column, base = w.add(within, w.integer(self.of.columns[which])), self.e.base(self.of.of)

        def load() -> tuple[list[Value], Value]:
            values, words = self.e.sums(base, self.of.of, self.row, column)
            missing = differ(words, self.e.epoch)
            if self.of.scaled is None:
                return values, missing
            squares, late = self.e.squares(self.of.scaled)
            return values + squares, w.either(missing, late)

        scaled = self.of.scaled is not None
        values = self.e.wait(load, 4 + (self.e.plan.batch if scaled else 0))
        values, squares = values[:4], values[4:]
        if scaled:
            root = self.e.by_row(self.row, [self.e.root(total) for total in squares])
            values = [w.mul_f(v, root) for v in values]
        if self.of.biases is not None:
            bias = w.load_bf16(self.e.operand(self.of.biases[which]), w.mul(within, w.integer(2)))
            values = [w.add_f(v, b) for v, b in zip(values, bias, strict=True)]
        return values

    def _normed(self, values: list[Value], which: int) -> list[Value]:
        if self.of.norms is None:
            return values
        squares = w.select(self.inside, w.total([w.mul_f(v, v) for v in values]), w.number(0.0))
        mean = w.mul_f(w.warp_sum(squares), w.number(1.0 / self.of.head_dim))
        root = w.inverse_root(w.add_f(mean, w.number(self.e.launch.eps)))
        scale = w.load_bf16(self.e.operand(self.of.norms[which]), w.mul(self.column, w.integer(2)))
        return [w.mul_f(w.mul_f(v, root), s) for v, s in zip(values, scale, strict=True)]

    def _rotated(self, values: list[Value]) -> list[Value]:
        """Pairs columns that are half a head apart; what is beyond the last column becomes zero."""
        sign = w.select(w.below(self.column, w.integer(self.half)), w.number(-1.0), w.number(1.0))
        others = [w.mul_f(w.partner(v, self.half // 4), sign) for v in values]
        columns = zip(values, others, self.cos, self.sin, strict=True)
        rotated = [w.add_f(w.mul_f(v, c), w.mul_f(o, s)) for v, o, c, s in columns]
        return [w.select(self.inside, v, w.number(0.0)) for v in rotated]

    def _keep(self, values: list[Value], cache: int, fresh: int) -> None:
        """Puts the new token's key or value into the cache, and aside for this step."""
        w.store_activations(self.e.small, w.add(w.integer(fresh), w.mul(self.lane, w.integer(8))), values)
        slot = w.add(w.mul(self.row, w.integer(self.of.kv_heads)), self.head)
        slot = w.add(w.mul(slot, w.integer(self.e.plan.slots)), self.length)
        at = w.add(w.mul(slot, w.integer(self.of.head_dim)), self.column)
        w.store_bf16(self.e.operand(cache), w.mul(at, w.integer(2)), values, self.inside)


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
            w.store_activation(e.activations, w.activation_offset(row, column, w.integer(WEIGHTS_TILE)), weight)
        parts = [value for value, _, _ in _entries(sums)[:2]]
        added = [
            w.add_f(w.mul_f(p, s), w.add_f(weights[i], weights[i + 2]))
            for i, (p, s) in enumerate(zip(parts, scale, strict=True))
        ]
        return _alike(scores, tops), _alike(scores, added), _alike(scores, scale)

    return place.emit(body, [begin, first, length], arrays=[scores, *state], returns=(_SHAPE,) * 3)


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
            at = w.add(w.add(first_head, query), w.integer(plan.offset("weights", place.step)))
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
