"""Words in GPU memory, and waiting for them.

A word is a float32 whose low eight mantissa bits are its epoch, the number of the layer that wrote it: who reads it can tell
whether it is there yet. Words need no barrier, no fence and no counter.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir.dialects import arith, scf

from pallas_kernels.persistent import code as w
from pallas_kernels.persistent import stalls
from pallas_kernels.persistent.code import Value

SPINS = 2_000_000
"""Attempts to read a word before a program goes on without it: seconds, where the longest wait is microseconds."""


def load_words(base: Value, offset: Value, there: Value, epoch: Value) -> list[Value]:
    """Four words, past any cache of this core. If they are not ``there``, zeros of the epoch."""
    loaded = ", ".join(f"v{i}" for i in range(4))
    code = _unless(4, "$6", "$7") + f"@q ld.relaxed.gpu.global.v4.u32 {{{loaded}}}, [a]; "
    code = w.at_offset("$4", "$5") + code + " ".join(f"mov.b32 ${i}, v{i};" for i in range(4)) + " }"
    return w.ptx(code, base, offset, w.flag(there), epoch, results=[w.int_type()] * 4)


def load_part(first: Value, part: int, step: Value | int, there: Value, epoch: Value) -> list[Value]:
    """The same of the ``part``-th of several, ``step`` bytes apart from the address ``first`` on, if that bit of ``there`` is set.

    Where it lies, and whether it is there, is found out anew with every attempt: registers are for words.
    """
    loaded = ", ".join(f"v{i}" for i in range(4))
    at = f"mad.wide.u32 a, $7, {part}, $4;" if not isinstance(step, int) else f"add.u64 a, $4, {part * step};"
    code = f"{{ .reg .u64 a; .reg .u32 m; {at} and.b32 m, $5, {1 << part}; "
    code += _unless(4, "m", "$6") + f"@q ld.relaxed.gpu.global.v4.u32 {{{loaded}}}, [a]; "
    code += " ".join(f"mov.b32 ${i}, v{i};" for i in range(4)) + " }"
    varying = [] if isinstance(step, int) else [step]
    return w.ptx(code, first, there, epoch, *varying, results=[w.int_type()] * 4)


def load_run(base: Value, first: Value, count: int, there: Value, epoch: Value) -> list[Value]:
    """``count`` words from the ``first`` on, likewise; that is a multiple of 4 if the count is."""
    if count % 4 == 0:
        fours = [w.mul(w.add(first, w.integer(begin)), w.integer(4)) for begin in range(0, count, 4)]
        return [word for at in fours for word in load_words(base, at, there, epoch)]
    return [_load_word(base, w.mul(w.add(first, w.integer(i)), w.integer(4)), there, epoch) for i in range(count)]


def _load_word(base: Value, offset: Value, there: Value, epoch: Value) -> Value:
    code = _unless(1, "$3", "$4") + "@q ld.relaxed.gpu.global.u32 v0, [a]; mov.b32 $0, v0; }"
    return w.ptx(w.at_offset("$1", "$2") + code, base, offset, w.flag(there), epoch, results=[w.int_type()])[0]


def _unless(words: int, there: str, epoch: str) -> str:
    """The begin of PTX that loads words v0.. where q holds."""
    zeros = " ".join(f"mov.b32 v{i}, {epoch};" for i in range(words))
    return f".reg .pred q; .reg .b32 v<{words}>; setp.ne.u32 q, {there}, 0; {zeros} "


def store_word(base: Value, offset: Value, value: Value, epoch: Value, condition: Value) -> None:
    """A float as a word of an epoch."""
    code = w.at_offset("$0", "$1") + ".reg .pred q; setp.ne.u32 q, $3, 0; @q st.relaxed.gpu.global.u32 [a], $2; }"
    w.ptx(code, base, offset, _word(value, epoch), w.flag(condition))


def store_words(base: Value, offset: Value, values: Sequence[Value], epoch: Value, condition: Value) -> None:
    """Four of them, whose offset is a multiple of 16."""
    code = ".reg .pred q; setp.ne.u32 q, $6, 0; @q st.relaxed.gpu.global.v4.u32 [a], {$2,$3,$4,$5}; }"
    w.ptx(w.at_offset("$0", "$1") + code, base, offset, *(_word(v, epoch) for v in values), w.flag(condition))


def _word(value: Value, epoch: Value) -> Value:
    return arith.ori(w.both(arith.bitcast(w.int_type(), value), w.integer(-256)), epoch)


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
      stall: address of an integer in GPU memory.
      step, epoch: what is waited for; the step as a number among `stalls.STEPS`.
    """

    attempts: Value
    stall: Value
    step: int
    epoch: Value


