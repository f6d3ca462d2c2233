"""How a program of the persistent kernel hands on the products of an item: as words for later phases, or as the launch's output."""

from typing import Any

import jax

from pallas_kernels.persistent import code as w
from pallas_kernels.persistent.code import Value
from pallas_kernels.persistent.columns import Columns, columns
from pallas_kernels.persistent.launch import Emitter, Place
from pallas_kernels.persistent.steps import CHUNK, THREADS, Collect
from pallas_kernels.persistent.words import store_word


def store_words(place: Place, products: Any, begin: jax.Array) -> None:
    """Emits the storing of products [64, 8] as partial sums of a phase, the first one ``begin`` bytes behind its layer's words."""
    plan = place.launch.plan
    phase = plan.phase(place.step)

    def body(e: Emitter, scalars: list[Value], refs: Any, arrays: Any) -> None:
        (begin,), base = scalars, e.base(place.step)

        def one(value: Any, index: Any) -> None:
            r, sequence = (w.as_index(i) for i in index)
            within = w.mul(w.add(r, w.mul(sequence, w.integer(phase.padded_rows))), w.integer(4))
            store_word(base, w.add(begin, within), value, e.epoch, w.below(sequence, w.integer(plan.batch)))

        arrays[0].foreach(one)

    place.emit(body, [begin], arrays=[products])


def collect(place: Place, output: Any) -> None:
    """Emits the summing of a phase's partial sums into the output, float32 [batch, columns], normed if they are not yet."""
    plan = place.launch.plan
    step = plan.steps[place.step]
    assert isinstance(step, Collect)
    of_row = -(-step.columns // CHUNK)
    total = plan.batch * of_row

    def body(e: Emitter, scalars: Any, refs: list[Value], arrays: Any) -> None:
        mine = w.add(w.mul(w.program(), w.integer(THREADS)), w.thread())
        of = Columns(e, step.of)

        def turn(number: Value, _: Any) -> list[Value]:
            chunk = w.add(mine, w.mul(number, w.integer(plan.programs * THREADS)))
            real, chunk = w.below(chunk, w.integer(total)), w.smaller(chunk, w.integer(total - 1))
            row, column = w.quotient(chunk, of_row), w.mul(w.remainder(chunk, of_row), w.integer(CHUNK))
            values = columns(of, row, column)
            for i, value in enumerate(values):
                at = w.add(column, w.integer(i))
                offset = w.mul(w.add(at, w.mul(row, w.integer(step.columns))), w.integer(4))
                w.store_float(refs[0], offset, value, w.both(real, w.below(at, w.integer(step.columns))))
            return []

        w.repeat(w.integer(-(-total // (plan.programs * THREADS))), [], turn)

    place.emit(body, refs=[output])
