"""The persistent kernel: one launch that runs all layers of a decoder and its head. See the package's text for how."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode import STALL_INTEGERS
from pallas_kernels.persistent import code as w
from pallas_kernels.persistent import copies
from pallas_kernels.persistent.inputs import embed
from pallas_kernels.persistent.launch import PATIENCE, SAID, SMALL_FLOATS, Launch, Place
from pallas_kernels.persistent.loading import load_step
from pallas_kernels.persistent.multiplying import attend_step, multiply_step
from pallas_kernels.persistent.outputs import collect
from pallas_kernels.persistent.plan import Plan
from pallas_kernels.persistent.ring import Ring, ring_memory
from pallas_kernels.persistent.steps import HEADS, HEADS_BYTES, Attention, Collect, Keep, Phase
from pallas_kernels.persistent.stream import keep_stream
from pallas_kernels.persistent.words import SPINS, tell


def run_layers(
    plan: Plan, maps: jax.Array, addresses: jax.Array, x: jax.Array, tables: Sequence[jax.Array], lengths: jax.Array,
    given: Sequence[Any], eps: float,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Runs a plan.

    Args:
      plan: what is computed.
      maps, addresses: of the operands, see `tensor_maps.describe`.
      x: embedding of the new tokens, bfloat16 [batch, width].
      tables: cosines and sines of the rotation, float32 [batch, head_dim // 2].
      lengths: int32 [batch], position of each new token.
      given: the operands in the plan's order: weights, and references to the caches, which are changed. They are read and
        written by the addresses; passing them is what keeps them where they are.
      eps: of the norms.

    Returns:
      The output, float32 [batch, columns]; int32 [4], the first nonzero if something was wrong, see `stalls`.
    """
    words = jax.new_ref(jnp.zeros((plan.words,), jnp.int32))
    stall = jax.new_ref(jnp.zeros((STALL_INTEGERS,), jnp.int32))
    operands = [maps, addresses, x, *tables, lengths, jnp.asarray(plan.numbers.table()), words, stall, *given]

    def decode_layers(*refs: Any) -> None:
        maps, addresses, x, cos, sin, lengths, numbers, words, stall = refs[:9]
        logits, slots, heads, activations, small, barriers, ready = refs[len(operands) :]
        launch = Launch(plan, words, stall, addresses, numbers, small, activations, heads, eps)
        ring = Ring(slots, barriers, maps, plan.tuning.tiles_in_flight)
        _Program(launch, ring, x, (cos, sin), lengths, refs[9 : len(operands)], logits, ready).run()

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
    return logits, stall[...]


def _columns(plan: Plan) -> int:
    """Of the output."""
    (found,) = (step for step in plan.steps if isinstance(step, Collect))
    return found.columns


@dataclasses.dataclass(frozen=True)
class _Program:
    """What a program is made of beside its `Launch`: rotation ``tables``, ``operands`` in the plan's order, a barrier ``ready``."""

    launch: Launch
    ring: Ring
    x: Any
    tables: tuple[Any, Any]
    lengths: Any
    operands: Sequence[Any]
    logits: Any
    ready: Any

    def run(self) -> None:
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def _() -> None:
            self._clear()
            self.ring.make()
            plgpu.barrier_arrive(self.ready)
            embed(self.launch, self.x)

        @pl.when(warpgroup != 1)
        def _() -> None:
            alone = self.launch.plan.tuning.readers == 1
            multiplies = jnp.bool_(True) if alone else warpgroup == 0
            self._all_steps(lambda place, tiles: self._multiply(place, tiles, multiplies))

        @pl.when(warpgroup == 0)
        def _() -> None:
            self._tell_stalls()

        @pl.when(warpgroup == 1)
        def _() -> None:
            plgpu.barrier_wait(self.ready)
            self.ring.know_maps(jnp.int32(0), self.launch.plan.operands, beside=False)
            self._all_steps(lambda place, tiles: load_step(place, self.ring, self.lengths, tiles))
            self._check_addresses()  # here, as nobody waits for this warpgroup any more

    def _all_steps(self, act: Callable[[Place, jax.Array], jax.Array]) -> None:
        """``tiles = act(place, tiles)`` for all steps of all layers, then of the head."""
        plan = self.launch.plan

        def in_layer(layer: jax.Array, tiles: jax.Array) -> jax.Array:
            for step in range(plan.in_layer):
                tiles = act(Place(self.launch, step, layer), tiles)
            return tiles

        tiles = lax.fori_loop(0, plan.layers, in_layer, jnp.int32(0))
        for step in range(plan.in_layer, len(plan.steps)):
            tiles = act(Place(self.launch, step, jnp.int32(plan.layers)), tiles)

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

    def _check_addresses(self) -> None:
        """Says so in the stall if an operand is not where its address says: a copy was made in between. Each program checks some.

        The caches are written by their addresses alone; passing them here is what tells JAX that they are written.
        """
        programs = self.launch.plan.programs

        @w.emitted(plgpu.RefType(), plgpu.RefType(), *[plgpu.RefType()] * len(self.operands))
        def emit(context: Any, stall: Any, addresses: Any, *operands: Any) -> None:
            mine, base, at = w.program(), w.address(addresses), w.address(stall)
            for number in range(min(programs, len(operands))):
                with w.when(w.equal(mine, w.integer(number))):
                    numbers = range(number, len(operands), programs)
                    told = [w.load_pointer(base, w.integer(index)) for index in numbers]
                    pairs = zip((w.address(operands[index]) for index in numbers), told, strict=True)
                    copies.check_addresses(list(pairs), at, numbers)

        emit(self.launch.stall, self.launch.addresses, *self.operands)