@dataclasses.dataclass(frozen=True)
class Read:
    """What is read of words: ``count`` floats, and the words they are made of, by ``load(need, epoch)``.

    That reads nothing, and may give any floats, where there is no need.
    """

    count: int
    load: Callable[[Value, Value], tuple[list[Value], list[Value]]]
    epoch: Value


def until_written(reads: Sequence[Read], patience: Patience) -> list[list[Value]]:
    """The floats of every read, once the words that they are made of are there.

    What has been found is not read again: polls of many programs would crowd out the weights, and each other.
    After too many attempts it gives NaN, and so does all that depends on it, says so in ``patience.stall`` and makes all later
    waits of this program short, which then say nothing: a kernel that spins must end, and never with a wrong number.
    """
    counts = [read.count for read in reads]
    types = [*[w.float_type()] * sum(counts), *[w.int_type()] * (len(reads) + 1)]
    limit = w.load_shared_integer(patience.attempts)
    start = [w.number(0.0)] * sum(counts) + [w.integer(1)] * len(reads) + [w.integer(0)]
    loop = scf.WhileOp(types, start)
    before = loop.before.blocks.append(*types)
    with ir.InsertionPoint(before):
        *carried, attempts = before.arguments
        found, missing = _attempt(reads, carried[: sum(counts)], carried[sum(counts) :])
        attempts = w.add(attempts, w.integer(1))
        again = w.both(w.below(w.integer(0), functools.reduce(w.either, missing)), w.below(attempts, limit))
        scf.condition(again, [*found, *missing, attempts])
    after = loop.after.blocks.append(*types)
    with ir.InsertionPoint(after):
        scf.yield_(list(after.arguments))
    *results, _ = loop.results
    found, late = results[: sum(counts)], functools.reduce(w.either, results[sum(counts) :])
    _give_up(late, limit, patience)
    nan = w.select(w.below(w.integer(0), late), w.number(math.nan), w.number(0.0))
    numbers = iter([w.add_f(value, nan) for value in found])
    return [list(itertools.islice(numbers, count)) for count in counts]


def _attempt(
    reads: Sequence[Read], found: Sequence[Value], missing: Sequence[Value]
) -> tuple[list[Value], list[Value]]:
    """Reads what is missing. Gives all floats anew, and for each read whether it is still missing."""
    values, late, old = [], [], iter(found)
    for read, was_missing in zip(reads, missing, strict=True):
        need = w.below(w.integer(0), was_missing)
        new, words = read.load(need, read.epoch)
        values += [w.select(need, value, next(old)) for value in new]
        late.append(w.both(differ(words, read.epoch), w.integer(255)))
    return values, late


def _give_up(late: Value, limit: Value, patience: Patience) -> None:
    """Says where a wait was in vain, if it was the first of this program, and that it need not wait any more."""
    said = w.mul(w.sub(w.integer(stalls.LAST), patience.epoch), w.integer(1 << stalls.LAYER_BITS))
    said = w.either(said, w.integer(stalls.LAST - patience.step << stalls.STEP_BITS))
    code = "{ .reg .pred q; setp.ne.u32 q, $0, 0; @q st.shared.u32 [$1], 1; setp.ne.and.u32 q, $2, 1, q; "
    code += "@q red.relaxed.gpu.global.max.u32 [$3], $4; }"
    w.ptx(code, late, patience.attempts, limit, patience.stall, w.either(said, w.program()))
