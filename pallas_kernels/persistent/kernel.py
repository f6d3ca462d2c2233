"""The persistent kernel: one launch that runs all layers of a decoder and its head. See the package's text for how."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.persistent import attend
from pallas_kernels.persistent import words as w
from pallas_kernels.persistent.inputs import embed, fill
from pallas_kernels.persistent.launch import PATIENCE, SMALL_FLOATS, Launch, numbers_of, varying
from pallas_kernels.persistent.outputs import store_plain, store_words
from pallas_kernels.persistent.plan import TILE_BYTES, TILE_K, TILE_ROWS, Attention, Phase, Plan

TILES_IN_FLIGHT = 3
"""Tiles that a program has asked for and not got: 48 KiB a core. Fewer leave memory idle, more make words wait behind weights."""

_SUMS = plgpu.ACC((TILE_ROWS, 8), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
_HALF = 64  # columns of a tile that one tensor-core instruction group takes


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
      The plain output, float32 [batch, rows]; int32 [4], nonzero if a wait was in vain.
    """
    columns = varying(plan)
    numbers = np.zeros((plan.layers, max(1, len(columns))), np.int32)
    for values, column in columns.items():
        numbers[:, column] = values
    words = jax.new_ref(jnp.zeros((2 * plan.layer_words,), jnp.int32))
    stall = jax.new_ref(jnp.zeros((4,), jnp.int32))
    operands = [maps, addresses, x, *tables, lengths, jnp.asarray(numbers), words, stall, *given]

    def decode_layers(*refs: Any) -> None:
        maps, addresses, x, cos, sin, lengths, numbers, words, stall = refs[:9]
        logits, activations, slots, small, barriers, ready = refs[len(operands) :]
        launch = Launch(plan, words, stall, addresses, numbers, columns, small, activations, eps)
        _Kernel(launch, maps, x, (cos, sin), lengths, refs[9 : len(operands)], logits, slots, barriers, ready).run()

    (logits,) = plgpu.kernel(
        decode_layers,
        out_type=(jax.ShapeDtypeStruct((plan.batch, _plain(plan).layers[0][0].rows), jnp.float32),),
        grid=(plan.programs,),
        grid_names=("program",),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        scratch_types=[
            plgpu.SMEM((plan.activation_tiles, 8, TILE_K), jnp.bfloat16, transforms=w.TILED),
            plgpu.SMEM((plan.stages, 2, TILE_ROWS, _HALF), jnp.bfloat16, transforms=w.TILED),
            plgpu.SMEM((SMALL_FLOATS,), jnp.float32),
            plgpu.SMEM((4 * plan.stages,), jnp.int32),
            plgpu.Barrier(num_barriers=1),
        ],
    )(*operands)
    return logits, stall[...]


def _plain(plan: Plan) -> Phase:
    (found,) = (step for step in plan.steps if isinstance(step, Phase) and step.plain)
    return found


