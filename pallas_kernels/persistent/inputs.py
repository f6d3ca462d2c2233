"""How a program of the persistent kernel gets the input of a phase: it waits for the words that make it up, and lays the result out
for the tensor cores.

A thread takes four columns of one sequence at a time, as many such chunks at once as its registers hold, so that their loads wait
together. What it finds is added up, divided by the norm's divisor where that is still to be done, and rounded to bfloat16.
"""

import dataclasses
from typing import Any

import jax

from pallas_kernels.persistent import code as w
from pallas_kernels.persistent import gates
from pallas_kernels.persistent.attended import read_attended
from pallas_kernels.persistent.code import Value
from pallas_kernels.persistent.columns import Columns, biased
from pallas_kernels.persistent.items import Team
from pallas_kernels.persistent.launch import Emitter, Place
from pallas_kernels.persistent.steps import CHUNK, THREADS, TILE_K, Attention, Phase
from pallas_kernels.persistent.stream import (
    keep_squares,
    publish_squares,
    read_stream,
    sum_of_squares,
    write_stream,
)
from pallas_kernels.persistent.words import Read, store_words

_WORDS_OF_VARYING = 96
"""That are waited for together, at the most, where what is told of an output by layer takes registers, too."""


def embed(place: Place, x: Any) -> None:
    """Publishes the embedding [batch, width] as the stream that the layer before the first, the place, would have left."""
    plan, source = place.launch.plan, place.launch.plan.phase(0).source
    (output,) = source.of
    added = plan.phase(output.steps[0])

    def body(e: Emitter, scalars: list[Value], refs: list[Value], arrays: Any) -> None:
        base, total = e.base(0), plan.batch * plan.width // CHUNK
        mine = w.add(w.mul(w.program(), w.integer(THREADS)), w.thread())
        for begin in range(0, total, plan.programs * THREADS):
            chunk = w.add(mine, w.integer(begin))
            real, chunk = w.below(chunk, w.integer(total)), w.smaller(chunk, w.integer(total - 1))
            at = w.mul(chunk, w.integer(CHUNK))
            row, column = w.quotient(at, plan.width), w.remainder(at, plan.width)
            values = w.load_bf16(refs[0], w.mul(at, w.integer(2)))
            stream = w.add(at, w.integer(plan.offset("stream", source.stream)))
            store_words(base, w.mul(stream, w.integer(4)), values, e.epoch, real)
            for part in range(added.parts):
                before = plan.offset("sums", output.steps[0]) + output.starts[0]
                before += part * plan.batch * added.padded_rows
                here = w.add(w.add(column, w.integer(before)), w.mul(row, w.integer(added.padded_rows)))
                store_words(base, w.mul(here, w.integer(4)), [w.number(0.0)] * CHUNK, e.epoch, real)

    place.emit(body, refs=[x])


def fill(place: Place, team: Team, split: jax.Array, first: jax.Array) -> None:
    """Emits the loading of a phase's input for one split.

    Args:
      place: the phase.
      team: what of the input is needed.
      split: which part of the contraction axis.
      first: nonzero in the program that has the first row tile of this split; it publishes what all of them compute.
    """
    phase = place.launch.plan.phase(place.step)

    def body(e: Emitter, given: list[Value], refs: Any, arrays: Any) -> None:
        _Loader(e, phase, *given).run()

    place.emit(body, [split, first, team.k_tiles, team.x_start, team.k])


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Four columns of the thread's sequence: whether it has these at all, whether they are real, and where they are."""

    mine: Value
    real: Value
    column: Value  # in the source
    offset: Value  # in shared memory


