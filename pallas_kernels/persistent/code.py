"""Code below Pallas, emitted piece by piece: integers, floats, memory, control.

With `words`, `copies`, `products` and `tensor_maps`, all that knows JAX's internals (`inline_mgpu`, `mosaic.gpu.utils`, MLIR
dialects); tried with jax 0.11.2 and 0.12.0. Functions emit into the kernel that is being traced; values are 32-bit MLIR integers
and floats, offsets are bytes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir.dialects import arith, scf
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.pallas import mosaic_gpu as plgpu

Value = Any  # an MLIR value
SCALAR = plgpu.Layout.WG_SPLAT
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
"""How weight tiles and activations lie in shared memory for the tensor cores."""

NOTHING = -1e30
"""A logarithm of no weight at all."""

add, sub, mul, both = arith.addi, arith.subi, arith.muli, arith.andi
add_f, sub_f, mul_f, div_f, max_f, select = (
    arith.addf, arith.subf, arith.mulf, arith.divf, arith.maximumf, arith.select,
)  # fmt: skip

INTEGER = plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR(()))  # pyright: ignore
"""An integer that emitted code returns."""


def emitted(*types: Any, returns: Any = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turns a function that emits code, of a context and values of these types, into one that a kernel calls with references."""
    return plgpu.inline_mgpu(arg_types=types, return_type=returns)


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


def either_of(a: Value, b: Value) -> Value:
    """One of two conditions."""
    return arith.ori(a, b)


def below_float(a: Value, b: float) -> Value:
    """a < b."""
    return arith.cmpf(arith.CmpFPredicate.OLT, a, number(b))


def as_integer(shared: Value) -> Value:
    """A pointer to shared memory as an integer to calculate with."""
    return ptx("mov.u32 $0, $1;", shared, results=[int_type()])[0]


def as_index(value: Value) -> Value:
    """An index of an accumulator's element as an integer."""
    return arith.index_cast(int_type(), value)


def quotient(a: Value, b: Value | int) -> Value:
    """a // b, unsigned."""
    return arith.divui(a, integer(b) if isinstance(b, int) else b)


def remainder(a: Value, b: Value | int) -> Value:
    """a % b, unsigned."""
    return arith.remui(a, integer(b) if isinstance(b, int) else b)


def smaller(a: Value, b: Value) -> Value:
    """The smaller of both, unsigned."""
    return arith.minui(a, b)


def thread() -> Value:
    """Number within the warpgroup."""
    return both(ptx("mov.u32 $0, %tid.x;", results=[int_type()])[0], integer(127))


def reader() -> Value:
    """Number among those who put inputs together: of the first warpgroup and the third."""
    number = ptx("mov.u32 $0, %tid.x;", results=[int_type()])[0]
    return add(both(number, integer(127)), mul(arith.shrui(number, integer(8)), integer(128)))


def program() -> Value:
    """Number of the program."""
    return ptx("mov.u32 $0, %ctaid.x;", results=[int_type()])[0]


def meet() -> None:
    """Waits for all threads of the warpgroup."""
    utils.warpgroup_barrier()


def meet_readers(count: int) -> None:
    """Waits for all who put inputs together."""
    ptx(f"bar.sync {_READERS}, {count};")


def let_be_multiplied() -> None:
    """Before the next such meeting: what this thread has stored in shared memory can be multiplied after it."""
    ptx("fence.proxy.async.shared::cta;")


_READERS = 8  # a barrier of the hardware that is nobody else's: JAX counts its own from 1, one for each warpgroup


def when(condition: Value) -> Any:
    """A context whose code runs where the condition holds."""
    return utils.when(condition)


def repeat(
    count: Value, carried: Sequence[Value], body: Callable[[Value, list[Value]], Sequence[Value]]
) -> list[Value]:
    """``carried = body(i, carried)`` for i below ``count``."""
    loop = scf.ForOp(integer(0), count, integer(1), list(carried))
    with ir.InsertionPoint(loop.body):
        scf.yield_(list(body(loop.induction_variable, list(loop.inner_iter_args))))
    return list(loop.results)


def address(ref: Any) -> Value:
    """Of the first byte that a reference stands for."""
    return utils.memref_ptr(ref)


def pointer(ref: Any) -> Value:
    """The same as a 64-bit integer."""
    return ptx("mov.u64 $0, $1;", address(ref), results=[ir.IntegerType.get_signless(64)])[0]


def load_pointer(base: Value, index: Value) -> Value:
    """The index-th of an array of addresses in GPU memory."""
    code = at_offset("$1", "$2") + "ld.global.nc.u64 $0, [a]; }"
    return ptx(code, base, mul(index, integer(8)), results=[ir.IntegerType.get_signless(64)])[0]


def load_integer(base: Value, offset: Value) -> Value:
    """One integer that nothing writes during the launch."""
    return ptx(at_offset("$1", "$2") + "ld.global.nc.u32 $0, [a]; }", base, offset, results=[int_type()])[0]