@dataclasses.dataclass
class _Kernel:
    """Both warpgroups of a program.

    ``slots`` is the ring, [stages, 2, 64, 64]; ``barriers`` holds for every slot whether it has been filled, then for every slot
    whether it may be filled again. Tiles are counted over the whole launch: the n-th lies in slot n % stages.
    """

    launch: Launch
    maps: Any
    x: Any
    tables: tuple[Any, Any]
    lengths: Any
    operands: Sequence[Any]
    logits: Any
    slots: Any
    barriers: Any
    ready: Any

    def __post_init__(self) -> None:
        self.plan, self.stages = self.launch.plan, self.launch.plan.stages

    def run(self) -> None:
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def _() -> None:
            self._set_up()
            plgpu.barrier_arrive(self.ready)
            self._check_addresses()
            embed(self.launch, self.x)
            self._all_steps(self._multiply)

        @pl.when(warpgroup == 1)
        def _() -> None:
            plgpu.barrier_wait(self.ready)
            self._know_maps()
            self._all_steps(self._load)

    def _all_steps(self, act: Callable[[int, jax.Array, jax.Array], jax.Array]) -> None:
        """``tiles = act(step, layer, tiles)`` for all steps of all layers, then of the head."""
        plan = self.plan

        def layer_(layer: jax.Array, tiles: jax.Array) -> jax.Array:
            for step in range(plan.in_layer):
                tiles = act(step, layer, tiles)
            return tiles

        tiles = lax.fori_loop(0, plan.layers, layer_, jnp.int32(0))
        for step in range(plan.in_layer, len(plan.steps)):
            tiles = act(step, jnp.int32(plan.layers), tiles)

    def _set_up(self) -> None:
        stages, tiles = self.stages, self.plan.activation_tiles

        @w.emitted(plgpu.RefType(), plgpu.RefType(), plgpu.RefType(w.TILED))
        def emit(context: Any, barriers: Any, small: Any, activations: Any) -> None:
            base, thread = w.shared_address(barriers), w.thread()
            w.clear(w.address(activations), tiles * 8 * TILE_K * 2)
            with w.when(w.equal(thread, w.integer(0))):
                for slot in range(stages):
                    w.make_barrier(w.add(base, w.integer(8 * slot)), 1)
                    w.make_barrier(w.add(base, w.integer(8 * (stages + slot))), 128)
                w.store_shared_integer(w.add(w.shared_address(small), w.integer(PATIENCE)), w.integer(w.SPINS))
            w.publish_barriers()
            w.meet()

        emit(self.barriers, self.launch.small, self.launch.activations)
        plgpu.commit_smem()

    def _check_addresses(self) -> None:
        """Says so in the stall if an operand is not where its address says: a copy was made in between. Each program checks some.

        The caches are written by their addresses alone; passing them here is what tells JAX that they are written.
        """
        programs = self.plan.programs

        @w.emitted(plgpu.RefType(), plgpu.RefType(), *[plgpu.RefType()] * len(self.operands))
        def emit(context: Any, stall: Any, addresses: Any, *operands: Any) -> None:
            mine, base = w.program(), w.address(addresses)
            for number in range(min(programs, len(operands))):
                with w.when(w.equal(mine, w.integer(number))):
                    for index in range(number, len(operands), programs):
                        w.check_address(
                            w.address(operands[index]), w.load_pointer(base, w.integer(index)), w.address(stall), index
                        )

        emit(self.launch.stall, self.launch.addresses, *self.operands)

    def _know_maps(self) -> None:
        """Makes the tensor maps usable, which the kernel before this one wrote."""
        count = self.maps.shape[0]

        @w.emitted(plgpu.RefType())
        def emit(context: Any, maps: Any) -> None:
            for begin in range(0, count, 128):
                index = w.add(w.thread(), w.integer(begin))
                w.know_tensor_map(w.offset_pointer(w.address(maps), w.mul(index, w.integer(128))))
            w.meet()

        emit(self.maps)

    # ------------------------------------------------------------------ loading

    def _load(self, step: int, layer: jax.Array, tiles: jax.Array) -> jax.Array:
        """The loading warpgroup: tiles of all items of a step in order, whatever their inputs. Gives the number of tiles so far."""
        chosen = self.plan.steps[step]
        if isinstance(chosen, Attention):
            return self._load_attention(chosen, step, layer, tiles)
        numbers = self._numbers(step, layer)

        def load_item(i: jax.Array, tiles: jax.Array) -> jax.Array:
            row_tile, split = self._item(step, layer, i)
            group = self._group(chosen, numbers, row_tile)

            def load_tile(k: jax.Array, tiles: jax.Array) -> jax.Array:
                column = (split * numbers["k_tiles"] + k) * TILE_K
                return self._copy(layer, group["weight"], group["row"], column, tiles)

            return lax.fori_loop(0, numbers["k_tiles"], load_tile, tiles)

        return lax.fori_loop(0, self._count(step, layer, numbers), load_item, tiles)

    def _load_attention(self, attention: Attention, step: int, layer: jax.Array, tiles: jax.Array) -> jax.Array:
        window = self._numbers(step, layer)["window"]

        def load_item(i: jax.Array, tiles: jax.Array) -> jax.Array:
            row, head, part = self._attention_item(attention, step, layer, i)
            _, begin, end = attend.span(attention, self.lengths[row], window, part)
            slot = (row * attention.kv_heads + head) * self.plan.slots

            def load_pair(t: jax.Array, tiles: jax.Array) -> jax.Array:
                for operand in (attention.keys, attention.values):
                    tiles = self._copy(layer, jnp.int32(operand), slot + t * TILE_ROWS, jnp.int32(0), tiles)
                return tiles

            return lax.fori_loop(begin, end, load_pair, tiles)

        return lax.fori_loop(0, self._count(step, layer, {}), load_item, tiles)

    def _copy(
        self, layer: jax.Array, operand: jax.Array, row: jax.Array, column: jax.Array, tiles: jax.Array
    ) -> jax.Array:
        """Starts the copy of the next tile, once its slot is free and not too many are on their way."""
        plan, stages = self.plan, self.stages

        @pl.when(tiles >= stages)
        def _() -> None:
            self._pass("empty", tiles - stages)

        @pl.when(tiles >= TILES_IN_FLIGHT)
        def _() -> None:
            self._pass("full", tiles - TILES_IN_FLIGHT)

        @w.emitted(plgpu.RefType(), plgpu.RefType(w.TILED), plgpu.RefType(), *[w.SCALAR(())] * 4)
        def emit(
            context: Any, maps: Any, slots: Any, barriers: Any, index: Any, row: Any, column: Any, slot: Any
        ) -> None:
            at = w.offset_pointer(w.address(maps), w.mul(w.scalar(index), w.integer(128)))
            to = w.add(w.shared_address(slots), w.mul(w.scalar(slot), w.integer(TILE_BYTES)))
            barrier = w.add(w.shared_address(barriers), w.mul(w.scalar(slot), w.integer(8)))
            w.copy_tile(to, barrier, at, w.scalar(row), w.scalar(column), w.equal(w.thread(), w.integer(0)))

        index = layer * plan.operands + operand
        emit(self.maps, self.slots, self.barriers, index, row, column, lax.rem(tiles, stages))
        return tiles + 1

    def _pass(self, which: str, tile: jax.Array) -> None:
        """Waits until a tile has landed ("full"), or until it has been used and its slot may be filled again ("empty")."""
        first = 0 if which == "full" else self.stages

        @w.emitted(plgpu.RefType(), w.SCALAR(()))
        def emit(context: Any, barriers: Any, tile: Any) -> None:
            tile = w.scalar(tile)
            slot, parity = w.remainder(tile, self.stages), w.both(w.quotient(tile, self.stages), w.integer(1))
            at = w.mul(w.add(slot, w.integer(first)), w.integer(8))
            w.pass_barrier(w.add(w.shared_address(barriers), at), parity)

        emit(self.barriers, tile)

    def _give_back(self, tile: jax.Array) -> None:
        """Frees the slot of a tile."""

        @w.emitted(plgpu.RefType(), w.SCALAR(()))
        def emit(context: Any, barriers: Any, tile: Any) -> None:
            slot = w.add(w.remainder(w.scalar(tile), self.stages), w.integer(self.stages))
            w.arrive(w.add(w.shared_address(barriers), w.mul(slot, w.integer(8))))

        emit(self.barriers, tile)

    # ------------------------------------------------------------------ multiplying

    def _multiply(self, step: int, layer: jax.Array, tiles: jax.Array) -> jax.Array:
        """The multiplying warpgroup: the input of a step, then every item's products. Gives the number of tiles so far."""
        chosen, launch = self.plan.steps[step], self.launch
        if isinstance(chosen, Attention):
            return self._attend(chosen, step, layer, tiles)
        numbers = self._numbers(step, layer)
        count = self._count(step, layer, numbers)

        @pl.when(count > 0)
        def _() -> None:
            # The number of programs is a multiple of the splits, so all items of this program have the same one.
            row_tile, split = self._item(step, layer, jnp.int32(0))
            fill(launch, step, layer, numbers, split, (row_tile == 0).astype(jnp.int32))
            plgpu.commit_smem()

        def multiply_item(i: jax.Array, tiles: jax.Array) -> jax.Array:
            row_tile, split = self._item(step, layer, i)
            first = self._group(chosen, numbers, row_tile)["slice"] * numbers["k_tiles"]

            def with_sums(even: Any, odd: Any) -> jax.Array:
                end = self._products(numbers["k_tiles"], tiles, first, (even, odd))
                products = even[...] + odd[...]
                self._give_back(end - 1)
                if chosen.plain:
                    store_plain(launch, step, layer, self.logits, products, row_tile * TILE_ROWS)
                else:
                    store_words(launch, step, layer, products, split, row_tile * TILE_ROWS)
                return end

            return pl.run_scoped(with_sums, *[_SUMS] * 2)

        return lax.fori_loop(0, count, multiply_item, tiles)

    def _products(self, count: jax.Array, tiles: jax.Array, first: jax.Array, sums: tuple[Any, Any]) -> jax.Array:
        """Adds up weight tiles times activations. Two sums, so that an instruction need not wait for the one before; a slot is given
        back one tile late, when its instructions are known to have ended. The last one is left to the caller."""
        activations = self.launch.activations

        def multiply_tile(k: jax.Array, tiles: jax.Array) -> jax.Array:
            slot = lax.rem(tiles, self.stages)
            self._pass("full", tiles)
            for half in range(2):
                columns = slice(half * _HALF, (half + 1) * _HALF)
                plgpu.wgmma(sums[half], self.slots.at[slot, half], activations.at[first + k, :, columns].T)
            plgpu.wgmma_wait(2)

            @pl.when(k > 0)
            def _() -> None:
                self._give_back(tiles - 1)

            return tiles + 1

        return lax.fori_loop(0, count, multiply_tile, tiles)

    def _attend(self, attention: Attention, step: int, layer: jax.Array, tiles: jax.Array) -> jax.Array:
        launch, window = self.launch, self._numbers(step, layer)["window"]
        constant: Callable[[float], jax.Array] = lambda value: plgpu.layout_cast(  # noqa: E731
            jnp.full((TILE_ROWS, 8), value, jnp.float32), plgpu.Layout.WGMMA
        )

        def attend_item(i: jax.Array, tiles: jax.Array) -> jax.Array:
            row, head, part = self._attention_item(attention, step, layer, i)
            length = self.lengths[row]
            first, begin, end = attend.span(attention, length, window, part)
            last = length // TILE_ROWS
            newest = ((begin <= last) & (last < end)).astype(jnp.int32)
            attend.prepare(launch, step, layer, row, head, length, newest, self.tables)
            plgpu.commit_smem()

            def tile(which: int, t: jax.Array, tiles: jax.Array) -> jax.Array:
                self._pass("full", tiles)
                slot, here = lax.rem(tiles, self.stages), (t == last).astype(jnp.int32)
                attend.insert(launch, step, layer, self.slots, slot, length - last * TILE_ROWS, which, here)
                plgpu.commit_smem()
                return slot

            def over_tile(t: jax.Array, carry: Any) -> Any:
                tiles, largest, sums, low, high = carry
                slot = tile(0, t, tiles)
                scores = self._scores(slot)
                self._give_back(tiles)
                largest, sums, scale = attend.softmax(
                    launch, step, layer, scores, largest, sums, t * TILE_ROWS, first, length
                )
                slot = tile(1, t, tiles + 1)
                low, high = self._weighed(slot, low * scale, high * scale)
                self._give_back(tiles + 1)
                return tiles + 2, largest, sums, low, high

            none = tuple(map(constant, (w.NOTHING, 0.0, 0.0, 0.0)))
            tiles, largest, sums, low, high = lax.fori_loop(begin, end, over_tile, (tiles, *none))
            attend.finish(launch, step, layer, row, head, part, (low, high), largest, sums)
            return tiles

        return lax.fori_loop(0, self._count(step, layer, {}), attend_item, tiles)

    def _scores(self, slot: jax.Array) -> jax.Array:
        """A tile of keys times the queries: [slots, heads]."""

        def compute(*sums: Any) -> jax.Array:
            for half in range(2):
                columns = slice(half * _HALF, (half + 1) * _HALF)
                plgpu.wgmma(sums[half], self.slots.at[slot, half], self.launch.activations.at[0, :, columns].T)
            plgpu.wgmma_wait(0)
            return sums[0][...] + sums[1][...]

        return pl.run_scoped(compute, *[_SUMS] * 2)

    def _weighed(self, slot: jax.Array, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Adds a tile of values, transposed, times the softmax's weights: both halves of columns, [64, heads] each."""
        weights = self.launch.activations.at[1, :, slice(0, TILE_ROWS)]

        def compute(sums: Any) -> None:
            for half in range(2):
                plgpu.wgmma(sums[half], self.slots.at[slot, half].T, weights.T)
            plgpu.wgmma_wait(0)

        init = plgpu.ACC.init  # pyright: ignore[reportPrivateImportUsage]
        return pl.run_state(compute)((init(low), init(high)))

    # ------------------------------------------------------------------ items

    def _numbers(self, step: int, layer: jax.Array) -> dict[str, jax.Array]:
        """Of a step in this layer, by name."""
        return {name: self.launch.number(values, layer) for name, values in numbers_of(self.plan.steps[step]).items()}

    def _first(self, step: int, layer: jax.Array) -> jax.Array:
        """This program's first item of a step."""
        begin = self.launch.number(self.plan.first_items[step], layer)
        return lax.rem(lax.axis_index("program") + self.plan.programs - begin, self.plan.programs)

    def _count(self, step: int, layer: jax.Array, numbers: dict[str, jax.Array]) -> jax.Array:
        """How many items of a step this program has."""
        chosen = self.plan.steps[step]
        items = chosen.items(0) if isinstance(chosen, Attention) else numbers["row_tiles"] * chosen.splits
        return lax.div(items - self._first(step, layer) + self.plan.programs - 1, self.plan.programs)

    def _item(self, step: int, layer: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(row tile, split) of this program's i-th item of a phase."""
        item = self._first(step, layer) + i * self.plan.programs
        splits = self.plan.steps[step].splits  # pyright: ignore[reportAttributeAccessIssue]
        return lax.div(item, splits), lax.rem(item, splits)

    def _attention_item(
        self, attention: Attention, step: int, layer: jax.Array, i: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(sequence, kv head, part) of this program's i-th item of an attention."""
        item = self._first(step, layer) + i * self.plan.programs
        head = lax.div(item, attention.parts)
        return lax.div(head, attention.kv_heads), lax.rem(head, attention.kv_heads), lax.rem(item, attention.parts)

    def _group(self, phase: Phase, numbers: dict[str, jax.Array], row_tile: jax.Array) -> dict[str, jax.Array]:
        """What a row tile of a phase belongs to: its operand, its first row there, and the slice of the input that it reads."""
        begin, found = jnp.int32(0), {}
        for i, group in enumerate(phase.layers[0]):
            here = row_tile >= begin
            own = {
                "weight": jnp.int32(group.weight),
                "row": numbers[f"row_start {i}"] + (row_tile - begin) * TILE_ROWS,
                "slice": jnp.int32(phase.slice_of(i)),
            }
            found = own if not found else {name: jnp.where(here, own[name], found[name]) for name in own}
            begin = begin + numbers[f"row_tiles {i}"]
        return found
