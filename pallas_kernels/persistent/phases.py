"""Adds the phases of projections to a plan that is being built, and the operands that they name."""

import dataclasses
from collections.abc import Sequence

import jax

from pallas_kernels.persistent.plan import splits_for
from pallas_kernels.persistent.sources import Output, Source
from pallas_kernels.persistent.steps import MOST_PARTS, TILE_ROWS, Group, Phase, Step
from pallas_kernels.persistent.tuning import Tuning
from pallas_kernels.projection import PackedProjection

_SHORTEST = 8  # contraction axis that anything may have


@dataclasses.dataclass
class Phases:
    """Steps so far, to which phases are added, and the operands of every layer that they name by number.

    Attributes:
      programs: of the launch.
      tuning: sizes.
      operands: of each layer.
      steps: so far.
    """

    programs: int
    tuning: Tuning
    operands: list[list[jax.Array]]
    steps: list[Step] = dataclasses.field(default_factory=list)

    def operand(self, of_layers: Sequence[jax.Array]) -> int:
        """One more operand in every layer; gives its number."""
        for operands, array in zip(self.operands, of_layers, strict=True):
            operands.append(array)
        return len(self.operands[0]) - 1

    def project(
        self, name: str, packed: Sequence[PackedProjection], source: Source, together: int = 1
    ) -> tuple[Output, ...]:
        """Adds the phases of a projection, so many of whose members are read together; gives what its members put out.

        One phase if all members are dense in every layer. Else two: in a layer in which a member is dense it has no rows in the
        second, and is read from the first.
        """
        firsts = [p.first for p in packed]
        if all(up is None for p in packed for up in p.ups):
            first = self.operand(firsts)
            groups = [
                [
                    Group(first, width, p.first.shape[1], row_start=begin)
                    for begin, width in zip(p.starts, p.widths, strict=True)
                ]
                for p in packed
            ]
            return self._outputs(packed, [self._add(name, groups, source, together)])
        down = self.whole(f"{name} down", firsts, source, together)
        return self.second(name, packed, [down], together)[0]

    def whole(self, name: str, of_layers: Sequence[jax.Array], source: Source, together: int = 1) -> Output:
        """Adds a phase of a matrix for each layer, with all its rows; gives its output."""
        operand = self.operand(of_layers)
        step = self._add(name, [[Group(operand, *array.shape)] for array in of_layers], source, together)
        return self._output_of(step, 0)

    def second(
        self, name: str, packed: Sequence[PackedProjection], latents: Sequence[Output], together: int = 1,
        beside: Sequence[jax.Array] = (), divided_by: int | None = None,
    ) -> tuple[tuple[Output, ...], Output | None]:  # fmt: skip
        """Adds the phase of a projection's second factors, of the sum of ``latents``; the last of these has its dense members.

        Args:
          name, packed, together: as for `project`.
          latents: what its first factors put out.
          beside: of each layer, what is done in the same phase, of all latents; none if not given.
          divided_by: as `Source` has it.

        Returns:
          What its members put out, and what comes of ``beside``.
        """
        count = range(len(packed[0].ups))
        # A dense member names an operand all the same, of which it has no rows.
        ups = [self.operand([p.first if p.ups[i] is None else p.ups[i] for p in packed]) for i in count]  # pyright: ignore
        groups = [
            [
                Group(ups[i], 0, _SHORTEST)
                if p.ups[i] is None
                else Group(ups[i], p.d_outs[i], p.widths[i], 0, p.starts[i])
                for i in count
            ]
            for p in packed
        ]
        if beside:
            operand = self.operand(beside)
            groups = [[*of_layer, Group(operand, *array.shape)] for of_layer, array in zip(groups, beside, strict=True)]
        step = self._add(f"{name} up", groups, Source("sum", tuple(latents), divided_by=divided_by), together)
        found = self._outputs(packed, [latents[-1].steps[0], step])
        return found, self._output_of(step, len(count)) if beside else None

    def _output_of(self, step: int, group: int) -> Output:
        """What a group of a phase puts out, in all layers."""
        phase = self.phase(step)
        count, begin = len(phase.layers), TILE_ROWS * phase.tile_starts[group]
        return Output((step,) * count, (group,) * count, (begin,) * count)

    def _outputs(self, packed: Sequence[PackedProjection], phases: Sequence[int]) -> tuple[Output, ...]:
        """Of the members of a projection with these phases."""
        starts, found = [TILE_ROWS * tile for tile in self.phase(phases[-1]).tile_starts], []
        for i, bias in enumerate(packed[0].biases):
            lies = [
                (phases[0], 0, p.starts[i]) if len(phases) > 1 and p.ups[i] is None else (phases[-1], i, starts[i])
                for p in packed
            ]
            number = None if bias is None else self.operand([p.biases[i] for p in packed])  # pyright: ignore
            steps, groups, begins = zip(*lies, strict=True)
            found.append(Output(steps, groups, begins, number))
        return tuple(found)

    def _add(self, name: str, groups: Sequence[Sequence[Group]], source: Source, together: int) -> int:
        """Adds a phase. All programs read a part of its output, but where that is attention, which reads a few columns at most."""
        for_all = name not in ("qkv", "qkv up")
        phase = Phase(name, tuple(map(tuple, groups)), source, most_parts=MOST_PARTS // together)
        longest = max(group.k for layer in groups for group in layer)
        splits = splits_for(phase.padded_rows, longest, self.programs, self.tuning)
        phase = dataclasses.replace(phase, splits=splits)
        whole = phase.row_tiles_each(self.programs) >= self.tuning.whole_row_tiles
        whole |= phase.longer_if_whole(self.programs) <= (self.tuning.uneven_tiles if for_all else 0)
        phase = dataclasses.replace(phase, whole=whole)
        self.steps.append(dataclasses.replace(phase, pieces=phase.most_pieces(self.programs)))
        return len(self.steps) - 1

    def phase(self, step: int) -> Phase:
        """One of the phases so far."""
        found = self.steps[step]
        assert isinstance(found, Phase)
        return found
