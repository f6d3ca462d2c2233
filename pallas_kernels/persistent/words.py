"""What the persistent kernel does below Pallas: words in GPU memory, activations in shared memory, waiting for words.

The one file that knows JAX's internals (`inline_mgpu`, `mosaic.gpu.utils`, MLIR dialects); tried with jax 0.11.2 and 0.12.0.
Functions emit code into the kernel that is being traced; values are 32-bit MLIR integers and floats, offsets are bytes.

A word is a float32 whose lowest mantissa bit says that it has been written: memory is zero when a launch begins, and every word
is written once in it, so a word with that bit set is this launch's. Words need no barrier, no fence and no counter.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir.dialects import arith, scf
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

Value = Any  # an MLIR value
SCALAR = plgpu.Layout.WG_SPLAT
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
"""How weight tiles and activations lie in shared memory for the tensor cores."""

SPINS = 2_000_000
"""Attempts to read a word before a program goes on without it: seconds, where the longest wait is microseconds."""

add, mul, both = arith.addi, arith.muli, arith.andi
add_f, mul_f, select = arith.addf, arith.mulf, arith.select


def emitted(*types: Any) -> Callable[[Callable[..., None]], Callable[..., Any]]:
    """Turns a function that emits code, of a context and values of these types, into one that a kernel calls with references."""
    return plgpu.inline_mgpu(arg_types=types)


def int_type() -> Any:
    """MLIR's 32-bit integer."""
    return ir.IntegerType.get_signless(32)


def float_type() -> Any:
    """MLIR's float32."""
    return ir.F32Type.get()


def integer(value: int) -> Value:
    """A constant."""
    return utils.c(value, int_type())


def number(value: float) -> Value:
    """A constant."""
    return utils.c(value, float_type())


def scalar(array: Any) -> Value:
    """The value of a scalar that was passed in."""
    return array.registers.item()


def equal(a: Value, b: Value) -> Value:
    """a == b."""
    return arith.cmpi(arith.CmpIPredicate.eq, a, b)


def below(a: Value, b: Value) -> Value:
    """a < b, unsigned."""
    return arith.cmpi(arith.CmpIPredicate.ult, a, b)


def as_index(value: Value) -> Value:
    """An index of an accumulator's element as an integer."""
    return arith.index_cast(int_type(), value)


def quotient(a: Value, b: int) -> Value:
    """a // b, unsigned."""
    return arith.divui(a, integer(b))


def remainder(a: Value, b: int) -> Value:
    """a % b, unsigned."""
    return arith.remui(a, integer(b))


def smaller(a: Value, b: int) -> Value:
    """The smaller of both, unsigned."""
    return arith.minui(a, integer(b))


def thread() -> Value:
    """Number within the warpgroup."""
    return both(_ptx("mov.u32 $0, %tid.x;", results=[int_type()])[0], integer(127))


def meet() -> None:
    """Waits for all threads of the warpgroup."""
    utils.warpgroup_barrier()


def address(ref: Any) -> Value:
    """Of the first byte that a reference stands for."""
    return utils.memref_ptr(ref)


def load_words(base: Value, offset: Value) -> list[Value]:
    """Four words, past any cache of this core."""
    code = _at("$4", "$5") + "ld.relaxed.gpu.global.v4.u32 {$0,$1,$2,$3}, [a]; }"
    return _ptx(code, base, offset, results=[int_type()] * 4)


def load_word(base: Value, offset: Value) -> Value:
    """One word, likewise."""
    return _ptx(_at("$1", "$2") + "ld.relaxed.gpu.global.u32 $0, [a]; }", base, offset, results=[int_type()])[0]


def store_word(base: Value, offset: Value, value: Value, condition: Value) -> None:
    """A float as a word that says it is written."""
    word = arith.ori(arith.bitcast(int_type(), value), integer(1))
    code = _at("$0", "$1") + ".reg .pred q; setp.ne.u32 q, $3, 0; @q st.relaxed.gpu.global.u32 [a], $2; }"
    _ptx(code, base, offset, word, _flag(condition))


def floats(words: Sequence[Value]) -> list[Value]:
    """The same bits as floats."""
    return [arith.bitcast(float_type(), word) for word in words]


def until_written(load: Callable[[], tuple[list[Value], list[Value]]], results: int) -> list[Value]:
    """Calls ``load``, which gives ``results`` floats and the words they are made of, until all the words are written.

    After `SPINS` attempts it gives NaN, and so does all that depends on it: a kernel that spins must end, and never with a wrong
    number.
    """
    types = [float_type()] * results
    loop = scf.WhileOp([*types, int_type()], [integer(0)])
    before = loop.before.blocks.append(int_type())
    with ir.InsertionPoint(before):
        values, words = load()
        written = words[0]
        for word in words[1:]:
            written = both(written, word)
        attempts = add(before.arguments[0], integer(1))
        again = both(equal(both(written, integer(1)), integer(0)), below(attempts, integer(SPINS)))
        scf.condition(again, [*values, attempts])
    after = loop.after.blocks.append(*types, int_type())
    with ir.InsertionPoint(after):
        scf.yield_([after.arguments[results]])
    *found, attempts = loop.results
    late = select(below(attempts, integer(SPINS)), number(0.0), number(math.nan))
    return [add_f(value, late) for value in found]


