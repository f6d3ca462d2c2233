"""The persistent kernel: one launch that runs all layers of a decoder and its head. See the package's text for how."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode import Carried
from pallas_kernels.persistent import code as w
from pallas_kernels.persistent import copies
from pallas_kernels.persistent.inputs import embed
from pallas_kernels.persistent.launch import PATIENCE, SAID, SMALL_FLOATS, Launch, Place
from pallas_kernels.persistent.loading import load_step
from pallas_kernels.persistent.multiplying import attend_step, multiply_step
from pallas_kernels.persistent.outputs import collect
from pallas_kernels.persistent.plan import Plan
from pallas_kernels.persistent.ring import Ring, ring_memory
from pallas_kernels.persistent.stalls import of_operand
from pallas_kernels.persistent.steps import HEADS, HEADS_BYTES, Attention, Collect, Keep, Phase
from pallas_kernels.persistent.stream import keep_stream
from pallas_kernels.persistent.words import SPINS, tell


def run_layers(
    plan: Plan, carried: Carried, x: jax.Array, tables: Sequence[jax.Array], lengths: jax.Array, given: Sequence[Any],
    first: Sequence[int], eps: float,
) -> tuple[jax.Array, Carried]:  # fmt: skip
    """Runs a plan.

    Args:
      plan: what is computed.
      carried: a `Kept` of these operands, and a stall of zeros.
      x: embedding of the new tokens, bfloat16 [batch, width].
      tables: cosines and sines of the rotation, float32 [batch, head_dim // 2].
      lengths: int32 [batch], position of each new token.
      given: the operands in the plan's order: weights, and references to the caches, which are changed. They are read and
        written by the addresses; passing them is what keeps them where they are.
      first: numbers of those that a step reads first: they are brought into the cache that all cores share for the next step, as
        memory has nothing else to do between two.
      eps: of the norms.

    Returns:
      The output, float32 [batch, columns]; what the next launch is given, whose stall says if something was wrong, see `stalls`.
    """
    kept = carried.own
    words, stall = jax.new_ref(kept.words), jax.new_ref(carried.stall)
    numbers = jnp.asarray(plan.numbers.table())
    operands = [kept.maps, kept.addresses, x, *tables, lengths, numbers, words, stall, *given]

    def decode_layers(*refs: Any) -> None:
        maps, addresses, x, cos, sin, lengths, numbers, words, stall = refs[:9]
        logits, slots, heads, activations, small, barriers, ready = refs[len(operands) :]
        launch = Launch(plan, words, stall, addresses, numbers, small, activations, heads, eps)
        ring = Ring(slots, barriers, maps, plan.tuning.tiles_in_flight)
        _Program(launch, ring, x, (cos, sin), lengths, refs[9 : len(operands)], first, logits, ready).run()

    slots, barriers = ring_memory(plan.stages)
    (logits,) = plgpu.kernel(
        decode_layers,
        out_type=(jax.ShapeDtypeStruct((plan.batch, _columns(plan)), jnp.float32),),
        grid=(plan.programs,),
        grid_names=("program",),
        num_threads=1 + plan.tuning.readers,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        scratch_types=[
            slots,
            plgpu.SMEM(HEADS, jnp.bfloat16, transforms=w.TILED),
            plgpu.SMEM((plan.input_bytes // 2,), jnp.bfloat16),
            plgpu.SMEM((SMALL_FLOATS,), jnp.float32),
            barriers,
            plgpu.Barrier(num_barriers=1),
        ],
    )(*operands)
    return logits, Carried(stall[...], dataclasses.replace(kept, words=words[...]))


def _columns(plan: Plan) -> int:
    """Of the output."""
    (found,) = (step for step in plan.steps if isinstance(step, Collect))
    return found.columns


@dataclasses.dataclass(frozen=True)
class _Program:
    """What a program is made of beside its `Launch`: rotation ``tables``, ``operands`` in the plan's order, numbers of those
    that are read ``first``, a barrier ``ready``."""

    launch: Launch
    ring: Ring
    x: Any
    tables: tuple[Any, Any]
    lengths: Any
    operands: Sequence[Any]
    first: Sequence[int]
    logits: Any
    ready: Any

    def run(self) -> None:
        warpgroup = lax.axis_index("warpgroup")
        odd = self.launch.is_odd()

        @pl.when(warpgroup == 0)
        def _() -> None:
            self._clear()
            self.ring.make()
            plgpu.barrier_arrive(self.ready)
            embed(self._place(0, jnp.int32(-1), odd), self.x)

        @pl.when(warpgroup != 1)
        def _() -> None:
            alone = self.launch.plan.tuning.readers == 1
            multiplies = jnp.bool_(True) if alone else warpgroup == 0
            self._all_steps(odd, lambda place, tiles: self._multiply(place, tiles, multiplies))
            self.launch.end(odd)

        @pl.when(warpgroup == 0)
        def _() -> None:
            self._tell_stalls()

        @pl.when(warpgroup == 1)
        def _() -> None:
            plgpu.barrier_wait(self.ready)
            self.ring.know_maps(jnp.int32(0), self.launch.plan.operands, beside=False)
            self._all_steps(odd, lambda place, tiles: load_step(place, self.ring, self.lengths, tiles))
            # Here, as nobody waits for this warpgroup any more.
            self._fetch_first()
            self._check_addresses()

    def _place(self, step: int, layer: jax.Array, odd: jax.Array) -> Place:
        return Place(self.launch, step, layer, self.launch.plan.epoch(layer, odd))

    def _all_steps(self, odd: jax.Array, act: Callable[[Place, jax.Array], jax.Array]) -> None:
        """``tiles = act(place, tiles)`` for all steps of all layers, then of the head."""
        plan = self.launch.plan

        def in_layer(layer: jax.Array, tiles: jax.Array) -> jax.Array:
            for step in range(plan.in_layer):
                tiles = act(self._place(step, layer, odd), tiles)
            return tiles

        tiles = lax.fori_loop(0, plan.layers, in_layer, jnp.int32(0))
        for step in range(plan.in_layer, len(plan.steps)):
            tiles = act(self._place(step, jnp.int32(plan.layers), odd), tiles)

    def _multiply(self, place: Place, tiles: jax.Array, multiplies: jax.Array) -> jax.Array:
        step = self.launch.plan.steps[place.step]
        if isinstance(step, Attention):
            return attend_step(place, self.ring, self.tables, self.lengths, tiles, multiplies)
        if isinstance(step, Phase):
            return multiply_step(place, self.ring, tiles, multiplies)

        @pl.when(multiplies)
        def _() -> None:
            if isinstance(step, Keep):
                keep_stream(place)
            else:
                collect(place, self.logits)

        return tiles

    def _clear(self) -> None:
        """Queries that are not there are never read, but multiplied: they must be numbers."""

        @w.emitted(plgpu.RefType(), plgpu.RefType(w.TILED))
        def emit(context: Any, small: Any, heads: Any) -> None:
            w.clear(w.address(heads), HEADS_BYTES)
            with w.when(w.equal(w.thread(), w.integer(0))):
                for at, value in ((PATIENCE, SPINS), (SAID, 0)):
                    w.store_shared_integer(w.add(w.shared_address(small), w.integer(at)), w.integer(value))

        emit(self.launch.small, self.launch.heads)
        plgpu.commit_smem()

    def _tell_stalls(self) -> None:
        @w.emitted(plgpu.RefType(), plgpu.RefType())
        def emit(context: Any, small: Any, stall: Any) -> None:
            w.meet()
            with w.when(w.equal(w.thread(), w.integer(0))):
                tell(w.add(w.shared_address(small), w.integer(SAID)), w.address(stall))

        emit(self.launch.small, self.launch.stall)

    def _fetch_first(self) -> None:
        """Brings what the next step reads first into the cache that all cores share."""

        @w.emitted(*[plgpu.RefType()] * len(self.first))
        def emit(context: Any, *operands: Any) -> None:
            for number, operand in zip(self.first, operands, strict=True):
                copies.fetch_all(operand, 2 * math.prod(self.operands[number].shape), self.launch.plan.programs)

        emit(*(self.operands[number] for number in self.first))

    def _check_addresses(self) -> None:
        """Says so in the stall if an operand is not where its address says: a copy was made in between. Each program checks some.

        The caches are written by their addresses alone; passing them here is what tells JAX that they are written.
        """
        programs = self.launch.plan.programs

        @w.emitted(plgpu.RefType(), plgpu.RefType(), *[plgpu.RefType()] * len(self.operands))
        def emit(context: Any, stall: Any, addresses: Any, *operands: Any) -> None:
            last, mine, at = w.integer(len(operands) - 1), w.program(), w.address(stall)
            numbers = [w.smaller(w.add(mine, w.integer(begin)), last) for begin in range(0, len(operands), programs)]
            told = [w.load_pointer(w.address(addresses), number) for number in numbers]
            said = [w.add(number, w.integer(of_operand(0))) for number in numbers]
            # What all these branches have in common is before them, as code is to be small.
            for program in range(min(programs, len(operands))):
                with w.when(w.equal(mine, w.integer(program))):
                    for operand, address, integer in zip(operands[program::programs], told, said, strict=False):
                        copies.check_address(w.address(operand), address, at, integer)

        emit(self.launch.stall, self.launch.addresses, *self.operands)
