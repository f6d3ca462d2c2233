"""Columns of an output, put together from the partial sums that splits and pieces have left as words."""

from pallas_kernels.persistent import code as w
from pallas_kernels.persistent.code import Value
from pallas_kernels.persistent.launch import Emitter
from pallas_kernels.persistent.sources import Output
from pallas_kernels.persistent.steps import CHUNK, TILE_ROWS, Phase
from pallas_kernels.persistent.words import Read, load_part


class Columns:
    """An output in this layer, or in the one before if it is ``behind``: where it lies. Made once, for all that is read of it."""

    def __init__(self, e: Emitter, output: Output, behind: int = 0):
        self.e, self.behind = e, behind
        self._bias = None if output.bias is None else e.operand(output.bias, behind)
        self.base = e.base(output.steps[0], behind)
        self.epoch = w.sub(e.epoch, w.integer(behind))
        self.normed_by = e.plan.normed_by(output)
        self._numbers = e.plan.numbers.of_output(output)
        self._phases = [step for step in map(e.plan.steps.__getitem__, output.phases) if isinstance(step, Phase)]
        self._second = e.number(self._numbers["second"], behind) if len(self._phases) > 1 else None
        self._begin, self._row = (e.number(self._numbers[name], behind) for name in ("begin", "row"))
        rows = set(self._numbers["row"])
        words = CHUNK * e.plan.batch  # bytes of a word, times sequences
        self._step = words * rows.pop() if len(rows) == 1 else w.mul(self._row, w.integer(words))
        self._tile = {name: e.number(self._numbers[name], behind) for name in ("tiles", "k_tiles", "sharers", "shift")}

    @property
    def parts(self) -> int:
        """Words that a column may be made of."""
        return max(phase.parts for phase in self._phases)

    def read(self, row: Value, column: Value) -> Read:
        """Four columns of a sequence."""
        at = w.add(w.add(w.mul(row, self._row), column), self._begin)
        first, there = w.mul(at, w.integer(4)), self._there(column)

        def load(need: Value, epoch: Value) -> tuple[list[Value], list[Value]]:
            """The columns, and the words that they are the sum of. Of a part that there is not, the word is as good as zero."""
            some = w.select(need, there, w.integer(0))
            found = [load_part(self.base, first, part, self._step, some, epoch) for part in range(self.parts)]
            values = [w.total(list(four)) for four in zip(*map(w.floats, found), strict=True)]
            return values, [word for four in found for word in four]

        return Read(CHUNK, load, self.epoch)

    def _there(self, column: Value) -> Value:
        """Which parts of a column there are: a bit for each."""
        most = max(phase.pieces for phase in self._phases)
        more = self._more_pieces(column) if most > 1 else w.integer(0)
        found = w.integer(0)
        for piece in range(most):
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
        tiles, k_tiles, sharers, shift = self._tile.values()
        starts = self._numbers["start"]
        column = w.add(column, self.e.number(starts, self.behind)) if any(starts) else column
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
    squares = [] if of.normed_by is None else [e.squares(of.normed_by)]
    values, *found = e.wait([of.read(row, column), *squares])
    root = e.by_row(row, [e.root(total) for total in found[0]]) if found else None
    return biased(of.normed(values, root), bias)
