"""How a program of the persistent kernel gets the input of a phase: it waits for the words that make it up, and lays the result out
for the tensor cores.

A thread takes four columns of one sequence at a time, as many such chunks at once as its registers hold, so that their loads wait
together. What it finds is added up, divided by the norm's divisor where that is still to be done, and rounded to bfloat16.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.persistent import words as w
from pallas_kernels.persistent.plan import TILE_K, Phase, Segment
from pallas_kernels.persistent.words import Value

CHUNK = 4  # columns
WORDS_IN_REGISTERS = 64
ROOTS = 128  # byte of the small shared buffer where divisors lie, one a sequence; partial sums of squares lie before it


@dataclasses.dataclass(frozen=True)
class Inputs:
    """References of a launch: words, residual stream, plain input, norm scales by phase, and where the new stream goes."""

    words: Any
    stream: Any
    plain: Any
    scales: dict[int, Any]
    new_stream: Any

    def of(self, phase: int) -> dict[str, Any]:
        """Those that a phase may read or write, by name."""
        named = {
            "words": self.words,
            "stream": self.stream,
            "plain": self.plain,
            "scale": self.scales.get(phase),
            "new_stream": self.new_stream,
        }
        return {name: ref for name, ref in named.items() if ref is not None}


def fill(
    segment: Segment,
    number: int,
    eps: float,
    inputs: Inputs,
    activations: Any,
    small: Any,
    split: jax.Array,
    first: jax.Array,
) -> None:
    """Emits the loading of a phase's input for one split.

    Args:
      segment, number: the phase.
      eps: of the norms.
      inputs: references.
      activations: shared memory [tiles, 8, 128].
      small: shared memory for reductions, float32 [64].
      split: which part of the contraction axis.
      first: nonzero in the program that has the first row tile of this split; it publishes what all of them compute.
    """
    refs = inputs.of(number)
    types = [plgpu.RefType()] * len(refs) + [plgpu.RefType(w.TILED), plgpu.RefType(), w.SCALAR(()), w.SCALAR(())]

    @w.emitted(*types)
    def emit(context: Any, *arguments: Any) -> None:
        *bases, act, reduction, part, publishes = arguments
        named = {name: w.address(base) for name, base in zip(refs, bases, strict=True)}
        loader = _Loader(
            segment, number, eps, named, w.address(act), w.address(reduction), w.scalar(part), w.scalar(publishes)
        )
        loader.run()

    emit(*refs.values(), activations, small, split, first)


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Four columns of a sequence: whether the thread has one at all, whether the columns are real, and where they are."""

    mine: Value
    real: Value
    row: Value
    column: Value  # in the source
    offset: Value  # in shared memory


