"""What a persistent launch computes, as data: its phases, the items they are cut into, and where their results lie.

Pure arithmetic on integers, used by the kernel as it is traced and by the tests that check the protocol.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

TILE_ROWS, TILE_K = 64, 128
"""A weight tile: 64 output rows by 128 of the contraction axis, 16 KiB of bfloat16. One of keys or values: 64 slots of a head."""

THREADS = 128
"""Of a warpgroup."""

CHUNK = 4
"""Columns that a thread reads at once: 16 bytes of words."""

HALF_TILE = 64
"""Columns of half a tile: what 128 bytes, the widest swizzle of a bulk copy, hold."""

HEAD_DIMS = (32, 64, 128)
"""That attention can have: halves that are a power of two of lanes, and no more than a tile has columns."""

TILE_BYTES = TILE_ROWS * TILE_K * 2
SHARED_MEMORY = 227 * 1024
MOST_LAYERS = 250
"""Epochs fit into eight bits."""

_SMALL = 4096  # bytes of shared memory for barriers and reductions
_LARGEST_INPUT = 12  # tiles; a phase with a larger input is split, so that more of the ring is left
MOST_PARTS = 16


@dataclasses.dataclass(frozen=True)
class Group:
    """Output rows that read one slice of the phase's input.

    Attributes:
      weight: number of the operand that holds them, [weight rows, k], among the operands of a layer.
      rows: of output.
      k: contraction length.
      row_start: first row in the operand.
      x_start: first column of the input.
    """

    weight: int
    rows: int
    k: int
    row_start: int = 0
    x_start: int = 0

    @property
    def row_tiles(self) -> int:
        return -(-self.rows // TILE_ROWS)


@dataclasses.dataclass(frozen=True)
class Source:
    """What the input of a phase is made of.

    Attributes:
      kind: "stream" the residual stream, normed; "sum" the output of a phase; "gated" its second half times the activation of its
        first; "attended" the output of an attention.
      of: that phase; of a stream the one whose output is added to it.
      stream: of a stream, the phase that had it last.
      behind: 1 if those two are of the layer before.
      scaled: the phase whose norm is still to be divided by, if ``of`` is a product of a normed input that was split.
      half: columns from a gate to what it gates.
      scale: number of the operand with the norm's scale, of a stream.
    """

    kind: str
    of: int
    stream: int = 0
    behind: int = 0
    scaled: int | None = None
    half: int = 0
    scale: int = 0


@dataclasses.dataclass(frozen=True)
class Phase:
    """One product. ``splits`` programs share a row tile, each over its part of the contraction axis.

    ``layers`` holds its groups in every layer, which differ in sizes alone; the head has one. Programs divide into teams, one for
    each slice of the input that is read, so that no program needs more than a part of one slice.
    """

    name: str
    layers: tuple[tuple[Group, ...], ...]
    source: Source
    splits: int = 1

    @functools.cached_property
    def teams(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of the groups that read the same slice in every layer."""
        count = range(len(self.layers[0]))
        reads = [tuple((groups[i].x_start, groups[i].k) for groups in self.layers) for i in count]
        return tuple(tuple(i for i in count if reads[i] == read) for read in dict.fromkeys(reads))

    def row_tiles(self, layer: int) -> int:
        return sum(group.row_tiles for group in self.layers[layer])

    def team_tiles(self, team: int, layer: int) -> int:
        """Row tiles of a team."""
        return sum(self.layers[layer][i].row_tiles for i in self.teams[team])

    def k_tiles(self, team: int, layer: int) -> int:
        """Of a team's items."""
        return -(-self.layers[layer][self.teams[team][0]].k // (TILE_K * self.splits))

    def team_programs(self, layer: int, programs: int) -> tuple[int, ...]:
        """How many programs each team has: a multiple of the splits, more where the slowest of them has most to do."""
        sizes = [self.splits] * len(self.teams)
        work = [(self.team_tiles(t, layer) * self.splits, self.k_tiles(t, layer)) for t in range(len(self.teams))]
        for _ in range(sum(sizes), programs, self.splits):
            slowest = max(
                range(len(sizes)), key=lambda t: (-(-work[t][0] // sizes[t]) * work[t][1], work[t][0] / sizes[t])
            )
            sizes[slowest] += self.splits
        return tuple(sizes)

    @functools.cached_property
    def padded_rows(self) -> int:
        """Columns of an output array, of the layer that has most: every group begins at a whole tile."""
        return max(self.row_tiles(layer) for layer in range(len(self.layers))) * TILE_ROWS

    def items(self, layer: int) -> int:
        return self.row_tiles(layer) * self.splits

    @functools.cached_property
    def activation_tiles(self) -> int:
        """Of 8 sequences by 128 columns: the largest input that a program holds."""
        return max(self.k_tiles(team, layer) for team in range(len(self.teams)) for layer in range(len(self.layers)))


@dataclasses.dataclass(frozen=True)
class Collect:
    """The end: sums of a phase's partial sums as the launch's output, float32 [batch, columns]. All programs share the columns.

    ``scaled`` is as of `Source`.
    """

    name: str
    of: int
    columns: int
    scaled: int | None
    activation_tiles: int = 0

    def items(self, layer: int) -> int:
        del layer
        return 0


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention of one new token over a cache. An item is a sequence's kv head and one of ``parts`` of its positions.

    Attributes:
      head_dim: columns of a head.
      windows: of each layer, 0 for none.
      of: the phase whose output holds q, k and v; ``columns`` is where they begin in it.
      scaled: as of `Source`.
      keys, values: numbers of the operands with the cache.
      norms, biases: numbers of operands, of q and k, and of q, k and v; None if there are none.
    """

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    parts: int
    windows: tuple[int, ...]
    of: int
    columns: tuple[int, int, int]
    scaled: int | None
    keys: int
    values: int
    norms: tuple[int, int] | None
    biases: tuple[int, int, int] | None
    batch: int

    @property
    def group(self) -> int:
        """Heads that read one kv head."""
        return self.heads // self.kv_heads

    def items(self, layer: int) -> int:
        del layer
        return self.batch * self.kv_heads * self.parts

    activation_tiles: int = 2  # queries, weights of the softmax


Step = Phase | Attention | Collect


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
    """

    layers: int
    steps: tuple[Step, ...]
    in_layer: int
    batch: int
    programs: int
    width: int
    slots: int
    operands: int

    @property
    def activation_tiles(self) -> int:
        return max(step.activation_tiles for step in self.steps)

    @property
    def stages(self) -> int:
        """Weight tiles that fit beside the largest input."""
        return (SHARED_MEMORY - _SMALL - self.activation_tiles * 8 * TILE_K * 2) // TILE_BYTES

    @functools.cached_property
    def first_items(self) -> tuple[tuple[int, ...], ...]:
        """Of every step, and each layer that it has: the program that takes its first item; the next program takes the next.

        Each begins with the program after the one that took the last item before, so that no program gets more than others.
        """
        found: list[list[int]] = [[] for _ in self.steps]
        total = 0
        for number, layer in self.in_order():
            found[number].append(total % self.programs)
            total += self.steps[number].items(layer)
        return tuple(map(tuple, found))

    def in_order(self) -> Iterator[tuple[int, int]]:
        """(step, layer) as they follow each other; the head's layer is its own 0."""
        for layer in range(self.layers):
            yield from ((number, layer) for number in range(self.in_layer))
        yield from ((number, 0) for number in range(self.in_layer, len(self.steps)))

    @functools.cached_property
    def _arrays(self) -> dict[tuple[str, int], tuple[int, int]]:
        """(kind, step) -> first word and size of its arrays: those of a layer from 0 on, those of the head behind both layers'."""
        found: dict[tuple[str, int], tuple[int, int]] = {}
        end = 0
        for number in range(len(self.steps)):
            if number == self.in_layer:
                end *= 2
            for kind, size in self._sizes(number).items():
                found[kind, number] = end, size
                end += -(-size // CHUNK) * CHUNK
        found["all", -1] = 0, end
        return found

    def _sizes(self, number: int) -> dict[str, int]:
        step = self.steps[number]
        if isinstance(step, Collect):
            return {}
        if isinstance(step, Attention):
            heads = step.parts * self.batch * step.heads
            return {"sums": heads * step.head_dim, "weights": heads}
        found = {"sums": step.splits * self.batch * step.padded_rows}
        if step.source.kind == "stream":
            found |= {"squares": self.batch * step.splits, "stream": self.batch * self.width}
        return found

    def offset(self, kind: str, step: int) -> int:
        """First word of one of a step's arrays: its partial "sums" [splits, batch, padded rows] or, of an attention, [parts, batch,
        heads * head_dim], and log-"weights" of the parts [parts, batch, heads]; of a stream its "squares" [batch, splits] and the
        "stream" itself [batch, width]."""
        return self._arrays[kind, step][0]

    @functools.cached_property
    def layer_words(self) -> int:
        """Words of a layer. Layers take turns in two such arrays, behind which those of the head lie."""
        sizes = [size for number in range(self.in_layer) for size in self._sizes(number).values()]
        return sum(-(-size // CHUNK) * CHUNK for size in sizes)

    @property
    def words(self) -> int:
        """In all."""
        return self._arrays["all", -1][1]

    @staticmethod
    def epoch(layer: int) -> int:
        """What the words of a layer are marked with: never 0, which memory is cleared to. Layer -1 is the embedding."""
        return layer + 2

    def problems(self) -> str | None:
        """Why the protocol cannot run this, or None."""
        phases = [step for step in self.steps if isinstance(step, Phase)]
        if any(self.programs % phase.splits for phase in phases):
            return "splits that do not divide the number of programs: a program would need several parts of an input"
        if any(phase.source.kind == "stream" and len(phase.teams) > 1 for phase in phases):
            return "parts of the residual stream, which nobody could publish whole"
        if any(self.programs < len(phase.teams) * phase.splits for phase in phases):
            return "fewer programs than slices of an input"
        groups = [group for phase in phases for groups in phase.layers for group in groups]
        if any(group.x_start % CHUNK or group.k % 8 for group in groups):
            return "a contraction axis that is no multiple of 8, or that begins at no multiple of 4"
        if self.layers > MOST_LAYERS:
            return f"more than {MOST_LAYERS} layers"
        if self.stages < 4:
            return f"inputs of {self.activation_tiles} tiles, which leave no shared memory for weights"
        return None


def splits_for(rows: int, k: int, programs: int) -> int:
    """A power of two that gives every program an item, as long as items stay four tiles long, and that keeps inputs small."""
    tiles, k_tiles = -(-rows // TILE_ROWS), -(-k // TILE_K)
    found = 1
    for splits in itertools.takewhile(lambda s: k_tiles >= 4 * s, (2, 4, 8)):
        if tiles * found < programs:
            found = splits
    while -(-k_tiles // found) > _LARGEST_INPUT and found < 8:
        found *= 2
    return found


def parts_for(batch: int, kv_heads: int, programs: int) -> int:
    """A power of two: parts of a sequence's positions that give every program an item of attention."""
    found = 1
    while found < MOST_PARTS and 2 * found * batch * kv_heads <= programs:
        found *= 2
    return found
