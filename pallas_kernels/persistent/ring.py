"""Weight tiles in shared memory: a ring of slots, filled in the order in which they will be used.

Tiles are counted over the whole launch; the n-th lies in slot n % stages. Every slot has two barriers: one for the copy that fills
it, one for the threads that are done with it.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.persistent import code as w
from pallas_kernels.persistent import copies
from pallas_kernels.persistent.code import Value
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
      in_flight: tiles that have been asked for and have not landed, at the most; with a half, one more or one less in turn.
    """

    slots: Any
    barriers: Any
    maps: Any
    in_flight: float

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

    def know_maps(self, first: jax.Array, count: int, *, beside: bool) -> None:
        """Makes tensor maps usable from the next call on, which an earlier kernel wrote; by the loading warpgroup.

        A core makes one usable after the other, some hundredths of a microsecond each, so only those of a layer at a time.

        Args:
          first, count: which; fewer if there are no more.
          beside: whether by threads of another warp than that which starts copies, which need not wait for it: `copies` of these
            maps only after the next call.
        """
        most, begin = self.maps.shape[0] - 1, THREADS // 2 if beside else 0
        assert count <= THREADS - begin

        @w.emitted(plgpu.RefType(), w.SCALAR(()))
        def emit(context: Any, maps: Any, first: Any) -> None:
            if beside:
                w.meet()
            mine = w.sub(w.thread(), w.integer(begin))
            with w.when(w.below(mine, w.integer(count))):
                index = w.smaller(w.add(w.scalar(first), mine), w.integer(most))
                copies.know_tensor_map(w.offset_pointer(w.address(maps), w.mul(index, w.integer(copies.MAP_BYTES))))
            if not beside:
                w.meet()

        emit(self.maps, first)

    def fetch_map(self, operand: jax.Array) -> None:
        """Has an operand's tensor map ready for copies to come."""

        @w.emitted(plgpu.RefType(), w.SCALAR(()))
        def emit(context: Any, maps: Any, operand: Any) -> None:
            at = w.offset_pointer(w.address(maps), w.mul(w.scalar(operand), w.integer(copies.MAP_BYTES)))
            with w.when(w.equal(w.thread(), w.integer(0))):
                copies.fetch_tensor_map(at)

        emit(self.maps, operand)

    def load(self, operand: jax.Array, row: jax.Array, column: jax.Array, tiles: jax.Array) -> jax.Array:
        """Starts the copy of the next tile, once its slot is free and not too many are on their way. Gives the number of tiles.

        Without branches but those of waits: the compiler would divide the loops around, and code is read once a layer anew.
        """

        @w.emitted(plgpu.RefType(), plgpu.RefType(w.TILED), plgpu.RefType(), *[w.SCALAR(())] * 4)
        def emit(context: Any, maps: Any, slots: Any, barriers: Any, *numbers: Any) -> None:
            index, row, column, tile = map(w.scalar, numbers)
            filled, freed, slot = self.barriers_of(w.shared_address(barriers), tile)
            copies.pass_barrier(*freed, w.below(w.integer(self.stages - 1), tile))
            earlier = w.sub(tile, w.integer(int(self.in_flight)))
            if self.in_flight % 1:
                earlier = w.sub(earlier, w.both(tile, w.integer(1)))
            landed, _, _ = self.barriers_of(w.shared_address(barriers), earlier)
            copies.pass_barrier(*landed, w.below(w.integer(math.ceil(self.in_flight) - 1), tile))
            at = w.offset_pointer(w.address(maps), w.mul(index, w.integer(128)))
            to = w.add(w.shared_address(slots), w.mul(slot, w.integer(TILE_BYTES)))
            copies.copy_tile(to, filled[0], at, row, column, w.equal(w.thread(), w.integer(0)))

        emit(self.maps, self.slots, self.barriers, operand, row, column, tiles)
        return tiles + 1

    def await_tile(self, tile: jax.Array) -> jax.Array:
        """Waits until a tile has landed; gives its slot."""

        @w.emitted(plgpu.RefType(), w.SCALAR(()), returns=w.INTEGER)
        def emit(context: Any, barriers: Any, tile: Any) -> Any:
            filled, _, slot = self.barriers_of(w.shared_address(barriers), w.scalar(tile))
            copies.pass_barrier(*filled)
            return w.splat(slot)

        return emit(self.barriers, tile)

    def give_back(self, tile: jax.Array) -> None:
        """Frees the slot of a tile."""

        @w.emitted(plgpu.RefType(), w.SCALAR(()))
        def emit(context: Any, barriers: Any, tile: Any) -> None:
            _, (at, _), _ = self.barriers_of(w.shared_address(barriers), w.scalar(tile))
            copies.arrive(at)

        emit(self.barriers, tile)

    def barriers_of(self, barriers: Value, tile: Value) -> tuple[tuple[Value, Value], tuple[Value, Value], Value]:
        """For a tile's copy: the barrier that says it has landed, and the parity of that; the one that says its slot was free for
        it, likewise; the slot. A slot's phases alternate from tile to tile."""
        turn, slot = w.quotient(tile, self.stages), w.remainder(tile, self.stages)
        filled = w.add(barriers, w.mul(slot, w.integer(8)))
        freed = w.add(filled, w.integer(8 * self.stages))
        return (filled, w.both(turn, w.integer(1))), (freed, w.both(w.add(turn, w.integer(1)), w.integer(1))), slot
