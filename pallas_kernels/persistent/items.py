"""Which items of a step a program has, and what each of them is: the same arithmetic for who loads and who multiplies."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.persistent.launch import Place, numbers_of
from pallas_kernels.persistent.plan import TILE_ROWS, Attention, Phase


@dataclasses.dataclass(frozen=True)
class Part:
    """An item of an attention: a sequence, one of its kv heads, and a part of its positions."""

    row: jax.Array
    head: jax.Array
    part: jax.Array


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a row tile of a phase belongs to: its operand, its first row there, and the slice of the input that it reads."""

    weight: jax.Array
    row: jax.Array
    slice_: jax.Array


class Items:
    """A program's items of a step in one layer: ``count`` of them, at a distance of all programs from ``first`` on."""

    def __init__(self, place: Place):
        plan = place.launch.plan
        self.step = plan.steps[place.step]
        self.programs = plan.programs
        self.numbers = {
            name: place.launch.number(values, place.layer) for name, values in numbers_of(self.step).items()
        }
        begin = place.launch.number(plan.first_items[place.step], place.layer)
        self.first = lax.rem(lax.axis_index("program") + self.programs - begin, self.programs)
        step = self.step
        items = step.items(0) if isinstance(step, Attention) else self.numbers["row_tiles"] * step.splits
        self.count = lax.div(items - self.first + self.programs - 1, self.programs)

    def tile(self, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(row tile, split) of the i-th item of a phase."""
        assert isinstance(self.step, Phase)
        item = self.first + i * self.programs
        return lax.div(item, self.step.splits), lax.rem(item, self.step.splits)

    def part(self, i: jax.Array) -> Part:
        """The i-th item of an attention."""
        assert isinstance(self.step, Attention)
        item = self.first + i * self.programs
        head = lax.div(item, self.step.parts)
        part = lax.rem(item, self.step.parts)
        return Part(lax.div(head, self.step.kv_heads), lax.rem(head, self.step.kv_heads), part)

    def rows(self, row_tile: jax.Array) -> Rows:
        """What a row tile of a phase belongs to."""
        assert isinstance(self.step, Phase)
        begin, found = jnp.int32(0), None
        for i, group in enumerate(self.step.layers[0]):
            row = self.numbers[f"row_start {i}"] + (row_tile - begin) * TILE_ROWS
            own = Rows(jnp.int32(group.weight), row, jnp.int32(self.step.slice_of(i)))
            found = own if found is None else _where(row_tile >= begin, own, found)
            begin = begin + self.numbers[f"row_tiles {i}"]
        assert found is not None
        return found


def _where(condition: jax.Array, a: Rows, b: Rows) -> Rows:
    pick = lambda x, y: jnp.where(condition, x, y)  # noqa: E731
    return Rows(pick(a.weight, b.weight), pick(a.row, b.row), pick(a.slice_, b.slice_))
