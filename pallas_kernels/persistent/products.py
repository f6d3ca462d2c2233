"""Products of weight tiles, as they land in the ring, with an input: one loop on the tensor cores.

In PTX as a whole, so that a tile takes few instructions: tiles have mostly landed when an input is there, and the next input waits
for their products. Put together from Pallas' operations it was 96 instructions a tile; now it is 73, and 0.13 us in place of 0.15.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.persistent import code as w
from pallas_kernels.persistent.code import Value
from pallas_kernels.persistent.items import Item
from pallas_kernels.persistent.launch import Place
from pallas_kernels.persistent.plan import Plan
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

PRODUCTS = plgpu.ShapeDtypeStruct((TILE_ROWS, 8), jnp.float32, layout=plgpu.Layout.WGMMA)  # pyright: ignore
"""A tile's products with eight rows, as the tensor cores leave them."""


class Start(NamedTuple):
    """Where an item begins, as integers for the threads that multiply it.

    Attributes:
      landed, parity: the barrier that says that its first tile has landed, and the parity of that.
      tile, columns: lower halves of the matrix descriptors of that tile and of its part of the input.
      count: of tiles, at least one.
      output: byte of its first word, from where those of its layer begin.
    """

    landed: jax.Array
    parity: jax.Array
    tile: jax.Array
    columns: jax.Array
    count: jax.Array
    output: jax.Array


def start_of(place: Place, ring: Ring, item: Item, tile: jax.Array, part: jax.Array, row: jax.Array) -> Start:
    """Of an item of a phase.

    Args:
      place: the phase.
      ring: that its tiles land in.
      item: which.
      tile: number of its first tile in the ring.
      part: that it is, of the phase's partial sums.
      row: of its output, the first.
    """

    @w.emitted(plgpu.RefType(w.TILED), *[plgpu.RefType()] * 2, *[w.SCALAR(())] * 5, returns=(w.INTEGER,) * 6)
    def emit(context: Any, *values: Any) -> Any:
        memory, numbers = map(w.shared_address, values[:3]), map(w.scalar, values[3:])
        found = start_numbers(place.launch.plan, place.step, ring, *memory, *numbers)
        return tuple(map(w.splat, w.found_here(*found)))

    memory = ring.slots, ring.barriers, place.launch.activations
    return Start(*emit(*memory, item.begin, item.count, tile, part, row))


def start_numbers(
    plan: Plan, step: int, ring: Ring, slots: Value, barriers: Value, activations: Value,
    begin: Value, count: Value, tile: Value, part: Value, row: Value,
) -> list[Value]:  # fmt: skip
    """What a `Start` consists of; the first three are addresses in shared memory, the others as `start_of` has them."""
    phase, rows = plan.phase(step), plan.input_rows
    (landed, parity), _, slot = ring.barriers_of(barriers, tile)
    a = w.add(slots, w.mul(slot, w.integer(TILE_BYTES)))
    b = w.add(activations, w.mul(begin, w.integer(TILE_K * 2 * rows)))
    word = w.add(
        w.add(w.mul(part, w.integer(plan.batch * phase.padded_rows)), row), w.integer(plan.offset("sums", step))
    )
    # In units of 16 bytes; above them, how far apart eight columns are from the next, which swapped lines have no use for.
    halves = [w.either(w.quotient(at, 16), w.integer(apart << 16)) for at, apart in ((a, 1), (b, rows))]
    return [landed, parity, *halves, count, w.mul(word, w.integer(4))]


def products(ring: Ring, rows: int, start: Start) -> jax.Array:
    """Sum of weight tiles times the input, float32 [64, 8]; gives the slots back.

    The input has as many rows as there are sequences, or the next power of two. The tensor cores take eight: those that there are
    not they read from what follows it, so columns beyond the batch mean nothing, and may be no numbers.

    Args:
      ring: that the tiles land in.
      rows: of the input.
      start: of the item.
    """

    @w.emitted(plgpu.RefType(), *[w.SCALAR(())] * 5, returns=PRODUCTS)
    def emit(context: Any, barriers: Any, *numbers: Any) -> Any:
        end = w.add(w.shared_address(barriers), w.integer(8 * ring.stages))
        given = *map(w.scalar, numbers), end
        sums = w.ptx(multiply_tiles(ring.stages, rows), *given, results=[w.float_type()] * 4)
        return w.as_products(sums, PRODUCTS.shape)

    return emit(ring.barriers, *start[:5])


def multiply_tiles(stages: int, rows: int) -> str:
    """PTX of the loop, for a ring of so many stages and an input of so many rows.

    Results are $0 to $3; then a `Start` without its output, and the end of the barriers.

    A slot is given back one tile late, when its instructions are known to have ended.
    """
    sums = [f"s{number}" for number in range(4 * _SUMS)]
    of_sum = [sums[4 * number : 4 * number + 4] for number in range(_SUMS)]
    begin = [
        "{ .reg .pred q, yes, later;",
        f".reg .b32 landed, parity, a, b, left, before, lower; .reg .b64 x, y; .reg .f32 s<{4 * _SUMS}>;",
        "setp.eq.u32 yes, 0, 0; setp.ne.u32 later, 0, 0;",
        *(f"shfl.sync.idx.b32 {n}, ${i}, 0, 31, -1;" for i, n in enumerate(("landed", "parity", "a", "b", "left"), 4)),
        "mov.u32 before, landed;",
        *(f"mov.f32 {number}, 0f00000000;" for number in sums),
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
        *added,
        f"mbarrier.arrive.shared::cta.b64 _, [before+{8 * stages}];",
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
