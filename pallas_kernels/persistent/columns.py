"""Columns of an output, put together from the partial sums that splits and pieces have left as words."""

from pallas_kernels.persistent import code as w
from pallas_kernels.persistent.code import Value
from pallas_kernels.persistent.launch import Emitter
from pallas_kernels.persistent.sources import Output
from pallas_kernels.persistent.steps import CHUNK, TILE_ROWS, Phase
from pallas_kernels.persistent.words import Read, in_fours, load_part

_WORD = 4  # bytes


class Columns:
    """An output in this layer, or in the one before if it is ``behind``: where it lies. Made once, for all that is read of it."""

    def __init__(self, e: Emitter, output: Output, behind: int = 0):
        self.e, self.behind = e, behind
        self._bias = None if output.bias is None else e.operand(output.bias, behind)
        self.has_bias = output.bias is not None
        self.base = e.base(output.steps[0], behind)
        self.epoch = e.epoch_of(behind)
        self.normed_by = e.plan.normed_by(output)
        self._numbers = e.plan.numbers.of_output(output)
        self._phases = [step for step in map(e.plan.steps.__getitem__, output.phases) if isinstance(step, Phase)]
        self._second = e.number(self._numbers["second"], behind) if len(self._phases) > 1 else None
        self._begin, self._row = (e.number(self._numbers[name], behind) for name in ("begin", "row"))
        rows, of_column = set(self._numbers["row"]), _WORD * e.plan.batch
        self._step = of_column * rows.pop() if len(rows) == 1 else w.mul(self._row, w.integer(of_column))
        self._pieces = max(phase.pieces for phase in self._phases)
        told = ("tiles", "k_tiles", "sharers", "shift", "start") if self._pieces > 1 else ()
        self._tile = {name: e.number(self._numbers[name], behind) for name in told}

    @property
    def parts(self) -> int:
        """Words that a column may be made of."""
        return max(phase.parts for phase in self._phases)

    @property
    def varies(self) -> bool:
        """Whether layers differ in where it lies, or in how many parts."""
        return any(len(set(values)) > 1 for values in self._numbers.values())

    def read(self, row: Value, column: Value) -> Read:
        """Four columns of a sequence."""
        at = w.add(w.add(w.mul(row, self._row), column), self._begin)
        first, there = w.offset_pointer(self.base, w.mul(at, w.integer(_WORD))), self._there(column)

        def absent(part: int) -> Value:
            """Words of a part that there is not, as good as zeros that are there."""
            return w.select(w.equal(w.both(there, w.integer(1 << part)), w.integer(0)), self.epoch, w.integer(0))

        def load(need: Value, old: list[Value]) -> list[Value]:
            some = w.select(need, there, w.integer(0))
            fours = [load_part(first, part, self._step, some, four) for part, four in enumerate(in_fours(old))]
            return [word for four in fours for word in four]

        def values(words: list[Value]) -> list[Value]:
            return [w.total(list(column)) for column in zip(*map(w.floats, in_fours(words)), strict=True)]

        words = [word for part in range(self.parts) for word in [absent(part)] * CHUNK]
        return Read(self.epoch, words, load, values)

    def _there(self, column: Value) -> Value:
        """Which parts of a column there are: a bit for each."""
        more = self._more_pieces(column) if self._pieces > 1 else w.integer(0)
        found = w.integer(0)
        for piece in range(self._pieces):
            bits = [sum(1 << part for part in range(p.parts) if part % p.pieces == piece) for p in self._phases]
            these = w.integer(bits[0])
            if self._second is not None:
                these = w.select(w.equal(self._second, w.integer(0)), these, w.integer(bits[1]))
            if piece:
                these = w.select(w.below(w.integer(piece - 1), more), these, w.integer(0))
            found = w.either(found, these)
        return found

    def _more_pieces(self, column: Value) -> Value:
        """How many pieces beside the first the row tile of a column has, in each split; see `steps.sharer`."""
        tiles, k_tiles, sharers, shift, start = self._tile.values()
        column = w.add(column, start) if any(self._numbers["start"]) else column
        begin = w.mul(w.add(w.quotient(column, TILE_ROWS), shift), k_tiles)
        first, last = (
            w.quotient(w.sub(w.mul(w.add(begin, after), sharers), w.integer(1)), tiles)
            for after in (w.integer(1), k_tiles)
        )
        return w.sub(last, first)

    def normed(self, values: list[Value], root: Value | None) -> list[Value]:
        """Columns divided by the norm that is still to be done, whose reciprocal is ``root``."""
        if root is None or self.normed_by is None:
            return values
        if self._second is not None:
            root = w.select(w.equal(self._second, w.integer(0)), root, w.number(1.0))
        return [w.mul_f(value, root) for value in values]

    def bias(self, column: Value) -> list[Value]:
        """What is still to be added to four columns, to be loaded before they are waited for; nothing if there is no bias."""
        if self._bias is None:
            return []
        found = w.load_bf16(self._bias, w.mul(column, w.integer(2)))
        if not self.behind:
            return found
        # The layer before the first one is the embedding, which has none.
        is_first = w.equal(self.e.layer, w.integer(0))
        return [w.select(is_first, w.number(0.0), value) for value in found]


def biased(values: list[Value], bias: list[Value]) -> list[Value]:
    """Columns with their bias, if they have one."""
    return [w.add_f(v, b) for v, b in zip(values, bias, strict=True)] if bias else values


def columns(of: Columns, row: Value, column: Value) -> list[Value]:
    """Four columns of an output once they are written, normed, with their bias."""
    e, bias = of.e, of.bias(column)
    squares = [] if of.normed_by is None else [e.squares(of.normed_by, row)]
    values, *found = e.wait([of.read(row, column), *squares])
    root = e.root(*found[0]) if found else None
    return biased(of.normed(values, root), bias)