def load_bf16(base: Value, offset: Value) -> list[Value]:
    """Four bfloat16 that nothing writes during the launch, as floats."""
    code = _at("$2", "$3") + "ld.global.nc.v2.b32 {$0,$1}, [a]; }"
    pairs = _ptx(code, base, offset, results=[int_type()] * 2)
    return floats([half for pair in pairs for half in (arith.shli(pair, integer(16)), both(pair, integer(-65536)))])


def store_bf16(base: Value, offset: Value, values: Sequence[Value], condition: Value) -> None:
    """Four floats as bfloat16."""
    code = (
        _at("$0", "$1")
        + ".reg .b32 p<2>; .reg .pred q; "
        + _PACK
        + "setp.ne.u32 q, $6, 0; @q st.global.v2.b32 [a], {p0,p1}; }"
    )
    _ptx(code, base, offset, *values, _flag(condition))


def store_one(base: Value, offset: Value, value: Value, condition: Value) -> None:
    """One float as bfloat16."""
    code = ".reg .pred q; setp.ne.u32 q, $3, 0; .reg .b16 h; cvt.rn.bf16.f32 h, $2; @q st.global.b16 [a], h; }"
    _ptx(_at("$0", "$1") + code, base, offset, value, _flag(condition))


def store_activations(base: Value, offset: Value, values: Sequence[Value]) -> None:
    """Four floats as bfloat16 in shared memory."""
    _ptx(
        "{ .reg .u32 o; .reg .b32 p<2>; " + _PACK + "add.u32 o, $0, $1; st.shared.v2.b32 [o], {p0,p1}; }",
        base,
        offset,
        *values,
    )


def clear(base: Value, bytes_: int) -> None:
    """Zeros in shared memory, by all threads of the warpgroup."""
    for start in range(0, bytes_, 128 * 16):
        offset = add(mul(thread(), integer(16)), integer(start))
        _ptx("{ .reg .u32 o; add.u32 o, $0, $1; st.shared.v4.b32 [o], {$2,$2,$2,$2}; }", base, offset, integer(0))


def activation_offset(k: Value, row: Value, slice_start: Value) -> Value:
    """Where column k of a row lies: tiles of 8 rows by 64 columns, 1 KiB each, their 16-byte chunks swapped by row."""
    tile = add(mul(arith.shrui(k, integer(6)), integer(1024)), mul(row, integer(128)))
    chunk = arith.xori(both(arith.shrui(k, integer(3)), integer(7)), row)
    within = add(mul(chunk, integer(16)), mul(both(k, integer(4)), integer(2)))
    return add(add(tile, slice_start), within)


def load_shared(base: Value, offset: Value) -> Value:
    """One float from shared memory."""
    return _ptx("{ .reg .u32 o; add.u32 o, $1, $2; ld.shared.f32 $0, [o]; }", base, offset, results=[float_type()])[0]


def store_shared(base: Value, offset: Value, value: Value, condition: Value) -> None:
    """One float into shared memory, where the condition holds."""
    code = "{ .reg .u32 o; .reg .pred q; add.u32 o, $0, $1; setp.ne.u32 q, $3, 0; @q st.shared.f32 [o], $2; }"
    _ptx(code, base, offset, value, _flag(condition))


def warp_sum(value: Value) -> Value:
    """Over the threads of a warp, in each of them."""
    for distance in (16, 8, 4, 2, 1):
        value = add_f(value, utils.shfl_bfly(value, distance))
    return value


def inverse_root(value: Value) -> Value:
    """1 / square root, to about 22 bits."""
    return _ptx("rsqrt.approx.f32 $0, $1;", value, results=[float_type()])[0]


def silu(value: Value) -> Value:
    """x / (1 + exp(-x)); the constants are -log2(e) and 1."""
    exponential = "mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.f32 t, t; add.f32 t, t, 0f3F800000; "
    code = "{ .reg .f32 t; " + exponential + "rcp.approx.f32 t, t; mul.f32 $0, $1, t; }"
    return _ptx(code, value, results=[float_type()])[0]


_PACK = "cvt.rn.bf16x2.f32 p0, $3, $2; cvt.rn.bf16x2.f32 p1, $5, $4; "


def _at(base: str, offset: str) -> str:
    return "{ .reg .u64 a; cvt.u64.u32 a, " + offset + "; add.u64 a, a, " + base + "; "


def _flag(condition: Value) -> Value:
    return arith.extui(int_type(), condition)


def _ptx(code: str, *arguments: Value, results: Sequence[Any] = ()) -> list[Value]:
    types = None if not results else results[0] if len(results) == 1 else results
    given = utils.inline_ptx(code, *arguments, result_types=types, has_side_effects=True)
    return list(given) if isinstance(given, tuple) else [given]
