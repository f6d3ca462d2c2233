"""What a persistent launch computes, as data: the order of its steps, who takes which items, and where their results lie.

Arithmetic on integers, used by the kernel as it is traced and by the tests that check the protocol.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from pallas_kernels.persistent.numbers import Numbers, outputs_of
from pallas_kernels.persistent.sources import Output
from pallas_kernels.persistent.steps import (
    CHUNK,
    HEADS_BYTES,
    THREADS,
    TILE_BYTES,
    TILE_K,
    TILE_ROWS,
    Attention,
    Collect,
    Keep,
    Phase,
    Step,
)
from pallas_kernels.persistent.tuning import Tuning
from pallas_kernels.rounding import power_of_two

SHARED_MEMORY = 227 * 1024
MOST_LAYERS = 125
"""Twice as many epochs, with those of the embedding and the head, fit into eight bits."""

_UNIT = 1024  # bytes of shared memory that an array takes a multiple of
_SMALL = 3 * _UNIT  # for barriers and reductions


@dataclasses.dataclass(frozen=True)
class Plan:
    """Phases of a layer in the order in which they depend on each other, then those of the head.

    Attributes:
      layers: their number.
      steps: phases of a layer, then of the head; the first ``in_layer`` are of a layer.
      batch: sequences.
      programs: that are resident.
      width: of the residual stream.
      slots: of the cache.
      operands: of a layer; those of the head follow all layers'.
      tuning: sizes.
    """

    layers: int
    steps: tuple[Step, ...]
    in_layer: int
    batch: int
    programs: int
    width: int
    slots: int
    operands: int
    tuning: Tuning

    @property
    def activation_tiles(self) -> int:
        return max(step.activation_tiles for step in self.steps if isinstance(step, Phase))

    @property
    def input_rows(self) -> int:
        """Of an input: as many as sequences, or the next power of two."""
        return power_of_two(self.batch)

    @property
    def input_bytes(self) -> int:
        """Of the largest input. Products take eight rows; those that there are not are read from what follows, and mean nothing."""
        return self.activation_tiles * TILE_K * 2 * self.input_rows

    @property
    def stages(self) -> int:
        """Weight tiles that fit beside that, and an attention's queries and weights."""
        inputs = -(-self.input_bytes // _UNIT) * _UNIT + HEADS_BYTES
        return (SHARED_MEMORY - _SMALL - inputs) // TILE_BYTES

    @functools.cached_property
    def first_programs(self) -> tuple[tuple[int, ...], ...]:
        """Of every step, and each layer that it has: the program that it begins with, for which its work counts from.

        So chosen that who has had most gets least: what is over after sharing out would otherwise go to the same programs always.
        """
        found: list[list[int]] = [[] for _ in self.steps]
        turns = (
            np.arange(self.programs) - np.arange(self.programs)[:, None]
        ) % self.programs  # of a program, by the first
        load = np.zeros(self.programs, np.int64)
        for number, layer in self.in_order():
            work = np.array(self.steps[number].work(layer, self.programs))[turns]
            first = int((work @ load).argmin())
            load += work[first]
            found[number].append(first)
        return tuple(map(tuple, found))

    def in_order(self) -> Iterator[tuple[int, int]]:
        """(step, layer) as they follow each other; the head's layer is its own 0."""
        for layer in range(self.layers):
            yield from ((number, layer) for number in range(self.in_layer))
        yield from ((number, 0) for number in range(self.in_layer, len(self.steps)))

    @functools.cached_property
    def _offsets(self) -> dict[tuple[str, int], int]:
        """(kind, step) -> first word: arrays of a layer from 0 on, those of the head behind both layers'."""
        found, end = {}, 0
        for number in range(len(self.steps)):
            end = 2 * self.layer_words if number == self.in_layer else end
            for kind, size in self._sizes(number).items():
                found[kind, number], end = end, end + size
        return found

    def _sizes(self, number: int) -> dict[str, int]:
        """Words of a step's arrays by kind, each a whole number of what is read at once."""
        step, found = self.steps[number], {}
        if isinstance(step, Collect):
            return {}
        if isinstance(step, Attention):
            heads = step.parts * self.batch * step.heads
            found = {"sums": heads * step.head_dim, "weights": heads}
        elif isinstance(step, Phase):
            found = {"sums": step.parts * self.batch * step.padded_rows}
        if not isinstance(step, Attention) and step.source.kind == "stream":
            found |= {"squares": self.batch * self.squares(number), "stream": self.batch * self.width}
        return {kind: -(-size // CHUNK) * CHUNK for kind, size in found.items()}

    def offset(self, kind: str, step: int) -> int:
        """First word of one of a step's arrays.

        Its partial "sums" [splits, pieces, batch, padded rows] or, of an attention, [parts, batch, heads * head_dim], and
        log-"weights" of the parts [batch, heads, parts]; of a stream its "squares" [batch, splits] and the "stream" itself
        [batch, width].
        """
        return self._offsets[kind, step]

    @functools.cached_property
    def layer_words(self) -> int:
        """Words of a layer. Layers take turns in two such arrays, behind which those of the head lie."""
        return self._words_of(range(self.in_layer))

    @property
    def words(self) -> int:
        """In all."""
        return 2 * self.layer_words + self._words_of(range(self.in_layer, len(self.steps)))

    @property
    def kept_integers(self) -> int:
        """That steps hand on: the words, and behind them, for every thread that waits for any, whether the next step is odd."""
        return self.words + self.programs * THREADS * self.tuning.readers

    def _words_of(self, steps: range) -> int:
        return sum(size for number in steps for size in self._sizes(number).values())

    @functools.cached_property
    def numbers(self) -> Numbers:
        """What programs must know of each layer."""
        first_word = functools.partial(self.offset, "sums")
        return Numbers(self.steps, self.programs, self.layers, self.first_programs, first_word)

    def normed_by(self, output: Output) -> int | None:
        """The phase by whose norm an output is still to be divided, in the layers in which it is of that phase; None if none is.

        Such a phase is a product of a normed input that was split: nobody had the divisor yet.
        """
        first, phase = output.phases[0], self.steps[output.phases[0]]
        if not isinstance(phase, Phase):
            return None
        return first if phase.source.kind == "stream" else phase.source.divided_by

    def squares(self, step: int) -> int:
        """Sums of squares that a step leaves of each sequence's stream, for parts of its columns."""
        found = self.steps[step]
        return found.parts if isinstance(found, Keep) else self.phase(step).splits

    def phase(self, step: int) -> Phase:
        """A step that is a phase."""
        found = self.steps[step]
        assert isinstance(found, Phase)
        return found

    @staticmethod
    def epoch(layer: Any, odd: Any = 0) -> Any:
        """What the words of a layer are marked with, in a step that is ``odd``, 1, or even, 0. Layer -1 is the embedding.

        It is never 0, which memory is cleared to before the first step. From step to step only the lowest bit changes, so that what
        words say changes as little as can be.
        """
        return 2 * (layer + 2) + odd

    def problems(self) -> str | None:
        """Why the protocol cannot run this, or None."""
        phases = [step for step in self.steps if isinstance(step, Phase)]
        if any(phase.source.kind == "stream" and len(phase.teams) > 1 for phase in phases):
            return "parts of the residual stream, which nobody could publish whole"
        if any(self.programs < len(phase.teams) * phase.splits for phase in phases):
            return "fewer programs than slices of an input"
        groups = [group for phase in phases for groups in phase.layers for group in groups]
        starts = {start for step in self.steps for output in outputs_of(step) for start in output.starts}
        starts |= {group.x_start for group in groups}
        if any(start % CHUNK for start in starts) or any(group.k % 8 for group in groups):
            return "a contraction axis that is no multiple of 8, or that begins at no multiple of 4"
        if self.batch > 4 * self.tuning.readers:
            return f"{self.batch} sequences for {4 * self.tuning.readers} warps, each of which reads those of one"
        if self.layers > MOST_LAYERS:
            return f"more than {MOST_LAYERS} layers"
        if self.stages < 4:
            return f"inputs of {self.activation_tiles} tiles, which leave no shared memory for weights"
        return None


def splits_for(rows: int, k: int, programs: int, tuning: Tuning) -> int:
    """A power of two that gives every program an item, as long as items stay four tiles long, and that keeps inputs small."""
    tiles, k_tiles = -(-rows // TILE_ROWS), -(-k // TILE_K)
    found = 1
    for splits in itertools.takewhile(lambda s: k_tiles >= 4 * s, (2, 4, 8)):
        if tiles * found < programs:
            found = splits
    while -(-k_tiles // found) > tuning.largest_input and found < 8:
        found *= 2
    return found


def parts_for(batch: int, kv_heads: int, programs: int, tuning: Tuning) -> int:
    """A power of two: parts of a sequence's positions that give every program an item of attention."""
    found = 1
    while found < tuning.most_parts and 2 * found * batch * kv_heads <= programs:
        found *= 2
    return found
