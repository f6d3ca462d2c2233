"""What every part of the persistent kernel is given: a launch's references, and where things lie in its small shared buffer."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.persistent import code as w
from pallas_kernels.persistent.code import Value
from pallas_kernels.persistent.plan import Plan
from pallas_kernels.persistent.stalls import STEPS
from pallas_kernels.persistent.steps import THREADS
from pallas_kernels.persistent.words import Patience, Read, load_kept, load_run, store_kept, until_written

# Bytes of the small shared buffer.
PATIENCE = 0  # int32: attempts that a wait may take
SAID = 4  # int32: of a wait in vain
SQUARES = 64  # float32 [8 warps]
BY_WARP = 256  # float32 [2, 4 warps, 8 heads]
FRESH_KEY, FRESH_VALUE = 512, 768  # bfloat16 [128] each, of the new token
SMALL_FLOATS = 256

Body = Callable[["Emitter", list[Value], list[Value], Any], Any]
"""Code of a step: of an emitter, scalars, addresses of references, and arrays."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """References of a launch.

    Attributes:
      plan: what is computed.
      words: float words, those of two layers and of the head, and what else is kept from step to step.
      stall: int32 [4], see `stalls`.
      addresses: of all operands, layer by layer.
      numbers: int32 [layers, columns], what differs from layer to layer; see `number` and the plan's `Numbers.columns`.
      small: shared memory for reductions.
      activations: shared memory, a phase's input; see `products`.
      heads: shared memory, an attention's queries and the softmax's weights; see `steps.HEADS`.
      eps: of all norms.
    """

    plan: Plan
    words: Any
    stall: Any
    addresses: Any
    numbers: Any
    small: Any
    activations: Any
    heads: Any
    eps: float

    def number(self, values: Sequence[int], layer: jax.Array) -> jax.Array:
        """One of ``values``, a number for each layer, as a scalar."""
        if len(set(values)) == 1:
            return jnp.int32(values[0])

        @w.emitted(plgpu.RefType(), w.SCALAR(()), returns=w.INTEGER)
        def load(context: Any, numbers: Any, layer: Any) -> Any:
            return w.splat(load_number(self, w.address(numbers), w.scalar(layer), values))

        return load(self.numbers, layer)

    def is_odd(self) -> jax.Array:
        """1 if this is an odd step of those that hand on their words, 0 if it is an even one, as the first is."""

        @w.emitted(plgpu.RefType(), returns=w.INTEGER)
        def load(context: Any, words: Any) -> Any:
            return w.splat(load_kept(w.address(words), self._kept()))

        return load(self.words)

    def end(self, odd: jax.Array) -> None:
        """Has the next step know that it is odd if this one is not, and the other way round."""

        @w.emitted(plgpu.RefType(), w.SCALAR(()))
        def store(context: Any, words: Any, odd: Any) -> None:
            store_kept(w.address(words), self._kept(), w.sub(w.integer(1), w.scalar(odd)))

        store(self.words, odd)

    def _kept(self) -> Value:
        """Where this thread keeps that, behind the words: each for itself, as none knows when others have read it."""
        threads = w.integer(THREADS * self.plan.tuning.readers)
        mine = w.add(w.mul(w.program(), threads), w.reader())
        return w.mul(w.add(mine, w.integer(self.plan.words)), w.integer(4))


def load_number(launch: Launch, numbers: Value, layer: Value, values: Sequence[int]) -> Value:
    """Emits the loading of a layer's number of ``values``, which differ, from the table at ``numbers``."""
    columns = launch.plan.numbers.columns
    at = w.add(w.mul(layer, w.integer(len(columns))), w.integer(columns[tuple(values)]))
    return w.load_integer(numbers, w.mul(at, w.integer(4)))


