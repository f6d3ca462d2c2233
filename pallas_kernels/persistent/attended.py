"""What an attention has attended, read from the words that its parts of the positions have left."""

import functools

from pallas_kernels.persistent import code as w
from pallas_kernels.persistent.code import Value
from pallas_kernels.persistent.launch import Emitter
from pallas_kernels.persistent.steps import CHUNK, Attention
from pallas_kernels.persistent.words import Read, in_fours, load_run, load_words


def read_attended(e: Emitter, step: int, base: Value, row: Value, column: Value) -> Read:
    """Four columns of a sequence: those of all parts, weighed by what each has of the softmax.

    Args:
      e: of this step.
      step: number of the attention.
      base: where its words lie.
      row, column: the sequence, and the first of the columns.
    """
    of, plan = e.plan.steps[step], e.plan
    assert isinstance(of, Attention)
    sums, weights = (plan.offset(kind, step) for kind in ("sums", "weights"))
    head = w.add(w.mul(row, w.integer(of.heads)), w.quotient(column, of.head_dim))
    first = w.add(w.mul(head, w.integer(of.parts)), w.integer(weights))

    def load(need: Value, old: list[Value]) -> list[Value]:
        found = load_run(base, first, need, old[: of.parts])
        for part, four in enumerate(in_fours(old[of.parts :])):
            begin = w.mul(w.add(w.integer(part * plan.batch), row), w.integer(of.heads * of.head_dim))
            at = w.mul(w.add(w.add(begin, column), w.integer(sums)), w.integer(4))
            found += load_words(base, at, need, four)
        return found

    words = [w.integer(0)] * (of.parts * (1 + CHUNK))
    return Read(e.epoch, words, load, functools.partial(_weighed, of.parts))


def _weighed(parts: int, words: list[Value]) -> list[Value]:
    """Four columns, from the logarithms of all parts' weights and then their columns."""
    logs, fours = w.floats(words[:parts]), [w.floats(four) for four in in_fours(words[parts:])]
    if parts == 1:
        return fours[0]
    largest = functools.reduce(w.max_f, logs)
    shares = [w.power_of_two(w.sub_f(log, largest)) for log in logs]
    whole = w.total(shares)
    return [
        w.div_f(w.total([w.mul_f(s, v) for s, v in zip(shares, column, strict=True)]), whole)
        for column in zip(*fours, strict=True)
    ]