def floats(words: Sequence[Value]) -> list[Value]:
    """The same bits as floats."""
    return [arith.bitcast(float_type(), word) for word in words]


def total(values: Sequence[Value]) -> Value:
    """Their sum."""
    return functools.reduce(add_f, values)


def splat(value: Value) -> Any:
    """An integer as a scalar array."""
    return FragmentedArray.splat(value, (), is_signed=True)


def logic(function: Callable[[int, int, int], int], a: Value, b: Value, c: Value) -> Value:
    """Bit by bit, a function of three bits in one instruction."""
    return utils.inline_ptx(f"lop3.b32 $0, $1, $2, $3, {table_of(function)};", a, b, c, result_types=int_type())


def table_of(function: Callable[[int, int, int], int]) -> int:
    """What it is of each of the eight threes of bits, which are the columns of these numbers."""
    return function(0xF0, 0xCC, 0xAA)


def found_here(*values: Value) -> list[Value]:
    """The same integers, which the compiler does not put off finding out until they are used."""
    count = len(values)
    code = " ".join(f"mov.u32 ${i}, ${count + i};" for i in range(count))
    return ptx(code, *values, results=[int_type()] * count)


def as_products(values: Sequence[Value], shape: tuple[int, ...]) -> Any:
    """Four floats of each thread as an array of this shape, [64, 8], as the tensor cores leave it."""
    found, turn = FragmentedArray.splat(number(0.0), shape, plgpu.Layout.WGMMA.to_mgpu()), iter(values)
    return found.foreach(lambda value, at: next(turn), create_array=True)


def either(a: Value, b: Value) -> Value:
    """Bits that are in one of both."""
    return arith.ori(a, b)


def load_bf16(base: Value, offset: Value) -> list[Value]:
    """Four bfloat16 that nothing writes during the launch, as floats."""
    code = at_offset("$2", "$3") + "ld.global.nc.v2.b32 {$0,$1}, [a]; }"
    pairs = ptx(code, base, offset, results=[int_type()] * 2)
    return floats([half for pair in pairs for half in (arith.shli(pair, integer(16)), both(pair, integer(-65536)))])


def load_floats(base: Value, offset: Value) -> list[Value]:
    """Four floats that nothing writes during the launch."""
    code = at_offset("$4", "$5") + "ld.global.nc.v4.f32 {$0,$1,$2,$3}, [a]; }"
    return ptx(code, base, offset, results=[float_type()] * 4)


def store_bf16(base: Value, offset: Value, values: Sequence[Value], condition: Value) -> None:
    """Four floats as bfloat16."""
    code = (
        at_offset("$0", "$1")
        + ".reg .b32 p<2>; .reg .pred q; "
        + _PACK
        + "setp.ne.u32 q, $6, 0; @q st.global.v2.b32 [a], {p0,p1}; }"
    )
    ptx(code, base, offset, *values, flag(condition))


def store_float(base: Value, offset: Value, value: Value, condition: Value) -> None:
    """One float."""
    code = at_offset("$0", "$1") + ".reg .pred q; setp.ne.u32 q, $3, 0; @q st.global.f32 [a], $2; }"
    ptx(code, base, offset, value, flag(condition))


def store_activations(base: Value, offset: Value, values: Sequence[Value], condition: Value | None = None) -> None:
    """Four floats as bfloat16 in shared memory."""
    code = "{ .reg .u32 o; .reg .pred q; .reg .b32 p<2>; " + _PACK
    code += "add.u32 o, $0, $1; setp.ne.u32 q, $6, 0; @q st.shared.v2.b32 [o], {p0,p1}; }"
    ptx(code, base, offset, *values, integer(1) if condition is None else flag(condition))


def store_activation(base: Value, offset: Value, value: Value) -> None:
    """One float as bfloat16 in shared memory."""
    code = "{ .reg .u32 o; .reg .b16 h; add.u32 o, $0, $1; cvt.rn.bf16.f32 h, $2; st.shared.b16 [o], h; }"
    ptx(code, base, offset, value)


def copy_shared(to: Value, source: Value, condition: Value) -> None:
    """Eight bytes within shared memory."""
    code = "{ .reg .b32 p<2>; .reg .pred q; setp.ne.u32 q, $2, 0; "
    ptx(code + "@q ld.shared.v2.b32 {p0,p1}, [$1]; @q st.shared.v2.b32 [$0], {p0,p1}; }", to, source, flag(condition))


def clear(base: Value, bytes_: int) -> None:
    """Zeros in shared memory, by all threads of the warpgroup."""
    for start in range(0, bytes_, 128 * 16):
        offset = add(mul(thread(), integer(16)), integer(start))
        ptx("{ .reg .u32 o; add.u32 o, $0, $1; st.shared.v4.b32 [o], {$2,$2,$2,$2}; }", base, offset, integer(0))


