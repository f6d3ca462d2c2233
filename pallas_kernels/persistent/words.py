"""Words in GPU memory, and waiting for them.

A word is a float32 whose low eight mantissa bits are its epoch: the number of the layer that wrote it, and whether in an odd step.
Who reads it can tell whether it is there yet. Words need no barrier, no fence and no counter.
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


def load_words(base: Value, offset: Value, need: Value, old: Sequence[Value]) -> list[Value]:
    """Four words, past any cache of this core, or the old ones where there is no need."""
    code = w.at_offset("$8", "$9") + _read_if("$10", 4)
    return w.ptx(code, *old, base, offset, w.flag(need), results=[w.int_type()] * 4)


def load_part(first: Value, part: int, step: Value | int, some: Value, old: Sequence[Value]) -> list[Value]:
    """The same of the ``part``-th of several, ``step`` bytes apart from the address ``first`` on, if that bit of ``some`` is set.

    Where it lies is found out anew with every attempt: registers are for words.
    """
    at = f"mad.wide.u32 a, $10, {part}, $8;" if not isinstance(step, int) else f"add.u64 a, $8, {part * step};"
    code = f"{{ .reg .u64 a; .reg .u32 m; {at} and.b32 m, $9, {1 << part}; "
    varying = [] if isinstance(step, int) else [step]
    return w.ptx(code + _read_if("m", 4), *old, first, some, *varying, results=[w.int_type()] * 4)


def _read_if(need: str, count: int) -> str:
    """The end of PTX that reads 1 or 4 words at ``a`` where there is need, and else gives its first arguments."""
    keep = " ".join(f"mov.b32 ${i}, ${count + i};" for i in range(count))
    kind, to = ("v4.u32", "{$0, $1, $2, $3}") if count == 4 else ("u32", "$0")
    return f".reg .pred q; setp.ne.u32 q, {need}, 0; {keep} @q ld.relaxed.gpu.global.{kind} {to}, [a]; }}"


def load_run(base: Value, first: Value, need: Value, old: Sequence[Value]) -> list[Value]:
    """As many words as the old ones, from the ``first`` on, likewise; that is a multiple of 4 if their number is."""
    if len(old) % 4 == 0:
        found = []
        for i, four in enumerate(in_fours(old)):
            found += load_words(base, w.mul(w.add(first, w.integer(4 * i)), w.integer(4)), need, four)
        return found
    return [_load_word(base, w.mul(w.add(first, w.integer(i)), w.integer(4)), need, word) for i, word in enumerate(old)]


def _load_word(base: Value, offset: Value, need: Value, old: Value) -> Value:
    code = w.at_offset("$2", "$3") + _read_if("$4", 1)
    return w.ptx(code, old, base, offset, w.flag(need), results=[w.int_type()])[0]


def store_word(base: Value, offset: Value, value: Value, epoch: Value, condition: Value) -> None:
    """A float as a word of an epoch."""
    code = w.at_offset("$0", "$1") + ".reg .pred q; setp.ne.u32 q, $3, 0; @q st.relaxed.gpu.global.u32 [a], $2; }"
    w.ptx(code, base, offset, _word(value, epoch), w.flag(condition))


def store_words(base: Value, offset: Value, values: Sequence[Value], epoch: Value, condition: Value) -> None:
    """Four of them, whose offset is a multiple of 16."""
    code = ".reg .pred q; setp.ne.u32 q, $6, 0; @q st.relaxed.gpu.global.v4.u32 [a], {$2,$3,$4,$5}; }"
    w.ptx(w.at_offset("$0", "$1") + code, base, offset, *(_word(v, epoch) for v in values), w.flag(condition))


def load_kept(base: Value, offset: Value) -> Value:
    """An integer behind the words, which this thread alone writes."""
    return w.ptx(w.at_offset("$1", "$2") + "ld.global.u32 $0, [a]; }", base, offset, results=[w.int_type()])[0]


def store_kept(base: Value, offset: Value, value: Value) -> None:
    """The same for the next launch."""
    w.ptx(w.at_offset("$0", "$1") + "st.global.u32 [a], $2; }", base, offset, value)


def _word(value: Value, epoch: Value) -> Value:
    return arith.ori(w.both(arith.bitcast(w.int_type(), value), w.integer(-256)), epoch)


def differ(words: Sequence[Value], epoch: Value) -> Value:
    """An integer whose low eight bits are zero if all words are of the epoch.

    Two words at once, then three of what that gives: instructions that follow each other as a tree, not as a chain.
    """
    pairs = itertools.zip_longest(words[::2], words[1::2], fillvalue=epoch)
    found = [w.logic(_either_differs, one, other, epoch) for one, other in pairs]
    while len(found) > 1:
        *three, last = found[:3]
        found = [*found[3:], w.logic(_any, three[0], three[-1], last)]
    return found[0]


def _any(a: int, b: int, c: int) -> int:
    return a | b | c


def _either_differs(a: int, b: int, c: int) -> int:
    return (a ^ c) | (b ^ c)


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long a program waits, and where it says that it did in vain.

    Attributes:
      attempts: byte address in shared memory of the number of attempts.
      said: that of what is said.
      step, layer: what is waited for; the step as a number among `stalls.STEPS`.
    """

    attempts: Value
    said: Value
    step: int
    layer: Value


