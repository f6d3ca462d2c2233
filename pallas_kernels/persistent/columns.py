"""Columns of a phase's output, put together from the partial sums that splits and pieces have left as words."""

import dataclasses

from pallas_kernels.persistent import code as w
from pallas_kernels.persistent.code import Value
from pallas_kernels.persistent.launch import Emitter, numbers_of
from pallas_kernels.persistent.steps import CHUNK, TILE_ROWS, Phase
from pallas_kernels.persistent.words import Read, load_words


@dataclasses.dataclass(frozen=True)
class Output:
    """What is read of a phase's output: which group of its rows; ``behind`` is 1 for that of the layer before."""

    step: int
    group: int = 0
    behind: int = 0


class FourColumns:
    """Four columns of an output in one sequence: where their partial sums lie, and which there are."""

    def __init__(self, e: Emitter, output: Output, row: Value, column: Value):
        phase, plan = e.plan.steps[output.step], e.plan
        assert isinstance(phase, Phase)
        self._base, self.epoch = e.base(output.step, output.behind), w.sub(e.epoch, w.integer(output.behind))
        more = _more_pieces(e, phase, output, column) if phase.pieces > 1 else None
        at = w.add(w.mul(row, w.integer(phase.padded_rows)), column)
        self._parts: list[tuple[Value, Value | None]] = []
        for part in range(phase.parts):
            begin = plan.offset("sums", output.step) + part * plan.batch * phase.padded_rows
            piece = part % phase.pieces
            there = None if more is None or piece == 0 else w.below(w.integer(piece - 1), more)
            self._parts.append((w.mul(w.add(at, w.integer(begin)), w.integer(4)), there))

    def load(self, need: Value, epoch: Value) -> tuple[list[Value], list[Value]]:
        """The columns, and the words that they are the sum of. Of a piece that there is not, the word is as good as zero."""
        found = [
            load_words(self._base, offset, need if there is None else w.both(need, there), epoch)
            for offset, there in self._parts
        ]
        values = [w.total(list(four)) for four in zip(*map(w.floats, found), strict=True)]
        return values, [word for four in found for word in four]

    @property
    def read(self) -> Read:
        return Read(CHUNK, self.load, self.epoch)


def columns(e: Emitter, output: Output, scaled: int | None, row: Value, column: Value) -> list[Value]:
    """Four columns of an output once they are written, normed if ``scaled`` names the phase whose norm is to be done."""
    squares = [] if scaled is None else [e.squares(scaled)]
    values, *found = e.wait([FourColumns(e, output, row, column).read, *squares])
    if not found:
        return values
    root = e.by_row(row, [e.root(total) for total in found[0]])
    return [w.mul_f(value, root) for value in values]


def _more_pieces(e: Emitter, phase: Phase, output: Output, column: Value) -> Value:
    """How many pieces beside the first the row tile of a column has, in each split; see `steps.sharer`."""
    numbers = numbers_of(e.plan, phase)
    (team,) = (number for number, team in enumerate(phase.teams) if output.group in team)
    tiles, k_tiles, sharers, shift = (
        e.number(numbers[name], output.behind)
        for name in (f"tiles {team}", f"k_tiles {team}", f"sharers {team}", f"shift {output.group}")
    )
    begin = w.mul(w.add(w.quotient(column, TILE_ROWS), shift), k_tiles)
    first, last = (
        w.quotient(w.sub(w.mul(w.add(begin, after), sharers), w.integer(1)), tiles) for after in (w.integer(1), k_tiles)
    )
    return w.sub(last, first)