@dataclasses.dataclass
class _Loader:
    """A warp has one sequence, and of it a tile's columns at a time."""

    e: Emitter
    phase: Phase
    split: Value
    publishes: Value
    k_tiles: Value
    start: Value  # first column of the slice
    width: Value

    def __post_init__(self) -> None:
        self.plan, self.source = self.e.plan, self.phase.source
        self.threads = THREADS * self.plan.tuning.readers
        self.columns = w.mul(self.k_tiles, w.integer(TILE_K))  # of this part of the slice
        self.rows = self.plan.input_rows
        self.warp, self.lane = w.quotient(w.reader(), 32), w.remainder(w.reader(), 32)
        row = w.remainder(self.warp, self.rows)
        self.has_row, self.row = (
            w.below(row, w.integer(self.plan.batch)),
            w.smaller(row, w.integer(self.plan.batch - 1)),
        )
        self.publishing = w.below(w.integer(0), self.publishes)
        self.is_stream = self.source.kind == "stream"
        self.is_normed = self.source.kind in ("stream", "kept")
        self.outputs = [Columns(self.e, output, self.source.behind) for output in self.source.of]
        self.scale = self.e.operand(self.source.scale) if self.is_normed else None
        self.stream_base = self.e.base(self.e.step)  # where this phase's own stream goes

    def run(self) -> None:
        w.meet_readers(self.threads)  # nobody multiplies the last input any more
        at_once = self.threads // 32 // self.rows  # tiles of a sequence
        most = -(-self.phase.activation_tiles // at_once)
        words = self.plan.tuning.words_at_once
        if any(output.varies for output in self.outputs):
            words = min(words, _WORDS_OF_VARYING)
        together = min(most, max(1, words // (CHUNK * max(1, self._parts))))
        rounds = w.quotient(w.add(self.k_tiles, w.integer(at_once * together - 1)), at_once * together)
        none = [w.number(0.0)] if self.is_stream else []

        def body(turn: Value, squares: list[Value]) -> list[Value]:
            begin = w.add(w.mul(turn, w.integer(at_once * together)), w.quotient(self.warp, self.rows))
            chunks = [self._chunk(w.add(begin, w.integer(at_once * i))) for i in range(together)]
            return self._round(chunks, squares)

        squares = w.repeat(rounds, none, body)
        for square in squares:
            with w.when(self.publishing):
                keep_squares(self.e, self.warp, self.lane, square)
        w.let_be_multiplied()
        w.meet_readers(self.threads)
        if self.is_stream:
            with w.when(self.publishing):
                self._publish_squares()

    def _round(self, chunks: list[_Chunk], squares: list[Value]) -> list[Value]:
        scales = [
            w.load_bf16(self.scale, w.mul(chunk.column, w.integer(2))) if self.is_normed else [] for chunk in chunks
        ]
        biases = [[output.bias(chunk.column) for output in self.outputs] for chunk in chunks]
        found, root = self._wait(chunks)
        for chunk, scale, bias, parts in zip(chunks, scales, biases, found, strict=True):
            values = self._combine(parts, bias, root)
            if self.is_stream:
                squares = [w.add_f(so_far, self._keep(chunk, values)) for so_far in squares]
            if self.is_normed:
                values = [w.mul_f(v, s) for v, s in zip(values, scale, strict=True)]
            values = [w.select(chunk.real, v, w.number(0.0)) for v in values]
            w.store_activations(self.e.activations, chunk.offset, values)
        return squares

    @property
    def _parts(self) -> int:
        """Words that make up a column, its biases among them."""
        if self.source.kind == "attended":
            return self._attention.parts * 5 // 4 + 1
        return sum(output.parts + output.has_bias for output in self.outputs) + self.is_normed

    @property
    def _attention(self) -> Attention:
        found = self.plan.steps[self.source.attention]
        assert isinstance(found, Attention)
        return found

    def _chunk(self, tile: Value) -> _Chunk:
        """The thread's chunk of a tile; threads beyond the end repeat one of the last tile."""
        mine = w.both(w.below(tile, self.k_tiles), self.has_row)
        tile = w.smaller(tile, w.sub(self.k_tiles, w.integer(1)))
        k = w.add(w.mul(tile, w.integer(TILE_K)), w.mul(self.lane, w.integer(CHUNK)))
        within = w.add(k, w.mul(self.split, self.columns))
        real = w.below(within, self.width)
        column = w.add(w.select(real, within, w.integer(0)), self.start)
        return _Chunk(mine, real, column, w.input_offset(k, self.row, self.rows))

    def _wait(self, chunks: list[_Chunk]) -> tuple[list[list[list[Value]]], Value | None]:
        """For each chunk its columns, once all words are written: one list of four, two where there is a gate. Then what the
        sequence is still to be multiplied with for its norm, which is waited for at the same time."""
        reads = [read for chunk in chunks for read in self._reads(chunk)]
        normed_by = {output.normed_by for output in self.outputs if output.normed_by is not None}
        squares = [self.e.squares(step, self.row) for step in normed_by]  # gate and up are of one input
        found = self.e.wait([*reads, *squares])
        fours, totals = found[: len(reads)], found[len(reads) :]
        lists = len(reads) // len(chunks)
        root = self.e.root(*totals[0]) if totals else None
        return [fours[i : i + lists] for i in range(0, len(fours), lists)], root

    def _reads(self, chunk: _Chunk) -> list[Read]:
        """Of a chunk: its columns, and where there is a gate what it gates."""
        if self.source.kind == "attended":
            base = self.e.base(self.source.attention)
            return [read_attended(self.e, self.source.attention, base, self.row, chunk.column)]
        reads = [output.read(self.row, chunk.column) for output in self.outputs]
        if self.is_normed:
            return [read_stream(self.e, self.source, self.row, chunk.column, reads[0] if reads else None)]
        return reads

    def _combine(self, parts: list[list[Value]], biases: list[list[Value]], root: Value | None) -> list[Value]:
        if self.source.kind in ("attended", "kept"):
            return parts[0]
        found = [
            biased(output.normed(part, root), bias)
            for output, part, bias in zip(self.outputs, parts, biases, strict=True)
        ]
        if self.source.kind != "gated":
            return [w.total(list(column)) for column in zip(*found, strict=True)]
        gate = gates.ACTIVATIONS[self.source.activation]
        return [w.mul_f(gate(g), u) for g, u in zip(*found, strict=True)]

    def _keep(self, chunk: _Chunk, values: list[Value]) -> Value:
        """Publishes the stream, and gives its squares' sum."""
        used = w.both(chunk.mine, chunk.real)
        write_stream(self.e, self.row, chunk.column, values, w.both(used, self.publishing))
        return w.select(used, sum_of_squares(values), w.number(0.0))

    def _publish_squares(self) -> None:
        """Adds up the squares of all warps that have a sequence: a word of it for the steps that follow."""
        alone = w.equal(w.reader(), w.integer(0))
        for row in range(self.plan.batch):
            warps = range(row, self.threads // 32, self.rows)
            number = w.add(self.split, w.integer(row * self.phase.splits))
            publish_squares(self.e, self.stream_base, number, warps, alone)
