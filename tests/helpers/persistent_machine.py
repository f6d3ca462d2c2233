"""The persistent kernel's protocol, run by numpy from a plan: words, and programs that read and write them.

Nothing here runs the kernel itself, which needs a GPU; what it computes from a plan is written out again.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Generator, Iterator
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from persistent_models import EPS, Item, items_of, pieces_of, plan_of

from pallas_kernels.persistent import attend
from pallas_kernels.persistent.building import DEFAULT
from pallas_kernels.persistent.plan import Plan
from pallas_kernels.persistent.sources import Output
from pallas_kernels.persistent.steps import TILE_K, TILE_ROWS, Attention, Collect, Keep, Phase
from pallas_kernels.persistent.tuning import Tuning

ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
}


@functools.cache
def span(attention: Attention, length: int, window: int, part: int) -> tuple[int, int, int]:
    first, begin, end = attend.span(attention, *map(jnp.int32, (length, window, part)))
    return int(first), int(begin), int(end)


Run = Generator[str, None, Any]
"""Says "waits" or "moves" at every step; ends with what was asked for."""


@dataclasses.dataclass
class Machine:
    """Words, and the programs that read and write them. A program that needs a word that is not there waits.

    Attributes:
      plan, operands: as the kernel has them.
      x: embedding [batch, width].
      tables: cosines and sines [batch, head_dim // 2].
      lengths: position of each sequence's new token.
      before: the machine of the step before, whose words are left; none are if not given.
    """

    plan: Plan
    operands: list[np.ndarray]
    x: np.ndarray
    tables: tuple[np.ndarray, np.ndarray]
    lengths: np.ndarray
    before: dataclasses.InitVar["Machine | None"] = None

    def __post_init__(self, before: "Machine | None") -> None:
        plan = self.plan
        self.number = 0 if before is None else before.number + 1  # of the step
        # A program sees words and epochs, and must not see one of another time: counted over all layers of all steps.
        self.words = np.full(plan.words, np.nan) if before is None else before.words.copy()
        self.epochs = np.zeros(plan.words, int) if before is None else before.epochs.copy()
        self.times = np.full(plan.words, -1) if before is None else before.times.copy()
        (last,) = (step for step in plan.steps if isinstance(step, Collect))
        self.logits = np.full((plan.batch, last.columns), np.nan)
        self.new: dict[tuple[int, int, int, int], np.ndarray] = {}  # (layer, operand, sequence, kv head) -> [head_dim]
        self.pieces: dict[tuple[int, int], np.ndarray] = {}  # (step, layer) -> of every row tile
        self.rows = np.arange(plan.batch)
        self.programs = {g: self.program(g) for g in range(plan.programs)}

    @classmethod
    def of(
        cls, arguments: tuple[Any, ...], programs: int, tuning: Tuning = DEFAULT, before: "Machine | None" = None
    ) -> Self:
        """For arguments of `decode_layers`."""
        plan, operands = plan_of(arguments, programs, tuning)
        assert plan.problems() is None
        x, *_, cos, sin, start = (np.asarray(a, np.float64) for a in (arguments[0], *arguments[6:]))
        wide = [np.asarray(a, np.float64) for a in operands]
        return cls(plan, wide, x[:, 0], (cos[:, 0], sin[:, 0]), start.astype(int), before)

    def move(self, g: int) -> bool:
        """Lets a program go on until it waits or has done one thing; says whether it could."""
        if g not in self.programs:
            return False
        state = next(self.programs[g], "ended")
        if state == "ended":
            del self.programs[g]
        return state != "waits"

    def operand(self, layer: int, number: int) -> np.ndarray:
        return self.operands[layer * self.plan.operands + number]

    def read(self, layer: int, at: np.ndarray) -> Run:
        """Words of a layer, once all are there."""
        at, epoch, time = self.place(layer, at), self.epoch(layer), self.time(layer)
        while True:
            assert (self.times[at] <= time).all(), "a word was overwritten while a program still wanted it"
            if (self.epochs[at] == epoch).all():
                assert (self.times[at] == time).all(), "a word of another time was taken"
                return self.words[at]
            yield "waits"

    def write(self, layer: int, at: np.ndarray, values: np.ndarray) -> None:
        at = self.place(layer, at)
        assert (self.times[at] < self.time(layer)).all(), "a word is written twice"
        self.words[at] = values
        self.epochs[at], self.times[at] = self.epoch(layer), self.time(layer)

    def epoch(self, layer: int) -> int:
        return self.plan.epoch(layer, self.number % 2)

    def time(self, layer: int) -> int:
        return self.number * (self.plan.layers + 2) + layer + 1

    def place(self, layer: int, at: np.ndarray) -> np.ndarray:
        """Layers take turns in two arrays; the head's words lie behind both."""
        return np.where(at < 2 * self.plan.layer_words, at + (layer & 1) * self.plan.layer_words, at)

    def program(self, g: int) -> Run:
        plan = self.plan
        self.embed(g)
        yield "moves"
        in_layers = itertools.product(range(plan.layers), range(plan.in_layer))
        in_head = ((plan.layers, number) for number in range(plan.in_layer, len(plan.steps)))
        for layer, number in itertools.chain(in_layers, in_head):
            own = layer if number < plan.in_layer else 0
            step = plan.steps[number]
            if isinstance(step, Collect):
                yield from self.collect(step, layer, g)
                continue
            take = {Attention: self.attend, Keep: self.keep, Phase: self.multiply}[type(step)]
            yield from take(number, layer, own, items_of(plan, number, own, g))

    def embed(self, g: int) -> None:
        """Four columns a thread, 128 threads a program."""
        plan, source = self.plan, self.plan.steps[0].source
        (added,) = source.of
        columns = np.arange(plan.batch * plan.width)
        mine = columns[columns // 512 % plan.programs == g]
        self.write(-1, plan.offset("stream", source.stream) + mine, self.x.ravel()[mine])
        row, column = divmod(mine, plan.width)
        for part in range(plan.steps[added.steps[0]].parts):
            self.write(-1, self.sums_at(added.steps[0], part, row, added.starts[0] + column), 0.0)

    def keep(self, number: int, layer: int, own: int, items: range) -> Run:
        """Four columns of a sequence a thread, 128 threads an item."""
        plan, keep = self.plan, self.plan.steps[number]
        for item in items:
            row, part = divmod(item, keep.parts)
            columns = np.arange(512 * part, min(512 * (part + 1), plan.width))
            (added,) = keep.source.of
            (values,) = yield from self.output(added, layer, np.array([row]), columns)
            before = plan.offset("stream", keep.source.stream) + row * plan.width + columns
            values = values + (yield from self.read(layer, before))
            self.write(layer, plan.offset("stream", number) + row * plan.width + columns, values)
            at = plan.offset("squares", number) + np.array([row * keep.parts + part])
            self.write(layer, at, (values**2).sum())
            yield "moves"

    def sums_at(self, number: int, part: Any, row: Any, column: Any) -> Any:
        padded = self.plan.steps[number].padded_rows
        return self.plan.offset("sums", number) + (part * self.plan.batch + row) * padded + column

    # ------------------------------------------------------------------ products

    def multiply(self, number: int, layer: int, own: int, items: list[Item]) -> Run:
        held, part = None, None
        for item in items:
            if held is None:
                publishes = item.row_tile == item.begin == 0
                held = yield from self.input(number, layer, own, item.team, item.split, publishes)
                part = item.team, item.split
            assert part == (item.team, item.split), "one program with two parts of an input"
            self.product(number, layer, own, item, held)
            yield "moves"

    def input(self, number: int, layer: int, own: int, team: int, split: int, publishes: bool) -> Run:
        """A split of a team's slice of the input, [batch, columns]."""
        plan, phase = self.plan, self.plan.steps[number]
        tiles, stream = phase.k_tiles(team, own), phase.source.kind == "stream"
        scaled = phase.source.kind in ("stream", "kept")
        held = np.zeros((plan.batch, tiles, TILE_K))
        squares = np.zeros(plan.batch)
        group = phase.layers[own][phase.teams[team][0]]
        for tile in range(tiles):
            within = (split * tiles + tile) * TILE_K + np.arange(TILE_K)
            real = within < group.k
            # Like the kernel, what lies behind the end reads the first column instead, and waits for it too.
            columns = group.x_start + np.where(real, within, 0)
            values = yield from self.columns(number, layer, columns)
            if stream:
                squares += (values[:, real] ** 2).sum(1)
                if publishes:
                    at = plan.offset("stream", number) + self.rows[:, None] * plan.width + columns[real]
                    self.write(layer, at, values[:, real])
            if scaled:
                values = values * self.operand(layer, phase.source.scale)[columns]
            held[:, tile] = values * real
            yield "moves"
        if stream and publishes:
            self.write(layer, plan.offset("squares", number) + self.rows * phase.splits + split, squares)
        return held.reshape(plan.batch, -1)

    def columns(self, number: int, layer: int, at: np.ndarray) -> Run:
        """[batch, columns] of a phase's input."""
        plan, source = self.plan, self.plan.steps[number].source
        if source.kind == "attended":
            return (yield from self.attended(layer, source.attention, at))
        found = []
        for output in source.of:
            found.append((yield from self.output(output, layer - source.behind, self.rows, at)))
        if source.kind in ("stream", "kept"):
            before = plan.offset("stream", source.stream) + self.rows[:, None] * plan.width + at
            return sum(found) + (yield from self.read(layer - source.behind, before))
        return ACTIVATIONS[source.activation](found[0]) * found[1] if source.kind == "gated" else sum(found)

    def output(self, output: Output, layer: int, rows: np.ndarray, at: np.ndarray) -> Run:
        """[rows, columns] of an output. Layer -1 is the embedding, which lies where the first layer's does."""
        plan, own = self.plan, min(max(layer, 0), len(output.steps) - 1)
        number = output.steps[own]
        found = yield from self.sums(layer, number, own, rows, output.starts[own] + at)
        source = plan.steps[number].source
        divided_by = number if source.kind == "stream" else source.divided_by
        if divided_by is not None:
            found = found * (yield from self.roots(layer, divided_by))[rows, None]
        return found if output.bias is None or layer < 0 else found + self.operand(layer, output.bias)[at]

    def sums(self, layer: int, number: int, own: int, rows: np.ndarray, at: np.ndarray) -> Run:
        """[rows, columns] of a phase's output."""
        plan, phase = self.plan, self.plan.steps[number]
        if (number, own) not in self.pieces:
            self.pieces[number, own] = np.array(pieces_of(plan, number, own))
        pieces = self.pieces[number, own][at // TILE_ROWS]
        assert pieces.all(), "columns that the layer does not have"
        found = np.zeros((len(rows), len(at)))
        for split, piece in itertools.product(range(phase.splits), range(phase.pieces)):
            there = pieces > piece
            words = self.sums_at(number, split * phase.pieces + piece, rows[:, None], at[there])
            found[:, there] += yield from self.read(layer, words)
        return found

    def roots(self, layer: int, number: int) -> Run:
        step = self.plan.steps[number]
        count = step.parts if isinstance(step, Keep) else step.splits
        at = self.plan.offset("squares", number) + np.arange(self.plan.batch * count).reshape(-1, count)
        return self.root((yield from self.read(layer, at)).sum(1))

    def root(self, squares: np.ndarray) -> np.ndarray:
        return 1 / np.sqrt(squares / self.plan.width + EPS)

    def attended(self, layer: int, number: int, at: np.ndarray) -> Run:
        """Parts of the positions, weighed by what each has of the softmax."""
        of, plan = self.plan.steps[number], self.plan
        rows = np.arange(of.parts)[:, None, None] * plan.batch + self.rows[:, None]
        values = yield from self.read(layer, plan.offset("sums", number) + rows * of.heads * of.head_dim + at)
        heads = self.rows[:, None] * of.heads + at // of.head_dim
        parts = np.arange(of.parts)[:, None, None]
        logs = yield from self.read(layer, plan.offset("weights", number) + heads * of.parts + parts)
        shares = np.exp2(logs - logs.max(0))
        return (values * shares).sum(0) / shares.sum(0)

    def product(self, number: int, layer: int, own: int, item: Item, x: np.ndarray) -> None:
        plan, phase = self.plan, self.plan.steps[number]
        groups, of_team = phase.layers[own], phase.teams[item.team]
        ends = np.cumsum([groups[i].row_tiles for i in of_team])
        place = int(np.searchsorted(ends, item.row_tile, side="right"))
        index = of_team[place]
        group, within = groups[index], item.row_tile - int(ends[place]) + groups[index].row_tiles
        begin = group.row_start + within * TILE_ROWS
        x = x[:, item.begin * TILE_K : item.end * TILE_K]
        first = (item.split * phase.k_tiles(item.team, own) + item.begin) * TILE_K
        weight = self.operand(layer, group.weight)[begin : begin + TILE_ROWS, first : first + x.shape[1]]
        y = np.zeros((plan.batch, TILE_ROWS))
        y[:, : weight.shape[0]] = x[:, : weight.shape[1]] @ weight.T
        row = (sum(max(layer[i].row_tiles for layer in phase.layers) for i in range(index)) + within) * TILE_ROWS
        part = item.split * phase.pieces + item.piece
        at = self.sums_at(number, part, self.rows[:, None], row + np.arange(TILE_ROWS))
        self.write(layer, at, y)

    def collect(self, step: Collect, layer: int, g: int) -> Run:
        """Four columns a thread, 128 threads a program."""
        of_row = -(-step.columns // 4)
        mine = [c for c in range(self.plan.batch * of_row) if c // 128 % self.plan.programs == g]
        for row, chunk in (divmod(c, of_row) for c in mine):
            columns = np.arange(4 * chunk, 4 * chunk + 4)
            (values,) = yield from self.output(step.of, layer, np.array([row]), columns)
            real = columns[columns < step.columns]
            assert np.isnan(self.logits[row, real]).all(), "an output is written twice"
            self.logits[row, real] = values[: real.size]
            yield "moves"

    # ------------------------------------------------------------------ attention

    def attend(self, number: int, layer: int, own: int, items: range) -> Run:
        of = self.plan.steps[number]
        for item in items:
            (row, head), part = divmod(item // of.parts, of.kv_heads), item % of.parts
            length = int(self.lengths[row])
            first, begin, end = span(of, length, of.windows[own], part)
            queries = []
            for query in range(of.group):
                queries.append((yield from self.head(of, layer, row, 0, head * of.group + query)))
                yield "moves"
            slots = np.arange(begin * TILE_ROWS, end * TILE_ROWS)
            keys, values = (self.operand(layer, cache)[row, head, slots] for cache in (of.keys, of.values))
            if length in slots:
                for which, cache, tiles in ((1, of.keys, keys), (2, of.values, values)):
                    new = yield from self.head(of, layer, row, which, head)
                    assert self.new.setdefault((layer, cache, row, head), new) is new, "a slot is written twice"
                    tiles[slots == length] = new
                    yield "moves"
            visible = (first <= slots) & (slots <= length)
            scores = np.stack(queries) @ keys[visible].T * (math.log2(math.e) / math.sqrt(of.head_dim))
            self.finish(number, layer, row, head, part, scores, values[visible])
            yield "moves"

    def head(self, of: Attention, layer: int, row: int, which: int, head: int) -> Run:
        """A head of the queries (0), keys (1) or values (2), normed and rotated."""
        within = head * of.head_dim + np.arange(of.head_dim)
        ((*values,),) = yield from self.output(of.of[which], layer, np.array([row]), within)
        found = np.array(values)
        if which == 2:
            return found
        if of.norms is not None:
            found *= self.operand(layer, of.norms[which]) / np.sqrt((found**2).mean() + EPS)
        (low, high), (cos, sin) = np.split(found, 2), (table[row] for table in self.tables)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin])

    def finish(
        self, number: int, layer: int, row: int, head: int, part: int, scores: np.ndarray, values: np.ndarray
    ) -> None:
        """Publishes what a part of the positions has attended, and the logarithm of its weight."""
        plan, of = self.plan, self.plan.steps[number]
        largest = scores.max(1, initial=-1e30)
        weights = np.exp2(scores - largest[:, None])
        total = weights.sum(1)
        attended = weights @ values / np.maximum(total, 1e-30)[:, None]
        logs = np.where(total > 0, largest + np.log2(np.maximum(total, 1e-30)), -1e30)
        heads = (part * plan.batch + row) * of.heads + head * of.group + np.arange(of.group)
        at = plan.offset("sums", number) + heads[:, None] * of.head_dim + np.arange(of.head_dim)
        self.write(layer, at, attended)
        heads = row * of.heads + head * of.group + np.arange(of.group)
        self.write(layer, plan.offset("weights", number) + heads * of.parts + part, logs)

    def caches(self, layer: int) -> Iterator[np.ndarray]:
        """Keys and values of a layer after the launch."""
        (of,) = (step for step in self.plan.steps if isinstance(step, Attention))
        for cache in (of.keys, of.values):
            after = self.operand(layer, cache).copy()
            for row, head in np.ndindex(after.shape[:2]):
                after[row, head, self.lengths[row]] = self.new[layer, cache, row, head]
            yield after


Schedule = Callable[[Machine, np.random.Generator], None]


def in_random_order(machine: Machine, rng: np.random.Generator) -> None:
    """All that can go on, in a new order every time."""
    while machine.programs:
        assert any([machine.move(g) for g in shuffled(machine, rng)]), "no program can go on"


def with_a_laggard(machine: Machine, rng: np.random.Generator) -> None:
    """One program only gets on when no other can."""
    laggard = int(rng.integers(machine.plan.programs))
    while machine.programs:
        others = [g for g in shuffled(machine, rng) if g != laggard]
        assert any([machine.move(g) for g in others]) or machine.move(laggard), "no program can go on"


def as_far_as_it_goes(machine: Machine, rng: np.random.Generator) -> None:
    """One program gets as far as it can before any other moves, then the next one until the first can go on, and so on."""
    ranking = shuffled(machine, rng)
    while machine.programs:
        assert any(machine.move(g) for g in ranking), "no program can go on"


def shuffled(machine: Machine, rng: np.random.Generator) -> list[int]:
    return [int(g) for g in rng.permutation(list(machine.programs))]
