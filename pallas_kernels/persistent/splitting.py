"""How the contraction axes of a launch's phases are divided, by what that costs.

With more splits a program reads less of its input, and whoever reads what the phase puts out has more partial sums to add up; with
row tiles that stay whole there are fewer of those, and shares are less alike. What is best for a phase depends on the others.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Sequence

from pallas_kernels.persistent.sources import Output
from pallas_kernels.persistent.steps import TILE_K, Attention, Collect, Phase, Step
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
    costs = _Costs(list(steps), in_layer, programs, batch, tuning)
    for _ in range(_SWEEPS):
        before = list(costs.steps)
        for number, step in enumerate(before):
            if isinstance(step, Phase):
                costs.improve(number)
        if costs.steps == before:
            break
    return costs.steps


@dataclasses.dataclass
class _Costs:
    """Steps as they are so far; see `split_by_cost`."""

    steps: list[Step]
    in_layer: int
    programs: int
    batch: int
    tuning: Tuning

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
        layers = max(len(step.layers) for step in self.steps if isinstance(step, Phase))
        return sum(
            (1 if number < self.in_layer else 1 / layers)
            * (self._longest(step) + self.tuning.kilobyte_tiles * self._words(step) / _WORDS_A_KILOBYTE)
            for number, step in enumerate(self.steps)
        )

    def _ways(self, phase: Phase) -> Iterator[Phase]:
        """The phase as it is, then otherwise."""
        yield phase
        for splits in _SPLITS:
            for whole in (False, True):
                other = _divided(phase, splits, whole, self.programs)
                if other is not None and other != phase and other.activation_tiles <= self.tuning.largest_input:
                    yield other

    def _longest(self, step: Step) -> float:
        """The longest share of tiles, the mean over layers."""
        if not isinstance(step, Phase):
            return 0.0
        return sum(n * max(step.work(layer, self.programs)) for layer, n in _different(step)) / len(step.layers)

    def _words(self, step: Step) -> float:
        """That a program reads."""
        if isinstance(step, Collect):
            return self.batch * step.columns * self._parts(step.of) / self.programs
        if isinstance(step, Attention):
            items = max(1.0, step.items / self.programs)
            heads = zip((step.group, 1, 1), step.of, strict=True)
            return items * step.head_dim * sum(count * self._parts(output) for count, output in heads)
        source = step.source
        if source.kind == "attended":
            attention = self.steps[source.attention]
            assert isinstance(attention, Attention)
            of_column = attention.parts * 1.25  # with a logarithm for every four columns
        else:
            of_column = sum(map(self._parts, source.of)) + (source.kind == "stream")
        return self.batch * step.activation_tiles * TILE_K * of_column

    def _parts(self, output: Output) -> float:
        """Partial sums of a column of an output, the mean over layers."""
        found = 0.0
        for number, count in Counter(output.steps).items():
            phase = self.steps[number]
            assert isinstance(phase, Phase)
            found += count * _parts(phase, self.programs)
        return found / len(output.steps)


@functools.lru_cache(256)
def _divided(phase: Phase, splits: int, whole: bool, programs: int) -> Phase | None:
    """So divided; None if there are too few programs or tiles for that."""
    shortest = min(group.k for groups in phase.layers for group in groups if group.rows)
    if len(phase.teams) * splits > programs or -(-shortest // TILE_K) < splits:
        return None
    other = dataclasses.replace(phase, splits=splits, whole=whole)
    return dataclasses.replace(other, pieces=other.most_pieces(programs))


@functools.lru_cache(256)
def _different(phase: Phase) -> list[tuple[int, int]]:
    """(a layer, how many are like it)."""
    counts = Counter(phase.layers)
    return [(phase.layers.index(layer), count) for layer, count in counts.items()]


@functools.lru_cache(256)
def _parts(phase: Phase, programs: int) -> float:
    """Partial sums of a column, the mean over row tiles and layers."""
    found = 0.0
    for layer, count in _different(phase):
        cuts = rows = 0
        for team, sharers in enumerate(phase.sharers(layer, programs)):
            tiles, k_tiles = phase.team_tiles(team, layer), phase.k_tiles(team, layer)
            rows += tiles // k_tiles
            cuts += 0 if phase.whole else sum(tiles * i // sharers % k_tiles != 0 for i in range(1, sharers))
        found += count * phase.splits * (1 + cuts / rows if rows else 0)
    return found / len(phase.layers)
