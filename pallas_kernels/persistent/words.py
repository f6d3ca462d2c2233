"""Words in GPU memory, and waiting for them.

A word is a float32 whose low eight mantissa bits are its epoch, the number of the layer that wrote it: who reads it can tell
whether it is there yet. Words need no barrier, no fence and no counter.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir.dialects import arith, scf

from pallas_kernels.persistent import code as w
from pallas_kernels.persistent.code import Value

SPINS = 2_000_000
"""Attempts to read a word before a program goes on without it: seconds, where the longest wait is microseconds."""

STALL_INTEGERS = 4
"""What a wait in vain writes."""


def load_words(base: Value, offset: Value, there: Value | None = None, epoch: Value | None = None) -> list[Value]:
    """Four words, past any cache of this core. If they are not ``there``, zeros of the epoch."""
    if there is None:
        code = w.at_offset("$4", "$5") + "ld.relaxed.gpu.global.v4.u32 {$0,$1,$2,$3}, [a]; }"
        return w.ptx(code, base, offset, results=[w.int_type()] * 4)
    code = w.at_offset("$4", "$5") + ".reg .pred q; .reg .b32 v<4>; setp.ne.u32 q, $6, 0; "
    code += " ".join(f"mov.b32 v{i}, $7;" for i in range(4)) + "@q ld.relaxed.gpu.global.v4.u32 {v0,v1,v2,v3}, [a]; "
    code += " ".join(f"mov.b32 ${i}, v{i};" for i in range(4)) + " }"
    return w.ptx(code, base, offset, w.flag(there), epoch, results=[w.int_type()] * 4)


def load_word(base: Value, offset: Value) -> Value:
    """One word, likewise."""
    return w.ptx(
        w.at_offset("$1", "$2") + "ld.relaxed.gpu.global.u32 $0, [a]; }", base, offset, results=[w.int_type()]
    )[0]


def store_word(base: Value, offset: Value, value: Value, epoch: Value, condition: Value) -> None:
    """A float as a word of an epoch."""
    word = arith.ori(w.both(arith.bitcast(w.int_type(), value), w.integer(-256)), epoch)
    code = w.at_offset("$0", "$1") + ".reg .pred q; setp.ne.u32 q, $3, 0; @q st.relaxed.gpu.global.u32 [a], $2; }"
    w.ptx(code, base, offset, word, w.flag(condition))


def differ(words: Sequence[Value], epoch: Value) -> Value:
    """An integer whose low eight bits are zero if all words are of the epoch."""
    found = w.integer(0)
    for word in words:
        found = arith.ori(found, arith.xori(word, epoch))
    return found


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long a program waits, and where it says that it did in vain.

    Attributes:
      attempts: byte address in shared memory of the number of attempts.
      stall: base of an int32 [4] in GPU memory.
      step, epoch: what is waited for.
    """

    attempts: Value
    stall: Value
    step: Value
    epoch: Value


def until_written(load: Callable[[], tuple[list[Value], Value]], results: int, patience: Patience) -> list[Value]:
    """Calls ``load`` until the words it reads are there.

    ``load`` gives ``results`` floats, and an integer whose low eight bits are zero if all words they are made of were written.
    After too many attempts it gives NaN, and so does all that depends on it, says so in ``patience.stall`` and makes all later
    waits of this program short: a kernel that spins must end, and never with a wrong number.
    """
    types = [*[w.float_type()] * results, w.int_type()]
    limit = w.load_shared_integer(patience.attempts)
    loop = scf.WhileOp([*types, w.int_type()], [w.integer(0)])
    before = loop.before.blocks.append(w.int_type())
    with ir.InsertionPoint(before):
        values, missing = load()
        attempts = w.add(before.arguments[0], w.integer(1))
        missing = w.both(missing, w.integer(255))
        again = w.both(w.below(w.integer(0), missing), w.below(attempts, limit))
        scf.condition(again, [*values, missing, attempts])
    after = loop.after.blocks.append(*types, w.int_type())
    with ir.InsertionPoint(after):
        scf.yield_([after.arguments[results + 1]])
    *found, missing, _ = loop.results
    code = "{ .reg .pred q; setp.ne.u32 q, $0, 0; @q st.global.v4.u32 [$1], {$2,$3,$4,$5}; @q st.shared.u32 [$6], $2; }"
    w.ptx(
        code, missing, patience.stall, w.integer(1), patience.step, w.program(), patience.epoch, patience.attempts
    )  # fmt: skip
    late = w.select(w.below(w.integer(0), missing), w.number(math.nan), w.number(0.0))
    return [w.add_f(value, late) for value in found]
