"""What a persistent segment computes, as data: its phases, the items they are cut into, and where their results lie.

Pure arithmetic on integers, used by the kernel as it is traced and by the tests that check the protocol.
"""

import dataclasses
import itertools

TILE_ROWS, TILE_K = 64, 128
"""A weight tile: 64 output rows by 128 of the contraction axis, 16 KiB of bfloat16."""

TILE_BYTES = TILE_ROWS * TILE_K * 2
SHARED_MEMORY = 227 * 1024
_SMALL = 2048  # bytes of shared memory for barriers and reductions
_WORDS_AT_ONCE = 4  # words are read 16 bytes at a time, so that every array of them begins at such a boundary


@dataclasses.dataclass(frozen=True)
class Group:
    """Output rows that read one slice of the phase's input.

    Attributes:
      weight: number of the operand that holds them, [weight rows, k].
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
      kind: "plain" an operand as it is; "stream" the residual stream, an operand plus the outputs of the phases ``of``, normed;
        "sum" the output of the phase ``of[0]``; "gated" the same, its second half times the activation of its first.
      of: phases whose partial sums are added up.
      scaled: the phase whose norm is still to be divided by, if the outputs summed are of one that was normed and split.
      half: columns from a gate to what it gates.
      scale: number of the operand with the norm's scale, of a stream.
    """

    kind: str
    of: tuple[int, ...] = ()
    scaled: int | None = None
    half: int = 0
    scale: int | None = None


@dataclasses.dataclass(frozen=True)
class Phase:
    """One product. ``splits`` programs share a row tile, each over its part of the contraction axis.

    ``plain`` outputs leave the launch as they are, one array a group; others are words for later phases.
    """

    name: str
    groups: tuple[Group, ...]
    source: Source
    splits: int = 1
    plain: bool = False

    @property
    def row_tiles(self) -> int:
        return sum(group.row_tiles for group in self.groups)

    @property
    def padded_rows(self) -> int:
        """Columns of an output array: every group begins at a whole tile."""
        return self.row_tiles * TILE_ROWS

    @property
    def items(self) -> int:
        return self.row_tiles * self.splits

    @property
    def k_tiles(self) -> int:
        """Of an item. Beyond the end of a shorter group its tiles are zeros, which cost no memory traffic."""
        return max(-(-group.k // (TILE_K * self.splits)) for group in self.groups)

    @property
    def slices(self) -> tuple[tuple[int, int], ...]:
        """(x_start, k) of the distinct input slices."""
        return tuple(dict.fromkeys((group.x_start, group.k) for group in self.groups))

    def slice_of(self, group: Group) -> int:
        """Number of the slice that a group reads."""
        return self.slices.index((group.x_start, group.k))


@dataclasses.dataclass(frozen=True)
class Segment:
    """Phases in the order in which they depend on each other, for a number of sequences and of resident programs.

    ``width`` is that of the residual stream.
    """

    phases: tuple[Phase, ...]
    batch: int
    programs: int
    width: int

    @property
    def activation_tiles(self) -> int:
        """Of 8 sequences by 128 columns: the largest input that a program holds."""
        return max(len(phase.slices) * phase.k_tiles for phase in self.phases)

    @property
    def stages(self) -> int:
        """Weight tiles that fit beside it."""
        return (SHARED_MEMORY - _SMALL - self.activation_tiles * 8 * TILE_K * 2) // TILE_BYTES

    @property
    def streams(self) -> tuple[int, ...]:
        """Phases that begin with the residual stream."""
        return tuple(j for j, phase in enumerate(self.phases) if phase.source.kind == "stream")

    def first_item(self, phase: int, program: int) -> int:
        """A program's first item of a phase; the others follow at a distance of `programs`. Each phase begins with the program
        after the one that took the last item of the phase before."""
        return (program - sum(p.items for p in self.phases[:phase])) % self.programs

    def word_offset(self, phase: int) -> int:
        """First word of a phase's partial sums [splits, batch, padded rows]."""
        return sum(self._partial_words(p) for p in self.phases[:phase])

    def square_offset(self, phase: int) -> int:
        """First word of a stream's sums of squares [batch, splits]; they lie behind all partial sums."""
        sizes = (self._square_words(p) for p in self.phases[:phase])
        return self.word_offset(len(self.phases)) + sum(sizes)

    @property
    def words(self) -> int:
        """In all."""
        return self.square_offset(len(self.phases))

    def problems(self) -> str | None:
        """Why the protocol cannot run this segment, or None."""
        if any(self.programs % phase.splits for phase in self.phases):
            return "splits that do not divide the number of programs: a program would need several parts of an input"
        if any(phase.plain and phase.splits > 1 for phase in self.phases):
            return "an output that leaves the launch in parts"
        if any(group.x_start % _WORDS_AT_ONCE or group.k % 8 for phase in self.phases for group in phase.groups):
            return "a contraction axis that is no multiple of 8, or that begins at no multiple of 4"
        if any(j >= number for number, p in enumerate(self.phases) for j in p.source.of):
            return "a phase that depends on one that comes later"
        if self.stages < 4:
            return f"inputs of {self.activation_tiles} tiles, which leave no shared memory for weights"
        return None

    def _partial_words(self, phase: Phase) -> int:
        return 0 if phase.plain else phase.splits * self.batch * phase.padded_rows

    def _square_words(self, phase: Phase) -> int:
        if phase.source.kind != "stream":
            return 0
        return -(-self.batch * phase.splits // _WORDS_AT_ONCE) * _WORDS_AT_ONCE


def splits_for(rows: int, k: int, programs: int) -> int:
    """A power of two that gives every program an item, as long as items stay four tiles long."""
    tiles, k_tiles = -(-rows // TILE_ROWS), -(-k // TILE_K)
    found = 1
    for splits in itertools.takewhile(lambda s: k_tiles >= 4 * s, (2, 4, 8)):
        if tiles * found < programs:
            found = splits
    return found
