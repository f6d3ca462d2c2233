"""Queries, and the new token's key and value, from the words of q, k and v: normed, rotated, laid out, and put into the cache."""

from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels.persistent import code as w
from pallas_kernels.persistent.code import Value
from pallas_kernels.persistent.columns import Columns, columns
from pallas_kernels.persistent.items import Part
from pallas_kernels.persistent.launch import FRESH_KEY, FRESH_VALUE, Emitter, Place
from pallas_kernels.persistent.steps import Attention


def prepare(place: Place, item: Part, length: jax.Array, newest: jax.Array, tables: Sequence[Any]) -> None:
    """Emits the loading of a kv head's queries, normed and rotated; and if ``newest``, of the new token's key and value."""
    attention = place.launch.plan.steps[place.step]
    assert isinstance(attention, Attention)

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
        w.store_activations(self.e.heads, w.activation_offset(self.place, w.integer(number), w.integer(0)), values)

    def _columns(self, which: int, head: Value) -> list[Value]:
        """Of a head of the queries (0), keys (1) or values (2), as projected."""
        within = w.add(w.mul(head, w.integer(self.of.head_dim)), self.column)
        return columns(Columns(self.e, self.of.of[which]), self.row, within)

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
