"""Products of weight tiles, as they land in the ring, with an input: one loop on the tensor cores.

In PTX as a whole, so that a tile takes few instructions: tiles have mostly landed when an input is there, and the next input waits
for their products. Put together from Pallas' operations it was 96 instructions a tile; now it is 73, and 0.13 us in place of 0.15.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.persistent import code as w
from pallas_kernels.persistent.launch import Launch
from pallas_kernels.persistent.ring import Ring
from pallas_kernels.persistent.steps import HALF_TILE, TILE_BYTES, TILE_K, TILE_ROWS

_DEPTH = 16
"""Of the contraction axis, that one instruction has; so tiles have eight."""

_SUMS = 4
"""An instruction waits for the one before it that adds to the same sums, but not for others."""

_LINES = "0x40000040"
"""Upper half of a matrix descriptor: groups of eight rows are 1024 bytes apart, of lines of 128 bytes whose chunks are swapped."""

_PLAIN = "0"
"""The same of an input, whose lines of eight columns follow each other."""

_PRODUCTS = plgpu.ShapeDtypeStruct((TILE_ROWS, 8), jnp.float32, layout=plgpu.Layout.WGMMA)  # pyright: ignore


def products(launch: Launch, ring: Ring, begin: jax.Array, count: jax.Array, tile: jax.Array) -> jax.Array:
    """Sum of weight tiles times the input, float32 [64, 8]; gives the slots back.

    The input has as many rows as there are sequences, or the next power of two. The tensor cores take eight: those that there are
    not they read from what follows it, so columns beyond the batch mean nothing, and may be no numbers.

    Args:
      launch: whose activations are the input.
      ring: that the tiles land in.
      begin: number of the first tile of the input.
      count: of tiles, at least one.
      tile: number of the first one in the ring.
    """
    rows = launch.plan.input_rows

    @w.emitted(plgpu.RefType(w.TILED), *[plgpu.RefType()] * 2, *[w.SCALAR(())] * 3, returns=_PRODUCTS)
    def emit(context: Any, slots: Any, barriers: Any, activations: Any, *numbers: Any) -> Any:
        begin, count, tile = map(w.scalar, numbers)
        (landed, parity), _, slot = ring.barriers_of(barriers, tile)
        end = w.add(w.shared_address(barriers), w.integer(8 * ring.stages))
        first_a = w.add(w.shared_address(slots), w.mul(slot, w.integer(TILE_BYTES)))
        first_b = w.add(w.shared_address(activations), w.mul(begin, w.integer(TILE_K * 2 * rows)))
        given = landed, parity, first_a, first_b, count, end
        return w.as_products(
            w.ptx(multiply_tiles(ring.stages, rows), *given, results=[w.float_type()] * 4), (TILE_ROWS, 8)
        )

    return emit(ring.slots, ring.barriers, launch.activations, begin, count, tile)


def multiply_tiles(stages: int, rows: int) -> str:
    """PTX of the loop, for a ring of so many stages and an input of so many rows.

    Results are $0 to $3. Then the first tile's barrier and parity, its address and that of its activations, the number of tiles,
    the end of the barriers.

    A slot is given back one tile late, when its instructions are known to have ended.
    """
    sums = [f"s{number}" for number in range(4 * _SUMS)]
    of_sum = [sums[4 * number : 4 * number + 4] for number in range(_SUMS)]
    begin = [
        "{ .reg .pred q, yes, later;",
        f".reg .b32 landed, parity, a, b, left, before, lower; .reg .b64 x, y; .reg .f32 s<{4 * _SUMS}>;",
        "setp.eq.u32 yes, 0, 0; setp.ne.u32 later, 0, 0;",
        "mov.u32 landed, $4; mov.u32 parity, $5; mov.u32 left, $8; mov.u32 before, $4;",
        *(f"mov.f32 {number}, 0f00000000;" for number in sums),
        # In units of 16 bytes; above them, how far apart eight columns are from the next, which swapped lines have no use for.
        f"shr.u32 a, $6, 4; or.b32 a, a, {1 << 16}; shr.u32 b, $7, 4; or.b32 b, b, {rows << 16};",
    ]
    turn = [
        "next: mbarrier.try_wait.parity.shared::cta.b64 q, [landed], parity; @!q bra next;",
        "wgmma.fence.sync.aligned;",
        *(_instruction(number, rows, of_sum[number % _SUMS]) for number in range(TILE_K // _DEPTH)),
        "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1;",
        f"@later mbarrier.arrive.shared::cta.b64 _, [before+{8 * stages}];",
        f"setp.eq.u32 later, 0, 0; mov.u32 before, landed; add.u32 landed, landed, 8; add.u32 a, a, {TILE_BYTES // 16};",
        f"add.u32 b, b, {TILE_K // 8 * rows}; setp.eq.u32 q, landed, $9;",
        f"@q sub.u32 landed, landed, {8 * stages}; @q sub.u32 a, a, {stages * TILE_BYTES // 16}; @q xor.b32 parity, parity, 1;",
        "sub.u32 left, left, 1; setp.ne.u32 q, left, 0; @q bra next;",
    ]
    added = [
        f"add.f32 {a}, {a}, {c}; add.f32 {b}, {b}, {d}; add.f32 ${i}, {a}, {b};"
        for i, (a, b, c, d) in enumerate(zip(*of_sum, strict=True))
    ]
    end = [
        "wgmma.wait_group.sync.aligned 0;",
        f"mbarrier.arrive.shared::cta.b64 _, [before+{8 * stages}];",
        *added,
        "}",
    ]
    return " ".join([*begin, *turn, *end])


def _instruction(number: int, rows: int, sums: list[str]) -> str:
    """The ``number``-th of a tile: 16 of its columns, in one or the other half, times as many of the input."""
    half, step = divmod(number * _DEPTH, HALF_TILE)
    of_a, of_b = (half * HALF_TILE * 2 * TILE_ROWS + step * 2) // 16, number * _DEPTH // 8 * rows
    place = f"add.u32 lower, a, {of_a}; mov.b64 x, {{lower, {_LINES}}}; add.u32 lower, b, {of_b}; mov.b64 y, {{lower, {_PLAIN}}}; "
    shape = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16"
    return f"{place}{shape} {{{', '.join(sums)}}}, x, y, yes, 1, 1, 0, 0;"