def input_offset(k: Value, row: Value, rows: int) -> Value:
    """Where column k of a row lies in the input of products: eight columns of all rows, then the next eight."""
    chunk = add(mul(arith.shrui(k, integer(3)), integer(rows)), row)
    return add(mul(chunk, integer(16)), mul(both(k, integer(7)), integer(2)))


def activation_offset(k: Value, row: Value, slice_start: Value) -> Value:
    """Where column k of a row lies: tiles of 8 rows by 64 columns, 1 KiB each, their 16-byte chunks swapped by row."""
    tile = add(mul(arith.shrui(k, integer(6)), integer(1024)), mul(row, integer(128)))
    chunk = arith.xori(both(arith.shrui(k, integer(3)), integer(7)), row)
    within = add(mul(chunk, integer(16)), mul(both(k, integer(7)), integer(2)))
    return add(add(tile, slice_start), within)


def tile_offset(k: Value, row: Value) -> Value:
    """Where column k of a row lies in a tile of 64 rows by 128 columns: two halves of columns, each tiles as of activations."""
    half = mul(arith.shrui(k, integer(6)), integer(8192 - 1024))
    eight = mul(arith.shrui(row, integer(3)), integer(1024))
    return add(add(half, eight), activation_offset(k, both(row, integer(7)), integer(0)))


def load_shared(base: Value, offset: Value) -> Value:
    """One float from shared memory."""
    return ptx("{ .reg .u32 o; add.u32 o, $1, $2; ld.shared.f32 $0, [o]; }", base, offset, results=[float_type()])[0]


def load_shared_pointer(at: Value) -> Value:
    """One 64-bit integer from shared memory."""
    return ptx("ld.shared.u64 $0, [$1];", at, results=[ir.IntegerType.get_signless(64)])[0]


def load_shared_integer(at: Value) -> Value:
    """One integer from shared memory."""
    return ptx("ld.shared.u32 $0, [$1];", at, results=[int_type()])[0]


def store_shared_integer(at: Value, value: Value) -> None:
    """One integer into shared memory."""
    ptx("st.shared.u32 [$0], $1;", at, value)


def store_shared(base: Value, offset: Value, value: Value, condition: Value) -> None:
    """One float into shared memory, where the condition holds."""
    code = "{ .reg .u32 o; .reg .pred q; add.u32 o, $0, $1; setp.ne.u32 q, $3, 0; @q st.shared.f32 [o], $2; }"
    ptx(code, base, offset, value, flag(condition))


def shared_address(ref: Any) -> Value:
    """Of a reference to shared memory, as an integer to calculate with."""
    return as_integer(utils.memref_ptr(ref))


def partner(value: Value, distance: int) -> Value:
    """The value of the thread whose number differs in one bit."""
    return utils.shfl_bfly(value, distance)


def warp_sum(value: Value) -> Value:
    """Over the threads of a warp, in each of them."""
    for distance in (16, 8, 4, 2, 1):
        value = add_f(value, partner(value, distance))
    return value


def inverse_root(value: Value) -> Value:
    """1 / square root, to about 22 bits."""
    return ptx("rsqrt.approx.f32 $0, $1;", value, results=[float_type()])[0]


def power_of_two(value: Value) -> Value:
    """2 ** x."""
    return ptx("ex2.approx.ftz.f32 $0, $1;", value, results=[float_type()])[0]


def logarithm(value: Value) -> Value:
    """To base 2."""
    return ptx("lg2.approx.f32 $0, $1;", value, results=[float_type()])[0]


def positive(value: Value) -> Value:
    """x > 0."""
    return arith.cmpf(arith.CmpFPredicate.OGT, value, number(0.0))


def reciprocal(value: Value) -> Value:
    """1 / x, to about 23 bits."""
    return ptx("rcp.approx.f32 $0, $1;", value, results=[float_type()])[0]


def offset_pointer(base: Value, offset: Value) -> Value:
    """base + offset, as a 64-bit integer."""
    code = "{ .reg .u64 a; cvt.u64.u32 a, $2; add.u64 $0, a, $1; }"
    return ptx(code, base, offset, results=[ir.IntegerType.get_signless(64)])[0]


_PACK = "cvt.rn.bf16x2.f32 p0, $3, $2; cvt.rn.bf16x2.f32 p1, $5, $4; "


def at_offset(base: str, offset: str) -> str:
    """The begin of PTX that uses ``a``, the address of a byte offset from a base; the brace is still to be closed."""
    return "{ .reg .u64 a; cvt.u64.u32 a, " + offset + "; add.u64 a, a, " + base + "; "


def flag(condition: Value) -> Value:
    """A condition as an integer, which PTX compares with zero."""
    return arith.extui(int_type(), condition)


def ptx(code: str, *arguments: Value, results: Sequence[Any] = ()) -> list[Value]:
    """Emits PTX in which $0.. are first the results, of these types, then the arguments."""
    types = None if not results else results[0] if len(results) == 1 else results
    given = utils.inline_ptx(code, *arguments, result_types=types, has_side_effects=True)
    return list(given) if isinstance(given, tuple) else [given]
