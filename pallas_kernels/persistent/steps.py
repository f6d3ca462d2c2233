"""What a persistent launch is made of, as data: its steps, and the groups of rows they compute."""

import dataclasses
import functools
import itertools
import math

from pallas_kernels.persistent.sources import Output, Source

TILE_ROWS, TILE_K = 64, 128
"""A weight tile: 64 output rows by 128 of the contraction axis, 16 KiB of bfloat16. One of keys or values: 64 slots of a head."""

THREADS = 128
"""Of a warpgroup."""

CHUNK = 4
"""Columns that a thread reads at once: 16 bytes of words."""

HALF_TILE = 64
"""Columns of half a tile: what 128 bytes, the widest swizzle of a bulk copy, hold."""

MOST_PARTS = 16
"""Partial sums of columns that are read together: more words than these would have a thread wait for them one after the other."""

HEAD_DIMS = (32, 64, 128)
"""That attention can have: halves that are a power of two of lanes, and no more than a tile has columns."""

TILE_BYTES = TILE_ROWS * TILE_K * 2

HEADS = (2, 8, TILE_K)
"""What an attention multiplies with: queries and the softmax's weights, of up to eight heads, in shared memory."""

HEADS_BYTES = 2 * math.prod(HEADS)

KEEP_TILES = 3
"""That take as long as reading columns of the stream and writing them."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Output rows that read one slice of the phase's input.

    Attributes:
      weight: number of the operand that holds them, [weight rows, k], among the operands of a layer.
      rows: of output; none in a layer where they are done already, whose operand is then any.
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


def share(tiles: int, sharers: int, index: int) -> range:
    """The tiles of one of those who share them: as many as the others have, but for one."""
    return range(tiles * index // sharers, tiles * (index + 1) // sharers)


def sharer(tiles: int, sharers: int, tile: int) -> int:
    """Who has a tile."""
    return ((tile + 1) * sharers - 1) // tiles


def most_pieces(tiles: int, k_tiles: int, sharers: int) -> int:
    """Into how many pieces row tiles of ``k_tiles`` are divided by who share ``tiles`` of them."""
    begins = range(0, tiles, k_tiles)
    edges = ((sharer(tiles, sharers, begin), sharer(tiles, sharers, begin + k_tiles - 1)) for begin in begins)
    return max((last - first + 1 for first, last in edges), default=1)


@dataclasses.dataclass(frozen=True)
class Phase:
    """One product.

    Programs divide into teams, one for each slice of the input that is read, and the programs of a team into ``splits``, each with
    a part of the contraction axis, so that none needs more than a part of one slice; what is over is idle. The weight tiles
    of a split, row tile after row tile, are shared out evenly. Where a share ends within a row tile, the next program adds up the
    rest of it: the row tile has ``pieces``, whose sums are added by who reads them. Where shares are so long that a row tile more
    or less does not matter, row tiles stay ``whole``, which saves words.

    Attributes:
      name: of the projection, and which of its products.
      layers: its groups in every layer, which differ in sizes alone; the head has one.
      source: what its input is made of.
      splits: of the contraction axis.
      whole: whether no row tile is divided into pieces.
      pieces: the most that a row tile of a split has.
      most_parts: partial sums that a column should have, at the most.
    """

    name: str
    layers: tuple[tuple[Group, ...], ...]
    source: Source
    splits: int = 1
    whole: bool = False
    pieces: int = 1
    most_parts: int = MOST_PARTS

    @property
    def parts(self) -> int:
        """Partial sums that a column may have."""
        return self.splits * self.pieces

    @functools.cached_property
    def teams(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of the groups that read the same slice in every layer."""
        count = range(len(self.layers[0]))
        reads = [tuple((groups[i].x_start, groups[i].k) for groups in self.layers) for i in count]
        return tuple(tuple(i for i in count if reads[i] == read) for read in dict.fromkeys(reads))

    @functools.cached_property
    def tile_starts(self) -> tuple[int, ...]:
        """First row tile of each group in the output, the same in every layer; then the number of them all."""
        most = (max(groups[i].row_tiles for groups in self.layers) for i in range(len(self.layers[0])))
        return tuple(itertools.accumulate(most, initial=0))

    def team_tiles(self, team: int, layer: int) -> int:
        """Weight tiles of one of a team's splits."""
        return sum(self.layers[layer][i].row_tiles for i in self.teams[team]) * self.k_tiles(team, layer)

    def k_tiles(self, team: int, layer: int) -> int:
        """Weight tiles of a row tile of one of a team's splits."""
        return -(-self.layers[layer][self.teams[team][0]].k // (TILE_K * self.splits))

    @functools.cached_property
    def _found(self) -> dict[tuple[str, int, int], tuple[int, ...]]:
        """What `team_programs` and `sharers` have found, which are asked for often."""
        return {}

    def team_programs(self, layer: int, programs: int) -> tuple[int, ...]:
        """How many programs each team has: a multiple of the splits, more where each of them has most to do, none without rows."""
        key = "programs", layer, programs
        if key not in self._found:
            self._found[key] = self._divide(layer, programs)
        return self._found[key]

    def _divide(self, layer: int, programs: int) -> tuple[int, ...]:
        busy = [team for team in range(len(self.teams)) if self.team_tiles(team, layer)]
        sizes = [self.splits if team in busy else 0 for team in range(len(self.teams))]
        for _ in range((programs - sum(sizes)) // self.splits if busy else 0):
            busiest = max(busy, key=lambda t: self.team_tiles(t, layer) / sizes[t])
            sizes[busiest] += self.splits
        return tuple(sizes)

    def sharers(self, layer: int, programs: int) -> tuple[int, ...]:
        """How many programs share the tiles of a split, in each team; 0 in one without rows."""
        key = "sharers", layer, programs
        if key not in self._found:
            sizes = self.team_programs(layer, programs)
            self._found[key] = tuple(self._sharers(team, layer, size) for team, size in enumerate(sizes))
        return self._found[key]

    def _sharers(self, team: int, layer: int, size: int) -> int:
        """As many as there are, but for those without whom row tiles come in fewer pieces and no share is longer, and those with
        whom there would be too many pieces."""
        tiles, k_tiles, unit = self.team_tiles(team, layer), self.k_tiles(team, layer), self.unit(team, layer)
        found = min(size // self.splits, tiles // unit)
        if unit > 1 or not found:
            return found
        longest = -(-tiles // found)
        found = min(range(-(-tiles // longest), found + 1), key=lambda n: (most_pieces(tiles, k_tiles, n), -n))
        while found > 1 and most_pieces(tiles, k_tiles, found) * self.splits > self.most_parts:
            found -= 1
        return found

    def unit(self, team: int, layer: int) -> int:
        """Weight tiles that are not divided."""
        return self.k_tiles(team, layer) if self.whole else 1

    def share(self, team: int, layer: int, sharers: int, index: int) -> range:
        """Weight tiles of one of a split's programs."""
        unit = self.unit(team, layer)
        units = share(self.team_tiles(team, layer) // unit, sharers, index)
        return range(units.start * unit, units.stop * unit)

    def longer_if_whole(self, programs: int) -> float:
        """By how many tiles a layer's longest share grows, on average, if no row tile is divided."""
        whole = dataclasses.replace(self, whole=True)
        grown = [max(whole.work(i, programs)) - max(self.work(i, programs)) for i in range(len(self.layers))]
        return sum(grown) / len(grown)

    def row_tiles_each(self, programs: int) -> float:
        """Row tiles that a program has, where it has fewest."""
        return min(
            self.team_tiles(team, layer) / self.k_tiles(team, layer) / sharers
            for layer in range(len(self.layers))
            for team, sharers in enumerate(self.sharers(layer, programs))
            if sharers
        )

    def most_pieces(self, programs: int) -> int:
        """Into how many pieces the sharing out divides a row tile."""
        if self.whole:
            return 1
        return max(
            most_pieces(self.team_tiles(team, layer), self.k_tiles(team, layer), sharers)
            for layer in range(len(self.layers))
            for team, sharers in enumerate(self.sharers(layer, programs))
        )

    def work(self, layer: int, programs: int) -> list[int]:
        """Weight tiles that each program has, counted from the one that the phase begins with."""
        found = [0] * programs
        begin = 0
        for team, (size, sharers) in enumerate(
            zip(self.team_programs(layer, programs), self.sharers(layer, programs), strict=True)
        ):
            for index in range(sharers):
                mine = len(self.share(team, layer, sharers, index))
                at = begin + index * self.splits
                found[at : at + self.splits] = [mine] * self.splits
            begin += size
        return found

    def tile_shift(self, group: int, layer: int) -> int:
        """What to add to a row tile's number in the output to get its number among its team's, of the rows of a group."""
        team = self.teams[self.team_of(group)]
        return sum(self.layers[layer][i].row_tiles for i in team if i < group) - self.tile_starts[group]

    def team_of(self, group: int) -> int:
        """Number of the team that has a group."""
        (found,) = (number for number, team in enumerate(self.teams) if group in team)
        return found

    @property
    def padded_rows(self) -> int:
        """Columns of an output array: every group begins at a whole tile, where it does in the layer that has most."""
        return self.tile_starts[-1] * TILE_ROWS

    @functools.cached_property
    def activation_tiles(self) -> int:
        """Of 8 sequences by 128 columns: the largest input that a program holds."""
        return max(self.k_tiles(team, layer) for team in range(len(self.teams)) for layer in range(len(self.layers)))


@dataclasses.dataclass(frozen=True)
class Keep:
    """The residual stream with an output added to it, and its squares, as words: where no phase's input is the stream just then.

    An item is a sequence and one of ``parts`` of its columns: four for every thread.
    """

    name: str
    source: Source
    batch: int
    width: int

    @property
    def parts(self) -> int:
        return -(-self.width // (THREADS * CHUNK))

    @property
    def items(self) -> int:
        return self.batch * self.parts

    def work(self, layer: int, programs: int) -> list[int]:
        """In tiles that take as long."""
        del layer
        return [KEEP_TILES * -(-(self.items - turn) // programs) for turn in range(programs)]


@dataclasses.dataclass(frozen=True)
class Collect:
    """The end: an output, summed up, as the launch's, float32 [batch, columns]. All programs share the columns."""

    name: str
    of: Output
    columns: int

    def work(self, layer: int, programs: int) -> list[int]:
        """None that would come in tiles."""
        del layer
        return [0] * programs


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention of one new token over a cache. An item is a sequence's kv head and one of ``parts`` of its positions.

    Attributes:
      head_dim: columns of a head.
      windows: of each layer, 0 for none.
      of: the outputs q, k and v.
      keys, values: numbers of the operands with the cache.
      norms: numbers of the operands of q and k; None if there are none.
    """

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    parts: int
    windows: tuple[int, ...]
    of: tuple[Output, Output, Output]
    keys: int
    values: int
    norms: tuple[int, int] | None
    batch: int

    @property
    def group(self) -> int:
        """Heads that read one kv head."""
        return self.heads // self.kv_heads

    @property
    def items(self) -> int:
        return self.batch * self.kv_heads * self.parts

    def work(self, layer: int, programs: int) -> list[int]:
        """The same, at the least: a tile of keys and one of values for every item."""
        del layer
        return [2 * -(-(self.items - turn) // programs) for turn in range(programs)]


Step = Phase | Attention | Keep | Collect