@dataclasses.dataclass
class _Loader:
    segment: Segment
    number: int
    eps: float
    base: dict[str, Value]
    activations: Value
    small: Value
    split: Value
    publishes: Value

    def __post_init__(self) -> None:
        self.phase: Phase = self.segment.phases[self.number]
        self.source = self.phase.source
        self.columns = self.phase.k_tiles * TILE_K  # of a slice
        self.thread = w.thread()
        self.publishing = w.below(w.integer(0), self.publishes)
        self.squares: list[Value] = []

    def run(self) -> None:
        w.meet()  # nobody multiplies the last input any more
        self.roots = None if self.source.scaled is None else self._divisors(self.source.scaled)
        self.squares = [w.number(0.0)] * self.segment.batch
        total = self.segment.batch * len(self.phase.slices) * self.columns // CHUNK
        rounds = -(-total // 128)
        together = max(1, WORDS_IN_REGISTERS // (CHUNK * max(1, self._sums)))
        for begin in range(0, rounds, together):
            chunks = [self._chunk(i, total) for i in range(begin, min(rounds, begin + together))]
            fixed = [self._fixed(chunk) for chunk in chunks]
            for chunk, known, parts in zip(chunks, fixed, self._wait(chunks), strict=True):
                values = self._combine(chunk, known, parts)
                w.store_activations(
                    self.activations, chunk.offset, [w.select(chunk.real, v, w.number(0.0)) for v in values]
                )
        if self.source.kind == "stream":
            self._publish_squares()

    @property
    def _sums(self) -> int:
        """Words that make up a column."""
        splits = sum(self.segment.phases[j].splits for j in self.source.of)
        return 2 * splits if self.source.kind == "gated" else splits

    def _chunk(self, index: int, total: int) -> _Chunk:
        """The thread's chunk in a round; threads beyond the end repeat the last one."""
        chunk = w.add(self.thread, w.integer(128 * index))
        mine, chunk = w.below(chunk, w.integer(total)), w.smaller(chunk, total - 1)
        per_slice = self.columns // CHUNK
        k = w.mul(w.remainder(chunk, per_slice), w.integer(CHUNK))
        row_and_slice = w.quotient(chunk, per_slice)
        row, slice_ = (f(row_and_slice, len(self.phase.slices)) for f in (w.quotient, w.remainder))
        start, width = (w.integer(n) for n in self.phase.slices[0])
        for number, (other_start, other_width) in enumerate(self.phase.slices[1:], 1):
            here = w.equal(slice_, w.integer(number))
            start = w.select(here, w.integer(other_start), start)
            width = w.select(here, w.integer(other_width), width)
        within = w.add(k, w.mul(self.split, w.integer(self.columns)))
        real = w.below(within, width)
        column = w.add(w.select(real, within, w.integer(0)), start)
        slice_start = w.mul(slice_, w.integer(self.columns * 16))
        return _Chunk(mine, real, row, column, w.activation_offset(k, row, slice_start))

    def _fixed(self, chunk: _Chunk) -> list[list[Value]]:
        """What was there before the launch: the plain input, or the residual stream and the norm's scale."""
        if self.source.kind == "plain":
            width = self.phase.groups[0].k
            return [w.load_bf16(self.base["plain"], self._element(chunk, width))]
        if self.source.kind == "stream":
            scale = w.load_bf16(self.base["scale"], w.mul(chunk.column, w.integer(2)))
            return [w.load_bf16(self.base["stream"], self._element(chunk, self.segment.width)), scale]
        return []

    def _element(self, chunk: _Chunk, width: int) -> Value:
        """Byte of a chunk in a bfloat16 array [batch, width]."""
        return w.mul(w.add(chunk.column, w.mul(chunk.row, w.integer(width))), w.integer(2))

    def _wait(self, chunks: list[_Chunk]) -> list[list[list[Value]]]:
        """For each chunk its sums of partial sums, once all are written: one list of four, two where there is a gate."""
        if not self.source.of:
            return [[] for _ in chunks]
        halves = (0, self.source.half) if self.source.kind == "gated" else (0,)

        def load() -> tuple[list[Value], list[Value]]:
            sums, words = [], []
            for chunk in chunks:
                for half in halves:
                    parts = [w.load_words(self.base["words"], at) for at in self._addresses(chunk, half)]
                    words += [word for part in parts for word in part]
                    sums += [functools.reduce(w.add_f, column) for column in zip(*map(w.floats, parts), strict=True)]
            return sums, words

        found = w.until_written(load, CHUNK * len(halves) * len(chunks))
        fours = [found[i : i + CHUNK] for i in range(0, len(found), CHUNK)]
        return [fours[i : i + len(halves)] for i in range(0, len(fours), len(halves))]

    def _addresses(self, chunk: _Chunk, half: int) -> list[Value]:
        """Bytes of a chunk's partial sums, of every phase and split that it is the sum of."""
        found = []
        for j in self.source.of:
            phase = self.segment.phases[j]
            column = w.add(chunk.column, w.mul(chunk.row, w.integer(phase.padded_rows)))
            for split in range(phase.splits):
                begin = self.segment.word_offset(j) + split * self.segment.batch * phase.padded_rows + half
                found.append(w.mul(w.add(column, w.integer(begin)), w.integer(4)))
        return found

    def _combine(self, chunk: _Chunk, known: list[list[Value]], parts: list[list[Value]]) -> list[Value]:
        if self.source.kind == "plain":
            return known[0]
        if self.source.kind == "stream":
            return self._stream(chunk, known, parts)
        if self.roots is not None:
            root = self._by_row(chunk.row, self.roots)
            parts = [[w.mul_f(v, root) for v in part] for part in parts]
        if self.source.kind == "gated":
            return [w.mul_f(w.silu(g), u) for g, u in zip(*parts, strict=True)]
        return parts[0]

    def _stream(self, chunk: _Chunk, known: list[list[Value]], parts: list[list[Value]]) -> list[Value]:
        """The residual stream times the norm's scale; its squares are added up, and it is kept if this is its last reader."""
        stream, scale = known
        values = [w.add_f(v, part) for v, part in zip(stream, parts[0], strict=True)] if parts else stream
        used = w.both(chunk.mine, chunk.real)
        if self.number == self.segment.streams[-1]:
            offset = self._element(chunk, self.segment.width)
            w.store_bf16(self.base["new_stream"], offset, values, w.both(used, self.publishing))
        square = functools.reduce(w.add_f, (w.mul_f(v, v) for v in values))
        for row, total in enumerate(self.squares):
            counts = w.both(used, w.equal(chunk.row, w.integer(row)))
            self.squares[row] = w.add_f(total, w.select(counts, square, w.number(0.0)))
        return [w.mul_f(v, s) for v, s in zip(values, scale, strict=True)]

    def _publish_squares(self) -> None:
        """Adds up the squares of all threads: a word for the phases that follow, and the divisor if all columns are here."""
        warp, lane = w.quotient(self.thread, 32), w.remainder(self.thread, 32)
        for row, square in enumerate(self.squares):
            at = w.add(w.integer(16 * row), w.mul(warp, w.integer(4)))
            w.store_shared(self.small, at, w.warp_sum(square), w.equal(lane, w.integer(0)))
        w.meet()
        alone = w.equal(self.thread, w.integer(0))
        for row in range(self.segment.batch):
            parts = [w.load_shared(self.small, w.integer(16 * row + 4 * i)) for i in range(4)]
            total = functools.reduce(w.add_f, parts)
            begin = self.segment.square_offset(self.number) + row * self.phase.splits
            at = w.mul(w.add(self.split, w.integer(begin)), w.integer(4))
            w.store_word(self.base["words"], at, total, w.both(alone, self.publishing))
            w.store_shared(self.small, w.integer(ROOTS + 4 * row), self._root(total), alone)

    def _divisors(self, scaled: int) -> list[Value]:
        """1 / root mean square of each sequence's stream in an earlier phase, from the sums of squares of its splits."""
        splits = self.segment.phases[scaled].splits
        begin = self.segment.square_offset(scaled)

        def load() -> tuple[list[Value], list[Value]]:
            numbers = range(begin, begin + self.segment.batch * splits)
            words = [w.load_word(self.base["words"], w.integer(4 * n)) for n in numbers]
            parts = w.floats(words)
            rows = [parts[i : i + splits] for i in range(0, len(parts), splits)]
            return [functools.reduce(w.add_f, row) for row in rows], words

        return [self._root(total) for total in w.until_written(load, self.segment.batch)]

    def _root(self, squares: Value) -> Value:
        mean = w.mul_f(squares, w.number(1.0 / self.segment.width))
        return w.inverse_root(w.add_f(mean, w.number(self.eps)))

    def _by_row(self, row: Value, values: list[Value]) -> Value:
        found = values[0]
        for number, value in enumerate(values[1:], 1):
            found = w.select(w.equal(row, w.integer(number)), value, found)
        return found
