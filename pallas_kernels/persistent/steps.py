"""What a persistent launch is made of, as data: its steps, the groups of rows they compute, what their inputs are."""

import dataclasses
import functools

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
