"""The residual stream as words: how it is read, with or without an output added to it, and the step that only keeps it."""

from collections.abc import Sequence
from typing import Any

from pallas_kernels.persistent import code as w
from pallas_kernels.persistent.code import Value
from pallas_kernels.persistent.columns import Columns, biased
from pallas_kernels.persistent.items import turn_of
from pallas_kernels.persistent.launch import SQUARES, Emitter, Place
from pallas_kernels.persistent.sources import Source
from pallas_kernels.persistent.steps import CHUNK, THREADS, Keep
from pallas_kernels.persistent.words import Read, load_words, store_word, store_words


def read_stream(e: Emitter, source: Source, row: Value, column: Value, added: Read | None) -> Read:
    """Four columns of a sequence's stream as a source has it, with an output added to them if one is given."""
    base, at = e.base(source.stream, source.behind), w.add(w.mul(row, w.integer(e.plan.width)), column)
    at = w.mul(w.add(at, w.integer(e.plan.offset("stream", source.stream))), w.integer(4))
    words = added.words if added is not None else []
    count = len(words)

    def load(need: Value, old: list[Value]) -> list[Value]:
        first = added.load(need, old[:count]) if added is not None else []
        return first + load_words(base, at, need, old[count:])

    def values(words: list[Value]) -> list[Value]:
        stream = w.floats(words[count:])
        return stream if added is None else biased(stream, added.values(words[:count]))

    return Read(e.epoch_of(source.behind), words + [w.integer(0)] * CHUNK, load, values)


def write_stream(e: Emitter, row: Value, column: Value, values: list[Value], condition: Value) -> None:
    """Publishes four columns of it as those of this step."""
    at = w.add(w.mul(row, w.integer(e.plan.width)), column)
    at = w.mul(w.add(at, w.integer(e.plan.offset("stream", e.step))), w.integer(4))
    store_words(e.base(e.step), at, values, e.epoch, condition)


def sum_of_squares(values: list[Value]) -> Value:
    """Of a thread's columns."""
    return w.total([w.mul_f(v, v) for v in values])


def keep_squares(e: Emitter, warp: Value, lane: Value, square: Value) -> None:
    """Has a warp's sum of them in shared memory."""
    at = w.add(w.integer(SQUARES), w.mul(warp, w.integer(4)))
    w.store_shared(e.small, at, w.warp_sum(square), w.equal(lane, w.integer(0)))


def publish_squares(e: Emitter, base: Value, number: Value, warps: Sequence[int], alone: Value) -> None:
    """Adds up what warps have kept, as the ``number``-th word of this step's squares, by one thread. ``base`` is the step's."""
    total = w.total([w.load_shared(e.small, w.integer(SQUARES + 4 * warp)) for warp in warps])
    at = w.mul(w.add(number, w.integer(e.plan.offset("squares", e.step))), w.integer(4))
    store_word(base, at, total, e.epoch, alone)


def keep_stream(place: Place) -> None:
    """Emits a `Keep`, by one warpgroup."""
    plan = place.launch.plan
    keep = plan.steps[place.step]
    assert isinstance(keep, Keep)

    def body(e: Emitter, given: list[Value], refs: Any, arrays: Any) -> None:
        (turn,) = given
        for begin in range(0, keep.items, plan.programs):
            item = w.add(turn, w.integer(begin))
            with w.when(w.below(item, w.integer(keep.items))):
                if begin:
                    w.meet()  # the last item's squares are read
                _keep_item(e, keep, w.quotient(item, keep.parts), w.remainder(item, keep.parts))

    place.emit(body, [turn_of(place)])


def _keep_item(e: Emitter, keep: Keep, row: Value, part: Value) -> None:
    within = w.mul(w.add(w.mul(part, w.integer(THREADS)), w.thread()), w.integer(CHUNK))
    real = w.below(within, w.integer(keep.width))
    column = w.select(real, within, w.integer(0))
    (output,) = keep.source.of
    of = Columns(e, output)
    bias = of.bias(column)
    (values,) = e.wait([read_stream(e, keep.source, row, column, of.read(row, column))])
    values = biased(values, bias)
    write_stream(e, row, column, values, real)
    square = w.select(real, sum_of_squares(values), w.number(0.0))
    keep_squares(e, w.quotient(w.thread(), 32), w.remainder(w.thread(), 32), square)
    w.meet()
    place, alone = w.add(w.mul(row, w.integer(keep.parts)), part), w.equal(w.thread(), w.integer(0))
    publish_squares(e, e.base(e.step), place, range(THREADS // 32), alone)
