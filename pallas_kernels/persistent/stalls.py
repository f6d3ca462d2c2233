"""What a launch that could not go on says, in one integer, and that in words.

Programs that wait in vain put in an integer each, of which the largest stays: that of the earliest layer and step, where the
trouble is. By time it would not be told apart from what follows from it: who waits for a program that waits gives up at about the
same time, or before. An operand that is elsewhere than was told comes before all waits.
"""

from collections.abc import Sequence

_ALONE = ("gate_up ahead", "attention", "stream", "logits")

STEPS = tuple(
    name
    for part in ("qkv", "attention", "gate_up ahead", "o", "gate_up", "stream", "down", "head", "logits")
    for name in ([part] if part in _ALONE else [part, f"{part} down", f"{part} up"])
)
"""Names of all steps there may be, in their order."""

LAYER_BITS, STEP_BITS, PROGRAM_BITS = 22, 14, 14
"""How far up layer and step lie in the integer, counted from the last; the program below."""

LAST = 255
MISPLACED = 1 << 30


def of_wait(step: str, layer: int, program: int) -> int:
    """The integer of a program that waits for the input of a step in vain."""
    return (LAST - layer << LAYER_BITS) | (LAST - STEPS.index(step) << STEP_BITS) | program


def of_operand(number: int) -> int:
    """The integer of an operand that is elsewhere than was told."""
    return MISPLACED | number


def stall_reason(stall: Sequence[int]) -> str | None:
    """What a launch said, `Carried.stall`, in words; None if it went on to its end."""
    found = stall[0]
    if not found:
        return None
    if found & MISPLACED:
        return (
            f"the persistent decode kernel was told where operand {found - MISPLACED} is, but found it elsewhere: please report"
            " this, with the versions of JAX and of its CUDA plugin"
        )
    step, program = STEPS[LAST - (found >> STEP_BITS & LAST)], found % (1 << PROGRAM_BITS)
    layer = LAST - (found >> LAYER_BITS)
    where = (
        f"for the input of '{step}'"
        if step.startswith(("head", "logits"))
        else f"for the input of '{step}' in layer {layer}"
    )
    return (
        f"the persistent decode kernel gave up waiting {where}, block {program} among others: its blocks must all run at once,"
        " which another process or a partition of the GPU can prevent"
    )
