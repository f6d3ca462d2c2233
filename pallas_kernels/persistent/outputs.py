"""How a program of the persistent kernel hands on the products of an item: as words for later phases, or as plain outputs."""

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.persistent import words as w
from pallas_kernels.persistent.inputs import ROOTS
from pallas_kernels.persistent.plan import Segment


def store_words(segment: Segment, number: int, words: Any, products: Any, split: jax.Array, row: jax.Array) -> None:
    """Emits the storing of products [64, 8] as partial sums of a phase, from output row ``row`` on."""
    phase = segment.phases[number]

    @w.emitted(plgpu.RefType(), plgpu.Layout.WGMMA, w.SCALAR(()), w.SCALAR(()))
    def emit(context: Any, words: Any, products: Any, split: Any, row: Any) -> None:
        base = w.address(words)
        begin = w.mul(w.scalar(split), w.integer(segment.batch * phase.padded_rows))
        begin = w.add(w.add(begin, w.scalar(row)), w.integer(segment.word_offset(number)))

        def one(value: Any, index: Any) -> None:
            r, sequence = (w.as_index(i) for i in index)
            at = w.add(w.add(begin, r), w.mul(sequence, w.integer(phase.padded_rows)))
            w.store_word(base, w.mul(at, w.integer(4)), value, w.below(sequence, w.integer(segment.batch)))

        products.foreach(one)

    emit(words, products, split, row)


def store_plain(
    segment: Segment, number: int, group: int, output: Any, small: Any, products: Any, row: jax.Array
) -> None:
    """Emits the storing of products [64, 8] as rows of a group's output [batch, rows], divided by the norm if they are not yet."""
    phase = segment.phases[number]
    rows = phase.groups[group].rows

    @w.emitted(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WGMMA, w.SCALAR(()))
    def emit(context: Any, output: Any, small: Any, products: Any, row: Any) -> None:
        base, divisors, begin = w.address(output), w.address(small), w.scalar(row)

        def one(value: Any, index: Any) -> None:
            r, sequence = w.add(begin, w.as_index(index[0])), w.as_index(index[1])
            real = w.both(w.below(sequence, w.integer(segment.batch)), w.below(r, w.integer(rows)))
            if phase.source.kind == "stream":
                at = w.mul(w.smaller(sequence, segment.batch - 1), w.integer(4))
                value = w.mul_f(value, w.load_shared(divisors, w.add(at, w.integer(ROOTS))))
            at = w.mul(w.add(r, w.mul(sequence, w.integer(rows))), w.integer(2))
            w.store_one(base, at, value, real)

        products.foreach(one)

    emit(output, small, products, row)