@dataclasses.dataclass
class Emitter:
    """Within emitted code: addresses of what a launch consists of, for one step of one layer."""

    launch: Launch
    step: int
    words: Value
    addresses: Value
    numbers: Value
    small: Value
    activations: Value
    heads: Value
    layer: Value
    epoch: Value

    def __post_init__(self) -> None:
        self.plan = self.launch.plan

    def epoch_of(self, behind: int) -> Value:
        """Of this layer, or the one before."""
        return w.sub(self.epoch, w.integer(Plan.epoch(behind) - Plan.epoch(0)))

    def base(self, step: int, behind: int = 0) -> Value:
        """Where offsets of a step's words begin, in this layer or the one before."""
        if step >= self.plan.in_layer:
            return self.words
        turn = w.both(w.sub(self.layer, w.integer(behind)), w.integer(1))
        return w.offset_pointer(self.words, w.mul(turn, w.integer(4 * self.plan.layer_words)))

    def operand(self, number: int, behind: int = 0) -> Value:
        """Address of an operand of this layer, or the one before; those of the head are counted on from the last layer's."""
        layer = self._layer(behind)
        return w.load_pointer(self.addresses, w.add(w.mul(layer, w.integer(self.plan.operands)), w.integer(number)))

    def wait(self, reads: Sequence[Read]) -> list[list[Value]]:
        """`until_written`."""
        attempts, said = (w.add(self.small, w.integer(at)) for at in (PATIENCE, SAID))
        step = STEPS.index(self.plan.steps[self.step].name)
        return until_written(reads, Patience(attempts, said, step, self.layer))

    def squares(self, stream: int, row: Value) -> Read:
        """Of a sequence's sum of squares of the stream in an earlier step."""
        base, begin, count = self.base(stream), self.plan.offset("squares", stream), self.plan.squares(stream)
        first = w.add(w.mul(row, w.integer(count)), w.integer(begin))

        return Read(
            self.epoch,
            [w.integer(0)] * count,
            lambda need, old: load_run(base, first, need, old),
            lambda words: [w.total(w.floats(words))],
        )

    def root(self, squares: Value) -> Value:
        """1 / root mean square of a stream from its sum of squares."""
        mean = w.mul_f(squares, w.number(1.0 / self.plan.width))
        return w.inverse_root(w.add_f(mean, w.number(self.launch.eps)))

    def number(self, values: Sequence[int], behind: int = 0) -> Value:
        """As `Launch.number`, of this layer or the one before."""
        if len(set(values)) == 1:
            return w.integer(values[0])
        return load_number(self.launch, self.numbers, self._layer(behind), values)

    def _layer(self, behind: int) -> Value:
        """This layer, or the one before; before the first there is none, and it is meant itself."""
        if not behind:
            return self.layer
        return w.select(w.equal(self.layer, w.integer(0)), self.layer, w.sub(self.layer, w.integer(1)))


@dataclasses.dataclass(frozen=True)
class Place:
    """One step of one layer of a launch, whose words are of an epoch; who does not read or write any need not know it."""

    launch: Launch
    step: int
    layer: jax.Array
    epoch: jax.Array

    def emit(
        self,
        body: Body,
        scalars: Sequence[jax.Array] = (),
        refs: Sequence[Any] = (),
        arrays: Sequence[Any] = (),
        returns: Any = None,
        ref_type: Any = None,
    ) -> Any:
        """Emits ``body(emitter, scalars, addresses of refs, arrays)``; arrays are [64, 8] as products leave them."""
        launch = self.launch
        types = [plgpu.RefType()] * 5 + [plgpu.RefType(w.TILED)] + [ref_type or plgpu.RefType()] * len(refs)
        types += [w.SCALAR(())] * (2 + len(scalars)) + [plgpu.Layout.WGMMA] * len(arrays)

        @w.emitted(*types, returns=returns)
        def code(context: Any, *values: Any) -> Any:
            words, addresses, numbers, small, activations, heads, *rest = values
            given, (layer, epoch, *rest) = rest[: len(refs)], rest[len(refs) :]
            emitter = Emitter(
                launch, self.step, w.address(words), w.address(addresses), w.address(numbers),
                w.shared_address(small), w.shared_address(activations), w.shared_address(heads), w.scalar(layer), w.scalar(epoch),
            )  # fmt: skip
            found = [w.scalar(value) for value in rest[: len(scalars)]]
            return body(emitter, found, [w.address(ref) for ref in given], rest[len(scalars) :])

        fixed = (launch.words, launch.addresses, launch.numbers, launch.small, launch.activations, launch.heads)
        return code(*fixed, *refs, self.layer, self.epoch, *scalars, *arrays)
