"""What a program must know of each layer's steps and outputs: numbers, of which those that differ between layers make a table."""

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pallas_kernels.persistent.sources import Output
from pallas_kernels.persistent.steps import TILE_ROWS, Attention, Collect, Keep, Phase, Step

OfLayers = tuple[int, ...]
"""A number for each layer; those of the head have one."""


class Numbers:
    """Of a plan.

    Args:
      steps, programs, layers, first_programs: as `Plan` has them.
      first_word: of a step's partial sums.

    Attributes:
      of_steps: for every step its numbers by name: of every team what it is and has, of every group where its rows are.
    """

    def __init__(
        self, steps: Sequence[Step], programs: int, layers: int, first_programs: Sequence[OfLayers],
        first_word: Callable[[int], int],
    ):  # fmt: skip
        self._steps, self._layers, self._first_programs, self._first_word = steps, layers, first_programs, first_word
        self.of_steps = [_of_step(step, programs) for step in steps]
        self._of_outputs = {output: self._of_output(output) for step in steps for output in outputs_of(step)}

    def of_output(self, output: Output) -> dict[str, OfLayers]:
        """Where it lies, by name.

        "begin" is the word of its first column in the first sequence and part; "row" and "part" are words from one sequence and
        part to the next; "second" is 1 where it is of the later of its phases; "first tile" is its first row tile, counted among
        those of its team, which has "tiles" and "k_tiles" and as many "sharers".
        """
        return self._of_outputs[output]

    def _of_output(self, output: Output) -> dict[str, OfLayers]:
        found: dict[str, list[int]] = {}
        for layer, (step, group, start) in enumerate(zip(output.steps, output.groups, output.starts, strict=True)):
            phase, of_step = self._steps[step], self.of_steps[step]
            assert isinstance(phase, Phase)
            team = phase.team_of(group)
            here = {name: of_step[f"{name} {team}"][layer] for name in ("tiles", "k_tiles", "sharers")}
            here["shift"] = of_step[f"shift {group}"][layer]
            here |= {"begin": self._first_word(step) + start, "row": phase.padded_rows, "start": start}
            here["second"] = int(step != output.phases[0])
            for name, value in here.items():
                found.setdefault(name, []).append(value)
        if not any(start % TILE_ROWS for start in output.starts):
            # Then columns need not be counted from the output's begin to find their tile.
            starts = found.pop("start")
            found["shift"] = [shift + start // TILE_ROWS for shift, start in zip(found["shift"], starts, strict=True)]
            found["start"] = [0] * len(starts)
        return {name: tuple(values) for name, values in found.items()}

    @functools.cached_property
    def columns(self) -> dict[OfLayers, int]:
        """Those that differ from layer to layer, and their columns in the table that holds them."""
        found: dict[OfLayers, int] = {}
        for values in self._all():
            if len(set(values)) > 1:
                found.setdefault(values, len(found))
        return found

    def table(self) -> np.ndarray:
        """Those numbers, int32 [layers, columns]."""
        found = np.zeros((self._layers, max(1, len(self.columns))), np.int32)
        for values, column in self.columns.items():
            found[:, column] = values
        return found

    def _all(self) -> Iterator[OfLayers]:
        yield from self._first_programs
        for numbers in (*self.of_steps, *self._of_outputs.values()):
            yield from numbers.values()


def outputs_of(step: Step) -> tuple[Output, ...]:
    """What a step reads."""
    if isinstance(step, (Phase, Keep)):
        return step.source.of
    return step.of if isinstance(step, Attention) else (step.of,)


def _of_step(step: Step, programs: int) -> dict[str, OfLayers]:
    if isinstance(step, (Collect, Keep)):
        return {}
    if isinstance(step, Attention):
        return {"window": step.windows}
    layers, found = range(len(step.layers)), {}
    sizes = [step.team_programs(layer, programs) for layer in layers]
    sharers = [step.sharers(layer, programs) for layer in layers]
    for team, (first_group, *_) in enumerate(step.teams):
        found[f"tiles {team}"] = tuple(step.team_tiles(team, layer) for layer in layers)
        found[f"k_tiles {team}"] = tuple(step.k_tiles(team, layer) for layer in layers)
        # Where there are no tiles, nobody shares them; but programs divide by the number.
        found[f"sharers {team}"] = tuple(max(1, of_layer[team]) for of_layer in sharers)
        found[f"start {team}"] = tuple(sum(of_layer[:team]) for of_layer in sizes)
        for field in ("x_start", "k"):
            found[f"{field} {team}"] = tuple(getattr(groups[first_group], field) for groups in step.layers)
    for i in range(len(step.layers[0])):
        for field in ("row_tiles", "row_start"):
            found[f"{field} {i}"] = tuple(getattr(groups[i], field) for groups in step.layers)
        found[f"shift {i}"] = tuple(step.tile_shift(i, layer) for layer in layers)
    return found
