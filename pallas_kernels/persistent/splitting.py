"""How the contraction axes of a launch's phases are divided, by what that costs.

With more splits a program reads less of its input, and whoever reads what the phase puts out has more partial sums to add up; with
row tiles that stay whole there are fewer of those, and shares are less alike. What is best for a phase depends on the others.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from pallas_kernels.persistent.sources import Output
from pallas_kernels.persistent.steps import CHUNK, THREADS, TILE_K, Attention, Collect, Keep, Phase, Step
from pallas_kernels.persistent.tuning import Tuning

_SPLITS = (1, 2, 4, 8)
_SWEEPS = 8
_WORDS_A_KILOBYTE = 256


def split_by_cost(steps: Sequence[Step], in_layer: int, programs: int, batch: int, tuning: Tuning) -> list[Step]:
    """The steps with splits, and row tiles whole or not, so that a layer costs least; begins with what they have.

    Args:
      steps: of a layer, the first ``in_layer``, then of the head.
      in_layer: their number.
      programs, batch: of the launch.
      tuning: says what a kilobyte of words costs, in tiles.
    """
    costs = Costs(steps, in_layer, programs, batch, tuning)
    for _ in range(_SWEEPS):
        before = list(costs.steps)
        for number, step in enumerate(before):
            if isinstance(step, Phase):
                costs.improve(number)
        if costs.steps == before:
            break
    return [_divided_like(step, found) for step, found in zip(steps, costs.steps, strict=True)]


def _divided_like(step: Step, other: Step) -> Step:
    if not isinstance(step, Phase):
        return step
    assert isinstance(other, Phase)
    return dataclasses.replace(step, splits=other.splits, whole=other.whole, pieces=other.pieces)


class Costs:
    """What steps cost as they are divided so far; see `split_by_cost`. ``steps`` have layers that are alike but once."""

    def __init__(self, steps: Sequence[Step], in_layer: int, programs: int, batch: int, tuning: Tuning):
        self.in_layer, self.programs, self.batch, self.tuning = in_layer, programs, batch, tuning
        self._alike = [Counter(step.layers) if isinstance(step, Phase) else Counter() for step in steps]
        self._layers = max(alike.total() for alike in self._alike)
        self.steps: list[Step] = [
            dataclasses.replace(step, layers=tuple(alike)) if isinstance(step, Phase) else step
            for step, alike in zip(steps, self._alike, strict=True)
        ]
        self._kept: dict[tuple[str, int, int, bool], float] = {}

    def improve(self, number: int) -> None:
        """Divides a phase as costs least while the others stay as they are."""
        was, best = self.steps[number], None
        assert isinstance(was, Phase)
        for phase in self._ways(was):
            self.steps[number] = phase
            cost = self.whole()
            if best is None or cost < best[0] - 1e-9:
                best = cost, phase
        assert best is not None
        self.steps[number] = best[1]

    def whole(self) -> float:
        """What all steps of a layer cost, and the head's share, in tiles."""
        return sum(
            (1 if number < self.in_layer else 1 / self._layers)
            * (self.longest(number) + self.tuning.kilobyte_tiles * self.words(number) / _WORDS_A_KILOBYTE)
            for number in range(len(self.steps))
        )

    def longest(self, number: int) -> float:
        """The longest share of a step's tiles, the mean over layers."""
        step = self.steps[number]
        if not isinstance(step, Phase):
            return 0.0
        return self._mean("longest", number, step, lambda layer: max(step.work(layer, self.programs)))

    def words(self, number: int) -> float:
        """That a program reads for a step."""
        step = self.steps[number]
        if isinstance(step, Collect):
            return self.batch * step.columns * self._parts(step.of) / self.programs
        if isinstance(step, Attention):
            items = max(1.0, step.items / self.programs)
            heads = zip((step.group, 1, 1), step.of, strict=True)
            return items * step.head_dim * sum(count * self._parts(output) for count, output in heads)
        source = step.source
        if isinstance(step, Keep):
            return step.items * THREADS * CHUNK * (1 + sum(map(self._parts, source.of))) / self.programs
        if source.kind == "attended":
            attention = self.steps[source.attention]
            assert isinstance(attention, Attention)
            of_column = attention.parts * 1.25  # with a logarithm for every four columns
        else:
            of_column = sum(map(self._parts, source.of)) + (source.kind in ("stream", "kept"))
        return self.batch * step.activation_tiles * TILE_K * of_column

    def _ways(self, phase: Phase) -> Iterator[Phase]:
        """The phase as it is, then otherwise, where there are programs and tiles enough for that."""
        yield phase
        shortest = min(group.k for groups in phase.layers for group in groups if group.rows)
        for splits in _SPLITS:
            if len(phase.teams) * splits > self.programs or -(-shortest // TILE_K) < splits:
                return
            for whole in (False, True):
                other = dataclasses.replace(phase, splits=splits, whole=whole)
                if other.activation_tiles <= self.tuning.largest_input:
                    yield dataclasses.replace(other, pieces=other.most_pieces(self.programs))

    def _parts(self, output: Output) -> float:
        """Partial sums of a column of an output, the mean over row tiles and layers."""
        found = 0.0
        for number, count in Counter(output.steps).items():
            phase = self.steps[number]
            assert isinstance(phase, Phase)
            found += count * self._mean("parts", number, phase, lambda layer, phase=phase: self._parts_in(phase, layer))
        return found / len(output.steps)

    def _parts_in(self, phase: Phase, layer: int) -> float:
        cuts = rows = 0
        for team, sharers in enumerate(phase.sharers(layer, self.programs)):
            tiles, k_tiles = phase.team_tiles(team, layer), phase.k_tiles(team, layer)
            rows += tiles // k_tiles
            cuts += 0 if phase.whole else sum(tiles * i // sharers % k_tiles != 0 for i in range(1, sharers))
        return phase.splits * (1 + cuts / rows) if rows else 0.0

    def _mean(self, what: str, number: int, phase: Phase, of_layer: Callable[[int], float]) -> float:
        """Over layers, found out once for each way to divide a phase."""
        key = what, number, phase.splits, phase.whole
        if key not in self._kept:
            alike = self._alike[number]
            total = sum(count * of_layer(layer) for layer, count in enumerate(alike.values()))
            self._kept[key] = total / alike.total()
        return self._kept[key]
