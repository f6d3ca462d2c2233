"""Products of tiles on Hopper's tensor cores: one warpgroup copies tiles into a ring in shared memory, two multiply them.

    copying       a | b  a | b  a | b ...           128 rows of x and some rows of a weight, 64 elements of each: the next step
                    |
    ring          [ step | step | step | step ]     a step is filled once both warpgroups have let go of what was there
                    |
    multiplying   sums += a b'                      64 rows each, all columns of the tile, in registers

A program runs through its tiles, and the ring does not stop between them: while one tile's results are written, the next one's
first steps are on their way. Two programs that are neighbours on the chip (a cluster) have tiles of the same columns: each copies
half of the weight's rows, to both. Without that the second-level cache would have to give more bytes than it can.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.target import Target

ROWS = 128
"""Of x in a tile, half of them for each warpgroup that multiplies."""
HALF = ROWS // 2
STEP = 64
"""Elements of the contraction axis at once: 128 bytes, a line of swizzled shared memory."""
MULTIPLIERS = 2
PEERS = 2
REGISTERS = {"multiplying": 240, "copying": 24}
"""Of a thread. A launch of 384 threads has 168 for each, 64512, and not one more: a warpgroup that asks for more waits for good."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Tiles of a product with ``rows`` of x on a device: ``columns`` of the output in one, ``stages`` steps in the ring.

    ``peers`` programs copy weights together; their tiles count as one.
    """

    device: Target
    rows: int
    columns: int
    stages: int
    peers: int

    def count(self, d_out: int) -> int:
        """Tiles of an output, of all peers together."""
        return self.rows // (self.peers * ROWS) * -(-d_out // self.columns)

    def corner(self, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First row and column of this program's; those of the same columns come one after the other, so that a weight is read
        once."""
        along = self.rows // (self.peers * ROWS)
        row = (lax.rem(tile, along) * self.peers + lax.axis_index("peer")) * ROWS
        return row, lax.div(tile, along) * self.columns

    @property
    def piece(self) -> int:
        """Columns of a tile that are written at once."""
        return 16 if self.columns % 32 else 32


def peers_of(device: Target, rows: int) -> int:
    """Programs that copy weights together: one where tiles do not come in pairs, and one that is interpreted, as several that wait
    for each other stop for good there now and then."""
    return 1 if rows % (PEERS * ROWS) or device.interpret else PEERS


