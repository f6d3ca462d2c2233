"""What a step needs beside its tiles, brought near before it begins.

Tensor maps, scales and biases are small, but each is read once a layer, when what the cache held of it is long gone. A copy waits a
microsecond for a tensor map that comes from GPU memory, and so does the way from one phase to the next for a norm's scale.
"""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.persistent import code as w
from pallas_kernels.persistent import copies
from pallas_kernels.persistent.launch import Emitter, Place
from pallas_kernels.persistent.ring import Ring
from pallas_kernels.persistent.steps import Attention, Keep, Phase, Step

_LINE = 128  # bytes


def fetch_ahead(place: Place, ring: Ring) -> None:
    """Emits the fetching of this step's vectors, which all programs share, and of the next step's tensor maps, which each program
    needs for itself. For the loading warpgroup, which is here before the other."""
    plan = place.launch.plan
    step, following = plan.steps[place.step], place.step + 1
    if isinstance(step, Keep):
        return  # its vectors, if any, are few; what follows has been fetched before it
    if following < len(plan.steps) and isinstance(plan.steps[following], Keep):
        following += 1
    if following == plan.in_layer:
        # After the last layer the head's first step follows; its operands are counted on from the last layer's.
        first, last = (_copied(plan.steps[n]) for n in (0, plan.in_layer))
        is_last = place.layer == plan.layers - 1
        operands = [jnp.where(is_last, b, a) for a, b in zip(first, last * len(first), strict=False)]
        layer = place.layer + 1
    else:
        operands = [jnp.int32(n) for n in (_copied(plan.steps[following]) if following < len(plan.steps) else [])]
        layer = place.layer
    for operand in operands:
        ring.fetch_map(layer * plan.operands + operand)
    vectors = _vectors(place, step)

    def body(e: Emitter, scalars: Any, refs: Any, arrays: Any) -> None:
        mine, begin = w.add(w.program(), w.mul(w.thread(), w.integer(plan.programs))), 0
        for operand, elements, behind in vectors:
            lines = -(-2 * elements // _LINE)
            within = w.sub(mine, w.integer(begin))  # wraps to a large number for those before
            with w.when(w.below(within, w.integer(lines))):
                copies.fetch(w.offset_pointer(e.operand(operand, behind), w.mul(within, w.integer(_LINE))))
            begin += lines

    if vectors:
        place.emit(body)


def _copied(step: Step) -> list[int]:
    """Operands of a step that come as tiles."""
    if isinstance(step, Attention):
        return [step.keys, step.values]
    return list(dict.fromkeys(group.weight for group in step.layers[0])) if isinstance(step, Phase) else []


def _vectors(place: Place, step: Step) -> list[tuple[int, int, int]]:
    """(operand, elements, whether of the layer before) of what a step reads a few columns at a time."""
    found = []
    if isinstance(step, Attention):
        sizes = [step.head_dim * heads for heads in (step.heads, step.kv_heads, step.kv_heads)]
        found += [(number, step.head_dim, 0) for number in step.norms or ()]
        found += [(of.bias, size, 0) for of, size in zip(step.of, sizes, strict=True) if of.bias is not None]
    if isinstance(step, Phase):
        width, behind = max(group.k for groups in step.layers for group in groups), step.source.behind
        found += [(step.source.scale, width, 0)] if step.source.kind == "stream" else []
        found += [(of.bias, width, behind) for of in step.source.of if of.bias is not None]
    return found
