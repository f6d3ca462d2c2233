"""Which items of a step a program has, and what each of them is: the same arithmetic for who loads and who multiplies."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.persistent.launch import Place
from pallas_kernels.persistent.steps import TILE_ROWS, Attention, Phase


@dataclasses.dataclass(frozen=True)
class Part:
    """An item of an attention: a sequence, one of its kv heads, and a part of its positions."""

    row: jax.Array
    head: jax.Array
    part: jax.Array


@dataclasses.dataclass(frozen=True)
class Team:
    """A program's team in a phase.

    Attributes:
      number: of the team.
      start: its first program, counted from the phase's first.
      sharers: programs that share the tiles of a split.
      tiles: of a split.
      k_tiles: of a row tile of a split.
      x_start, k: the slice of the input that the team reads.
    """

    number: jax.Array
    start: jax.Array
    sharers: jax.Array
    tiles: jax.Array
    k_tiles: jax.Array
    x_start: jax.Array
    k: jax.Array


@dataclasses.dataclass(frozen=True)
class Item:
    """A row tile, counted among its team's, or a piece of it: ``count`` of its tiles from the ``begin``-th on."""

    row_tile: jax.Array
    begin: jax.Array
    count: jax.Array
    piece: jax.Array


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where the rows of a row tile come from, an operand and its first row there, and the first column of the output they go to."""

    weight: jax.Array
    row: jax.Array
    output: jax.Array


class PhaseItems:
    """A program's items of a phase in one layer: ``count`` of them, all of its ``team`` and ``split``.

    ``is_first`` says whether it is the first of those who share the split's tiles.
    """

    def __init__(self, place: Place, phase: Phase):
        self.phase, self.numbers = phase, _numbers(place)
        turn = turn_of(place)
        self.team = self._team(0)
        for number in range(1, len(phase.teams)):
            other = self._team(number)
            self.team = _choose(turn >= other.start, other, self.team)
        turn = turn - self.team.start
        self.split, self._index = lax.rem(turn, phase.splits), lax.div(turn, phase.splits)
        self.is_first = self._index == 0
        self._begin, self._end = self._edge(self._index), self._edge(self._index + 1)
        self._first = lax.div(self._begin, self.team.k_tiles)
        self.count = lax.div(self._end + self.team.k_tiles - 1, self.team.k_tiles) - self._first
        self.count = jnp.where(self._end > self._begin, self.count, 0)

    def item(self, i: jax.Array) -> Item:
        """The i-th."""
        row_tile = self._first + i
        tile = row_tile * self.team.k_tiles
        begin = jnp.maximum(self._begin, tile)
        end = jnp.minimum(self._end, tile + self.team.k_tiles)
        tiles = jnp.maximum(self.team.tiles, 1)  # who has no items may ask for one all the same
        first_sharer = lax.div((tile + 1) * self.team.sharers - 1, tiles)
        piece = jnp.int32(0) if self.phase.whole else self._index - first_sharer
        return Item(row_tile, begin - tile, end - begin, piece)

    def _edge(self, index: jax.Array) -> jax.Array:
        """Where the share of one of the split's programs begins, and that of the one before ends."""
        unit = self.team.k_tiles if self.phase.whole else jnp.int32(1)
        units = lax.div(self.team.tiles, unit) * jnp.minimum(index, self.team.sharers)
        return lax.div(units, self.team.sharers) * unit

    def rows(self, row_tile: jax.Array) -> Rows:
        """Of one of the team's row tiles."""
        numbers, phase, found = self.numbers, self.phase, None
        of_team = [jnp.int32(0)] * len(phase.teams)
        for i, (group, tiles_before) in enumerate(zip(phase.layers[0], phase.tile_starts, strict=False)):
            team = phase.team_of(i)
            begin = of_team[team]
            within = (row_tile - begin) * TILE_ROWS
            own = Rows(jnp.int32(group.weight), numbers[f"row_start {i}"] + within, tiles_before * TILE_ROWS + within)
            here = (self.team.number == team) & (row_tile >= begin)
            found = own if found is None else _choose(here, own, found)
            of_team[team] = begin + numbers[f"row_tiles {i}"]
        assert found is not None
        return found

    def _team(self, number: int) -> Team:
        fields = ("start", "sharers", "tiles", "k_tiles", "x_start", "k")
        return Team(jnp.int32(number), *(self.numbers[f"{field} {number}"] for field in fields))


class AttentionItems:
    """A program's items of an attention in one layer: ``count`` of them. ``window`` is the layer's, 0 for none."""

    def __init__(self, place: Place, attention: Attention):
        self._attention, self._programs = attention, place.launch.plan.programs
        self.window = _numbers(place)["window"]
        self._first = turn_of(place)
        self.count = lax.div(attention.items - self._first + self._programs - 1, self._programs)

    def part(self, i: jax.Array) -> Part:
        """The i-th item."""
        item = self._first + i * self._programs
        head, kv_heads = lax.div(item, self._attention.parts), self._attention.kv_heads
        return Part(lax.div(head, kv_heads), lax.rem(head, kv_heads), lax.rem(item, self._attention.parts))


def _numbers(place: Place) -> dict[str, jax.Array]:
    """Of a step in its layer, by name."""
    found = place.launch.plan.numbers.of_steps[place.step]
    return {name: place.launch.number(values, place.layer) for name, values in found.items()}


def turn_of(place: Place) -> jax.Array:
    """Number of this program counted from the one that a step begins with."""
    plan = place.launch.plan
    begin = place.launch.number(plan.first_programs[place.step], place.layer)
    return lax.rem(lax.axis_index("program") + plan.programs - begin, plan.programs)


def _choose[T: (Team, Rows)](condition: jax.Array, a: T, b: T) -> T:
    fields = [field.name for field in dataclasses.fields(a)]
    return type(a)(*(jnp.where(condition, getattr(a, name), getattr(b, name)) for name in fields))