def tiling(device: Target, rows: int, outputs: Sequence[int], columns: Iterable[int]) -> Tiling:
    """Of these columns of a tile, those with which the tiles of outputs so wide are done soonest."""

    def of(columns: int) -> Tiling:
        room = device.shared_memory - MULTIPLIERS * 2 * HALF * 32 * 2 - 1024
        return Tiling(device, rows, columns, min(6, room // ((ROWS + columns) * STEP * 2)), peers_of(device, rows))

    def cycles(tiles: Tiling) -> int:
        """Of a step, in which shared memory takes both tiles in and gives each warpgroup its half of x and all of the weight, 128
        bytes a cycle, times rounds of tiles. The tensor cores would be done in 4 cycles a column."""
        rounds = -(-sum(map(tiles.count, outputs)) // (device.cores // tiles.peers))
        return rounds * (256 + 3 * tiles.columns)

    return min(map(of, columns), key=cycles)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Steps in shared memory: ``a`` [stages, ROWS, STEP], ``b`` [stages, columns, STEP], and what says that they are there."""

    a: Any
    b: Any
    full: Any
    empty: Any
    stages: int
    columns: int
    peers: int

    def let_go_of_all(self) -> None:
        """Of each warpgroup that multiplies, first of all."""
        for stage in range(self.stages):
            plgpu.barrier_arrive(self.empty.at[stage])

    def fill(self, first: jax.Array, steps: int | jax.Array, x: Any, weight: Any) -> None:
        """Copies the steps of a product, the ring's ``first`` and those after: x [ROWS, k] and weight [columns, k]."""

        together = "peer" if self.peers > 1 else None

        def step(i: jax.Array, _: None) -> None:
            stage, part = lax.rem(first + i, self.stages), pl.ds(i * STEP, STEP)
            plgpu.barrier_wait(self.empty.at[stage])
            plgpu.copy_gmem_to_smem(x.at[:, part], self.a.at[stage], self.full.at[stage])
            plgpu.copy_gmem_to_smem(weight.at[:, part], self.b.at[stage], self.full.at[stage], collective_axes=together)

        lax.fori_loop(0, steps, step, None)

    def until_all_let_go(self, first: jax.Array) -> None:
        """Of the warpgroup that copies, last of all: a peer must not find this program's barriers gone."""
        for stage in range(self.stages):
            plgpu.barrier_wait(self.empty.at[lax.rem(first + stage, self.stages)])

    def multiply(self, first: jax.Array, steps: int | jax.Array) -> jax.Array:
        """This warpgroup's rows of the same product, float32 [HALF, columns]."""
        rows = pl.ds(lax.axis_index("warpgroup") * HALF, HALF)

        def in_scope(sums: Any) -> jax.Array:
            def step(i: jax.Array, _: None) -> None:
                stage = lax.rem(first + i, self.stages)
                plgpu.barrier_wait(self.full.at[stage])
                plgpu.wgmma(sums, self.a.at[stage, rows], self.b.at[stage].transpose((1, 0)))
                plgpu.wgmma_wait(1)  # the step before is done

                @pl.when(i > 0)
                def _() -> None:
                    plgpu.barrier_arrive(self.empty.at[lax.rem(first + i - 1, self.stages)])

            lax.fori_loop(0, steps, step, None)
            total = sums[...]
            plgpu.barrier_arrive(self.empty.at[lax.rem(first + steps - 1, self.stages)])
            return total

        return pl.run_scoped(in_scope, accumulator(self.columns))


def accumulator(columns: int) -> Any:
    """Sums in registers of the 64 rows that a warpgroup multiplies, zero to begin with."""
    return plgpu.ACC((HALF, columns), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]


def swizzled(columns: int) -> tuple[Any, Any]:
    """How tiles so wide lie in shared memory: 8 rows at once, their 16-byte pieces in an order that no two banks clash in."""
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)  # pyright: ignore[reportAbstractUsage]


def let_go_barriers(peers: int, stages: int) -> Any:
    """At which all warpgroups that multiply arrive, those of the peer too."""
    if peers == 1:
        return plgpu.Barrier(num_arrivals=MULTIPLIERS, num_barriers=stages)
    return plgpu.ClusterBarrier(collective_axes=("peer",), num_arrivals=MULTIPLIERS, num_barriers=stages)


TileWork = Callable[..., None]


def launch(
    name: str, tiles: Tiling, count: int, steps: Callable[[jax.Array], int | jax.Array], operands: Sequence[Any],
    outputs: Sequence[jax.ShapeDtypeStruct], multiply: TileWork, copy: TileWork,
) -> list[jax.Array]:  # fmt: skip
    """Runs a kernel whose programs share ``count`` tiles.

    Args:
      name: of the kernel.
      tiles: their sizes.
      count: of tiles, see `Tiling.count`.
      steps: how many a tile has, by its number.
      operands: arrays; those to multiply have the dtype of the first.
      outputs: shapes.
      multiply: ``multiply(ring, first, tile, references, staged)`` is what the two warpgroups do with a tile: its steps begin with
        the ring's ``first``, and ``staged`` [2, HALF, piece] is shared memory for what a warpgroup writes.
      copy: ``copy(ring, first, tile, references)``, what the third does.
    """
    dtype, programs = operands[0].dtype, min(count, tiles.device.cores // tiles.peers)
    wide, narrow = swizzled(STEP), swizzled(tiles.piece)

    def body(*refs: Any) -> None:
        *arrays, a, b, staged, full, empty = refs
        ring = Ring(a, b, full, empty, tiles.stages, tiles.columns, tiles.peers)
        warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")

        def each_tile(act: TileWork, *more: Any) -> jax.Array:
            def one(i: jax.Array, first: jax.Array) -> jax.Array:
                tile = program + i * programs
                act(ring, first, tile, arrays, *more)
                return first + steps(tile)

            return lax.fori_loop(0, lax.div(count - program + programs - 1, programs), one, jnp.int32(0))

        @pl.when(warpgroup < MULTIPLIERS)
        def _() -> None:
            plgpu.set_max_registers(REGISTERS["multiplying"], action="increase")
            ring.let_go_of_all()
            each_tile(multiply, staged.at[warpgroup])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == MULTIPLIERS)
        def _() -> None:
            plgpu.set_max_registers(REGISTERS["copying"], action="decrease")
            ring.until_all_let_go(each_tile(copy))

    body.__name__ = name
    return plgpu.kernel(
        body,
        out_type=list(outputs),
        grid=(programs,),
        grid_names=("program",),
        cluster=(tiles.peers,),
        cluster_names=("peer",),
        num_threads=MULTIPLIERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        scratch_types=[
            plgpu.SMEM((tiles.stages, ROWS, STEP), dtype, transforms=wide),
            plgpu.SMEM((tiles.stages, tiles.columns, STEP), dtype, transforms=wide),
            plgpu.SMEM((MULTIPLIERS, 2, HALF, tiles.piece), dtype, transforms=narrow),
            plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),  # a copy of x, one of the weight
            let_go_barriers(tiles.peers, tiles.stages),
        ],
        interpret=plgpu.InterpretGPUParams() if tiles.device.interpret else None,
    )(*operands)


def write(staged: Any, piece: int, values: jax.Array, *outs: Any) -> None:
    """Copies values [HALF, piece] to each of ``outs`` through shared memory, where the pieces of a tile take turns."""
    place = staged.at[piece % 2]
    # What is still on its way may be of the piece before, of the same tile; other tiles have another number of outs.
    plgpu.wait_smem_to_gmem(len(outs) if piece else 0, wait_read_only=True)
    place[...] = values.astype(staged.dtype)
    plgpu.commit_smem()
    for out in outs:
        plgpu.copy_smem_to_gmem(place, out)
