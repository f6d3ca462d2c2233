"""Bulk copies into shared memory, the barriers that tell when they have landed, and the tensor maps that describe their sources."""

from collections.abc import Sequence
from typing import Any

from pallas_kernels.persistent import code as w
from pallas_kernels.persistent.code import Value
from pallas_kernels.persistent.steps import HALF_TILE, THREADS, TILE_BYTES, TILE_ROWS

MAP_BYTES = 128
"""Of a tensor map."""

TILE_POLICY = "evict_first"
"""Of the cache that all cores share: nobody reads a tile of weights again, words, code and vectors are to stay."""

MAPS_A_PROGRAM = 8
"""That a program of the kernel that makes them writes."""


def make_barrier(at: Value, arrivals: int) -> None:
    """A barrier in shared memory."""
    w.ptx("mbarrier.init.shared::cta.b64 [$0], $1;", at, w.integer(arrivals))


def publish_barriers() -> None:
    """Makes barriers known to copies."""
    w.ptx("fence.mbarrier_init.release.cluster;")
    w.ptx("fence.proxy.async.shared::cta;")


def pass_barrier(at: Value, parity: Value, condition: Value | None = None) -> None:
    """Waits until the phase of a barrier with this parity is over, where the condition holds."""
    code = "again: mbarrier.try_wait.parity.shared::cta.b64 q, [$0], $1; @!q bra again; "
    if condition is None:
        w.ptx("{ .reg .pred q; " + code + "}", at, parity)
    else:
        code = "{ .reg .pred q; setp.eq.u32 q, $2, 0; @q bra done; " + code + "done: }"
        w.ptx(code, at, parity, w.flag(condition))


def arrive(at: Value) -> None:
    """Of this thread at a barrier."""
    w.ptx("mbarrier.arrive.shared::cta.b64 _, [$0];", at)


def copy_tile(to: Value, barrier: Value, tensor_map: Value, row: Value, column: Value, condition: Value) -> None:
    """Starts the copy of a tile of 64 rows by 128 columns, in two halves of columns; what lies beyond the matrix comes as zeros."""
    start = "@q cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
    code = "{ .reg .pred q; .reg .u32 c, t; .reg .b64 p; setp.ne.u32 q, $5, 0; "
    code += f"createpolicy.fractional.L2::{TILE_POLICY}.b64 p, 1.0; "
    code += f"@q mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], {TILE_BYTES}; "
    code += start + "[$0], [$2, {$4, $3}], [$1], p; add.u32 c, $4, 64; add.u32 t, $0, 8192; "
    code += start + "[t], [$2, {c, $3}], [$1], p; }"
    w.ptx(code, to, barrier, tensor_map, row, column, w.flag(condition))


def know_tensor_map(at: Value) -> None:
    """Makes a tensor map that an earlier kernel wrote usable."""
    w.ptx("fence.proxy.tensormap::generic.acquire.gpu [$0], 128;", at)


def fetch_tensor_map(at: Value) -> None:
    """Has a tensor map ready for copies to come."""
    w.ptx("prefetch.tensormap [$0];", at)


def fetch(at: Value) -> None:
    """Brings a line of GPU memory into the cache that all cores share."""
    w.ptx("prefetch.global.L2 [$0];", at)


def fetch_all(operand: Any, bytes_: int, programs: int) -> None:
    """Brings a matrix into the cache that all cores share: a part of it by each thread of a warpgroup of so many programs."""
    part = -(-bytes_ // (programs * THREADS * 16)) * 16
    begin = w.mul(w.add(w.mul(w.program(), w.integer(THREADS)), w.thread()), w.integer(part))
    with w.when(w.below(begin, w.integer(bytes_))):
        size = w.smaller(w.integer(part), w.sub(w.integer(bytes_), begin))
        w.ptx("cp.async.bulk.prefetch.L2.global [$0], $1;", w.offset_pointer(w.address(operand), begin), size)


def check_address(address: Value, told: Value, stall: Value, said: Value) -> None:
    """Says so in the stall if both addresses of an operand differ."""
    code = "{ .reg .pred q; setp.ne.u64 q, $0, $1; @q red.relaxed.gpu.global.max.u32 [$2], $3; }"
    w.ptx(code, address, told, stall, said)


def write_tensor_maps(
    context: Any, template: Any, operands: Sequence[Any], sizes: Any, maps: Any, addresses: Any, scratch: Any
) -> None:
    """Thread i of program p writes the map and the address of operand ``MAPS_A_PROGRAM * p + i``; see `tensor_maps`."""
    number = w.add(w.mul(w.program(), w.integer(MAPS_A_PROGRAM)), w.thread())
    mine = w.both(w.below(w.thread(), w.integer(MAPS_A_PROGRAM)), w.below(number, w.integer(len(operands))))
    place = w.add(w.shared_address(scratch), w.mul(w.thread(), w.integer(MAP_BYTES)))
    # A branch for each program: to choose among all operands takes longer than the rest of the kernel.
    for program, begin in enumerate(range(0, len(operands), MAPS_A_PROGRAM)):
        with w.when(w.equal(w.program(), w.integer(program))):
            few = [w.pointer(operand) for operand in operands[begin : begin + MAPS_A_PROGRAM]]
            pointer = few[0]
            for thread, other in enumerate(few[1:], 1):
                pointer = w.select(w.equal(w.thread(), w.integer(thread)), other, pointer)
            w.ptx("st.shared.u64 [$0], $1;", place, pointer)
    pointer = w.load_shared_pointer(place)
    box, swizzle = (TILE_ROWS, HALF_TILE), 128
    _copy_map("ld.b64", context._get_tma_desc(template, (), None, box, swizzle, None), "st.shared.b64", place)
    at = w.mul(w.smaller(number, w.integer(len(operands) - 1)), w.integer(8))
    rows = w.load_integer(w.address(sizes), at)
    columns = w.load_integer(w.address(sizes), w.add(at, w.integer(4)))
    with w.when(mine):
        _replace("global_address", "b64", place, "$1", pointer)
        _replace("global_dim", "b32", place, "0, $1", columns)
        _replace("global_dim", "b32", place, "1, $1", rows)
        _replace("global_stride", "b64", place, "0, s", columns)  # in bytes
        out = w.offset_pointer(w.address(maps), w.mul(number, w.integer(MAP_BYTES)))
        _copy_map("ld.shared.b64", place, "st.global.b64", out)
        w.ptx("st.global.u64 [$0], $1;", w.offset_pointer(w.address(addresses), at), pointer)
    w.ptx("fence.proxy.tensormap::generic.release.gpu;")


def _replace(field: str, width: str, place: Value, what: str, value: Value) -> None:
    """Writes a field of a map in shared memory; ``s`` is twice the value."""
    code = f"tensormap.replace.tile.{field}.shared::cta.b1024.{width} [$0], {what};"
    w.ptx(code if "s" not in what else f"{{ .reg .u64 s; mul.wide.u32 s, $1, 2; {code} }}", place, value)


def _copy_map(load: str, source: Value, store: str, to: Value) -> None:
    for byte in range(0, MAP_BYTES, 8):
        w.ptx(f"{{ .reg .b64 v; {load} v, [$1+{byte}]; {store} [$0+{byte}], v; }}", to, source)
