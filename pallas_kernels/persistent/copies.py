"""Bulk copies into shared memory, the barriers that tell when they have landed, and the tensor maps that describe their sources."""

from collections.abc import Sequence
from typing import Any

from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]

from pallas_kernels.persistent import code as w
from pallas_kernels.persistent.code import Value


def make_barrier(at: Value, arrivals: int) -> None:
    """A barrier in shared memory."""
    w.ptx("mbarrier.init.shared::cta.b64 [$0], $1;", at, w.integer(arrivals))


def publish_barriers() -> None:
    """Makes barriers known to copies."""
    w.ptx("fence.mbarrier_init.release.cluster;")
    w.ptx("fence.proxy.async.shared::cta;")


def pass_barrier(at: Value, parity: Value) -> None:
    """Waits until the phase of a barrier with this parity is over."""
    code = "{ .reg .pred q; again: mbarrier.try_wait.parity.shared::cta.b64 q, [$0], $1; @!q bra again; }"
    w.ptx(code, at, parity)


def arrive(at: Value) -> None:
    """Of this thread at a barrier."""
    w.ptx("mbarrier.arrive.shared::cta.b64 _, [$0];", at)


def copy_tile(to: Value, barrier: Value, tensor_map: Value, row: Value, column: Value, condition: Value) -> None:
    """Starts the copy of a tile of 64 rows by 128 columns, in two halves of columns; what lies beyond the matrix comes as zeros."""
    start = "@q cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
    code = "{ .reg .pred q; .reg .u32 c, t; setp.ne.u32 q, $5, 0; "
    code += f"@q mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], {64 * 128 * 2}; "
    code += start + "[$0], [$2, {$4, $3}], [$1]; add.u32 c, $4, 64; add.u32 t, $0, 8192; "
    code += start + "[t], [$2, {c, $3}], [$1]; }"
    w.ptx(code, to, barrier, tensor_map, row, column, w.flag(condition))


def know_tensor_map(at: Value) -> None:
    """Makes a tensor map that an earlier kernel wrote usable."""
    w.ptx("fence.proxy.tensormap::generic.acquire.gpu [$0], 128;", at)


def check_address(address: Value, told: Value, stall: Value, index: int) -> None:
    """Writes (2, index, 0, 0) as the stall if both addresses differ."""
    code = "{ .reg .pred q; setp.ne.u64 q, $0, $1; @q st.global.v4.u32 [$2], {$3,$4,$5,$5}; }"
    w.ptx(code, address, told, stall, w.integer(2), w.integer(index), w.integer(0))


def write_tensor_maps(
    context: Any, template: Any, operands: Sequence[Any], sizes: Any, maps: Any, addresses: Any, scratch: Any
) -> None:
    """Thread i of the grid writes the map and the address of operand i; see `tensor_maps`."""
    swizzle, box = 128, (64, 64)
    encoded = context._get_tma_desc(template, (), None, box, swizzle, None)
    lane, mine = w.thread(), w.add(w.mul(w.program(), w.integer(128)), w.thread())
    own = w.address(operands[0])
    pointer = w.ptx("mov.u64 $0, $1;", own, results=[ir.IntegerType.get_signless(64)])[0]
    for index, operand in enumerate(operands[1:], 1):
        other = w.ptx("mov.u64 $0, $1;", w.address(operand), results=[ir.IntegerType.get_signless(64)])[0]
        pointer = w.select(w.equal(mine, w.integer(index)), other, pointer)
    real = w.below(mine, w.integer(len(operands)))
    place = w.add(w.shared_address(scratch), w.mul(lane, w.integer(128)))
    copy = "{ .reg .b64 v; ld.b64 v, [$1+%d]; st.shared.b64 [$0+%d], v; }"
    for byte in range(0, 128, 8):
        w.ptx(copy % (byte, byte), place, encoded)
    rows = w.load_integer(w.address(sizes), w.mul(mine, w.integer(8)))
    columns = w.load_integer(w.address(sizes), w.add(w.mul(mine, w.integer(8)), w.integer(4)))
    field = "tensormap.replace.tile.%s.shared::cta.b1024.%s [$0], %s$1;"
    with w.when(real):
        stride = w.ptx(
            "{ .reg .u64 a; cvt.u64.u32 a, $1; shl.b64 $0, a, 1; }", columns, results=[ir.IntegerType.get_signless(64)]
        )[0]
        w.ptx(field % ("global_address", "b64", ""), place, pointer)
        w.ptx(field % ("global_dim", "b32", "0, "), place, columns)
        w.ptx(field % ("global_dim", "b32", "1, "), place, rows)
        w.ptx(field % ("global_stride", "b64", "0, "), place, stride)
        out = w.offset_pointer(w.address(maps), w.mul(mine, w.integer(128)))
        move = "{ .reg .b64 v; ld.shared.b64 v, [$1+%d]; st.global.b64 [$0+%d], v; }"
        for byte in range(0, 128, 8):
            w.ptx(move % (byte, byte), out, place)
        w.ptx("st.global.u64 [$0], $1;", w.offset_pointer(w.address(addresses), w.mul(mine, w.integer(8))), pointer)
    w.ptx("fence.proxy.tensormap::generic.release.gpu;")
