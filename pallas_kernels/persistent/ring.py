"""Weight tiles in shared memory: a ring of slots, filled in the order in which they will be used.

Tiles are counted over the whole launch; the n-th lies in slot n % stages. Every slot has two barriers: one for the copy that fills
it, one for the threads that are done with it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.persistent import code as w
from pallas_kernels.persistent import copies
from pallas_kernels.persistent.steps import HALF_TILE, THREADS, TILE_BYTES, TILE_ROWS


def ring_memory(stages: int) -> list[Any]:
    """Shared memory of a ring: its slots, and their barriers."""
    slots = plgpu.SMEM((stages, 2, TILE_ROWS, HALF_TILE), jnp.bfloat16, transforms=w.TILED)
    return [slots, plgpu.SMEM((4 * stages,), jnp.int32)]


@dataclasses.dataclass(frozen=True)
class Ring:
    """The ring of a program.

    Attributes:
      slots: [stages, 2, 64, 64], a tile in two halves of columns each.
      barriers: for every slot whether it has been filled, then for every slot whether it may be filled again.
      maps: tensor maps of all operands.
      in_flight: tiles that have been asked for and have not landed, at the most.
    """

    slots: Any
    barriers: Any
    maps: Any
    in_flight: int

    @property
    def stages(self) -> int:
        return self.slots.shape[0]

    def make(self) -> None:
        """Emits the making of its barriers, by one warpgroup."""
        stages = self.stages

        @w.emitted(plgpu.RefType())
        def emit(context: Any, barriers: Any) -> None:
            base = w.shared_address(barriers)
            with w.when(w.equal(w.thread(), w.integer(0))):
                for slot in range(stages):
                    copies.make_barrier(w.add(base, w.integer(8 * slot)), 1)
                    copies.make_barrier(w.add(base, w.integer(8 * (stages + slot))), THREADS)
            copies.publish_barriers()
            w.meet()

        emit(self.barriers)

    def know_maps(self) -> None:
        """Makes the tensor maps usable, which the kernel before this one wrote."""
        count = self.maps.shape[0]

        @w.emitted(plgpu.RefType())
        def emit(context: Any, maps: Any) -> None:
            for begin in range(0, count, THREADS):
                index = w.add(w.thread(), w.integer(begin))
                copies.know_tensor_map(w.offset_pointer(w.address(maps), w.mul(index, w.integer(128))))
            w.meet()

        emit(self.maps)

    def fetch_map(self, operand: jax.Array) -> None:
        """Has an operand's tensor map ready for copies to come."""

        @w.emitted(plgpu.RefType(), w.SCALAR(()))
        def emit(context: Any, maps: Any, operand: Any) -> None:
            at = w.offset_pointer(w.address(maps), w.mul(w.scalar(operand), w.integer(copies.MAP_BYTES)))
            with w.when(w.equal(w.thread(), w.integer(0))):
                copies.fetch_tensor_map(at)

        emit(self.maps, operand)

    def load(self, operand: jax.Array, row: jax.Array, column: jax.Array, tiles: jax.Array) -> jax.Array:
        """Starts the copy of the next tile, once its slot is free and not too many are on their way. Gives the number of tiles."""

        @pl.when(tiles >= self.stages)
        def _() -> None:
            self._pass(tiles - self.stages, self.stages)

        @pl.when(tiles >= self.in_flight)
        def _() -> None:
            self.await_tile(tiles - self.in_flight)

        @w.emitted(plgpu.RefType(), plgpu.RefType(w.TILED), plgpu.RefType(), *[w.SCALAR(())] * 4)
        def emit(context: Any, maps: Any, slots: Any, barriers: Any, *numbers: Any) -> None:
            index, row, column, slot = map(w.scalar, numbers)
            at = w.offset_pointer(w.address(maps), w.mul(index, w.integer(128)))
            to = w.add(w.shared_address(slots), w.mul(slot, w.integer(TILE_BYTES)))
            barrier = w.add(w.shared_address(barriers), w.mul(slot, w.integer(8)))
            copies.copy_tile(to, barrier, at, row, column, w.equal(w.thread(), w.integer(0)))

        emit(self.maps, self.slots, self.barriers, operand, row, column, self.slot(tiles))
        return tiles + 1

    def slot(self, tile: jax.Array) -> jax.Array:
        """Where a tile lies."""
        return jax.lax.rem(tile, self.stages)

    def await_tile(self, tile: jax.Array) -> None:
        """Waits until a tile has landed."""
        self._pass(tile, 0)

    def give_back(self, tile: jax.Array) -> None:
        """Frees the slot of a tile."""

        @w.emitted(plgpu.RefType(), w.SCALAR(()))
        def emit(context: Any, barriers: Any, tile: Any) -> None:
            slot = w.add(w.remainder(w.scalar(tile), self.stages), w.integer(self.stages))
            copies.arrive(w.add(w.shared_address(barriers), w.mul(slot, w.integer(8))))

        emit(self.barriers, tile)

    def _pass(self, tile: jax.Array, first: int) -> None:
        """Waits at a tile's barrier among those that begin at number ``first``. A slot's phases alternate from tile to tile."""

        @w.emitted(plgpu.RefType(), w.SCALAR(()))
        def emit(context: Any, barriers: Any, tile: Any) -> None:
            tile = w.scalar(tile)
            slot, parity = w.remainder(tile, self.stages), w.both(w.quotient(tile, self.stages), w.integer(1))
            at = w.mul(w.add(slot, w.integer(first)), w.integer(8))
            copies.pass_barrier(w.add(w.shared_address(barriers), at), parity)

        emit(self.barriers, tile)
