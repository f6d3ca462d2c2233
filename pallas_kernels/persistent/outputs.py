"""How a program of the persistent kernel hands on the products of an item: as words for later phases, or as the launch's output."""

from typing import Any

import jax

from pallas_kernels.persistent import code as w
from pallas_kernels.persistent.code import Value
from pallas_kernels.persistent.launch import ROOTS, Emitter, Place
from pallas_kernels.persistent.plan import Phase
from pallas_kernels.persistent.words import store_word


def store_words(place: Place, products: Any, split: jax.Array, row: jax.Array) -> None:
    """Emits the storing of products [64, 8] as partial sums of a phase, from output row ``row`` on."""
    plan = place.launch.plan
    phase = plan.steps[place.step]
    assert isinstance(phase, Phase)

    def body(e: Emitter, scalars: list[Value], refs: Any, arrays: Any) -> None:
        (split, row), base = scalars, e.base(0)
        begin = w.add(w.mul(split, w.integer(plan.batch * phase.padded_rows)), row)
        begin = w.add(begin, w.integer(plan.offset("sums", place.step)))

        def one(value: Any, index: Any) -> None:
            r, sequence = (w.as_index(i) for i in index)
            at = w.add(w.add(begin, r), w.mul(sequence, w.integer(phase.padded_rows)))
            store_word(base, w.mul(at, w.integer(4)), value, e.epoch, w.below(sequence, w.integer(plan.batch)))

        arrays[0].foreach(one)

    place.emit(body, [split, row], arrays=[products])


def store_plain(place: Place, output: Any, products: Any, row: jax.Array) -> None:
    """Emits the storing of products [64, 8] as rows of the output, float32 [batch, rows], divided by the norm if not yet done."""
    plan = place.launch.plan
    phase = plan.steps[place.step]
    assert isinstance(phase, Phase)
    (group,) = phase.layers[0]

    def body(e: Emitter, scalars: list[Value], refs: list[Value], arrays: Any) -> None:
        (begin,), (base,) = scalars, refs

        def one(value: Any, index: Any) -> None:
            r, sequence = w.add(begin, w.as_index(index[0])), w.as_index(index[1])
            real = w.both(w.below(sequence, w.integer(plan.batch)), w.below(r, w.integer(group.rows)))
            if phase.source.kind == "stream":
                at = w.mul(w.smaller(sequence, w.integer(plan.batch - 1)), w.integer(4))
                value = w.mul_f(value, w.load_shared(e.small, w.add(at, w.integer(ROOTS))))
            at = w.mul(w.add(r, w.mul(sequence, w.integer(group.rows))), w.integer(4))
            w.store_float(base, at, value, real)

        arrays[0].foreach(one)

    place.emit(body, [row], [output], [products])
