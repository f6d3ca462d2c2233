"""What both product programs do around their products: find their operands and their tile, and join a gate to what it gates."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.activations import activation_for
from pallas_kernels.triton.plan import Blocks, Member, ProductPlan


@dataclasses.dataclass(frozen=True)
class Operands:
    """The references of a product kernel by their role."""

    x: Any
    scale: Any
    weights: tuple[Any, ...]
    biases: tuple[Any, ...]
    residual: Any
    outputs: tuple[Any, ...]

    @classmethod
    def sort(cls, plan: ProductPlan, refs: tuple[Any, ...]) -> "Operands":
        """From the order in which they are passed: x, [scale], weights, biases, [residual], outputs."""
        rest = list(refs)
        take = lambda n: tuple(rest.pop(0) for _ in range(n))  # noqa: E731
        x = rest.pop(0)
        (scale,) = take(1) if plan.eps is not None else (None,)
        weights, biases = take(plan.weights), take(plan.biases)
        (residual,) = take(1) if plan.residual else (None,)
        return cls(x, scale, weights, biases, residual, tuple(rest))


def each_tile(plan: ProductPlan, blocks: Blocks, act: Callable[[int, jax.Array], None]) -> None:
    """``act(output number, its rows)`` for the tile of this program, of all the programs of all outputs."""
    program, first = pl.program_id(0), 0
    for number, tiles in enumerate(plan.tiles(blocks.rows)):

        @pl.when((program >= first) & (program < first + tiles))
        def _(number: int = number, first: int = first) -> None:
            act(number, (program - first) * blocks.rows + jnp.arange(blocks.rows))

        first += tiles


def output_rows(plan: ProductPlan, number: int, values: Callable[[Member], Any], dtype: jnp.dtype) -> Any:
    """Rows of an output of ``dtype`` before the residual: the ``values`` of its member, or of a gate and what it gates."""
    if plan.gate is None:
        return values(plan.members[number])
    activation = activation_for(plan.gate, dtype)
    return jax.tree.map(lambda g, u: activation(g) * u, values(plan.members[0]), values(plan.members[1]))