@dataclasses.dataclass(frozen=True)
class Read:
    """What is read of words, until they are there.

    Attributes:
      epoch: that they are of.
      words: as they are before any attempt: not of that epoch, but for those that are not waited for.
      load: reads them if there is need: ``load(need, old words)``.
      values: what they stand for.
    """

    epoch: Value
    words: list[Value]
    load: Callable[[Value, list[Value]], list[Value]]
    values: Callable[[list[Value]], list[Value]]


def until_written(reads: Sequence[Read], patience: Patience) -> list[list[Value]]:
    """The floats of every read, once the words that they are made of are there.

    What has been found is not read again: polls of many programs would crowd out the weights, and each other.
    After too many attempts the first float of each read is NaN, and so is every product that it is in; that is told in
    ``patience.said``, by which the host learns that the results mean nothing, and all later waits of this program are short and say
    nothing: a kernel that spins must end, and never with a number that is taken for right.
    """
    counts = [len(read.words) for read in reads]
    types = [w.int_type()] * (sum(counts) + len(reads) + 1)
    limit = w.load_shared_integer(patience.attempts)
    start = [word for read in reads for word in read.words] + [w.integer(1)] * len(reads) + [w.integer(0)]
    loop = scf.WhileOp(types, start)
    before = loop.before.blocks.append(*types)
    with ir.InsertionPoint(before):
        *carried, attempts = before.arguments
        found, missing = _attempt(reads, _divided(carried, counts), carried[sum(counts) :])
        attempts = w.add(attempts, w.integer(1))
        again = w.both(w.below(w.integer(0), functools.reduce(w.either, missing)), w.below(attempts, limit))
        scf.condition(again, [*found, *missing, attempts])
    after = loop.after.blocks.append(*types)
    with ir.InsertionPoint(after):
        scf.yield_(list(after.arguments))
    *results, _ = loop.results
    late = functools.reduce(w.either, results[sum(counts) :])
    _give_up(late, limit, patience)
    nan = w.select(w.below(w.integer(0), late), w.number(math.nan), w.number(0.0))
    words = _divided(results, counts)
    values = [read.values(own) for read, own in zip(reads, words, strict=True)]
    return [[w.add_f(first, nan), *others] for first, *others in values]


def in_fours(words: Sequence[Value]) -> list[list[Value]]:
    """Four by four."""
    return [list(words[begin : begin + 4]) for begin in range(0, len(words), 4)]


def _divided(values: Sequence[Value], counts: Sequence[int]) -> list[list[Value]]:
    rest = iter(values)
    return [list(itertools.islice(rest, count)) for count in counts]


def _attempt(
    reads: Sequence[Read], found: Sequence[list[Value]], missing: Sequence[Value]
) -> tuple[list[Value], list[Value]]:
    """Reads what is missing. Gives all words anew, and for each read whether it is still missing."""
    new = [
        read.load(w.below(w.integer(0), was_missing), old)
        for read, old, was_missing in zip(reads, found, missing, strict=True)
    ]
    late = [w.both(differ(words, read.epoch), w.integer(255)) for read, words in zip(reads, new, strict=True)]
    return [word for words in new for word in words], late


def _give_up(late: Value, limit: Value, patience: Patience) -> None:
    """Says where a wait was in vain, if it was the first of this program, and that it need not wait any more.

    In shared memory: each wait has code for this, and atomic additions to GPU memory are a dozen instructions.
    """
    said = w.mul(w.sub(w.integer(stalls.LAST), patience.layer), w.integer(1 << stalls.LAYER_BITS))
    said = w.either(said, w.integer(stalls.LAST - patience.step << stalls.STEP_BITS))
    code = "{ .reg .pred q; setp.ne.u32 q, $0, 0; @q st.shared.u32 [$1], 1; setp.ne.and.u32 q, $2, 1, q; "
    w.ptx(
        code + "@q st.shared.u32 [$3], $4; }",
        late,
        patience.attempts,
        limit,
        patience.said,
        w.either(said, w.program()),
    )


def tell(said: Value, stall: Value) -> None:
    """Has what this program said, if anything, stay in GPU memory if no other says of an earlier wait."""
    code = "{ .reg .pred q; .reg .u32 v; ld.shared.u32 v, [$0]; setp.ne.u32 q, v, 0; "
    w.ptx(code + "@q red.relaxed.gpu.global.max.u32 [$1], v; }", said, stall)
