"""The persistent kernel's plan, run by numpy: programs in any order that the words allow, which must end, and give the op's result.

Nothing here runs the kernel itself, which needs a GPU; what it computes from a plan is written out again in `Machine`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import Between, Norm, PackedProjection, Projection, assume_target, pack, prefer, segment
from pallas_kernels.persistent import segments
from pallas_kernels.persistent.plan import SHARED_MEMORY, TILE_BYTES, TILE_K, TILE_ROWS, Segment, splits_for
from pallas_kernels.target import H200, Target

EPS = 1e-5
Ranks = tuple[int | None, int | None]


def packed(rng: np.random.Generator, d_in: int, members: list[tuple[int, int | None]], dtype: Any) -> PackedProjection:
    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) / shape[-1] ** 0.5, dtype)

    return pack(
        [
            Projection(weight=draw(d_out, d_in))
            if rank is None
            else Projection(down=draw(rank, d_in), up=draw(d_out, rank))
            for d_out, rank in members
        ]
    )


def call(
    ranks: Ranks, batch: int = 2, width: int = 256, ff: int = 456, dtype: Any = jnp.bfloat16
) -> tuple[tuple[jax.Array, jax.Array], Between]:
    """Arguments of `segment`."""
    rng = np.random.default_rng(0)
    attention, mlp = ranks
    scale = lambda: jnp.asarray(1 + 0.3 * rng.standard_normal(width), dtype)  # noqa: E731
    between = Between(
        o=packed(rng, width, [(width, attention)], dtype),
        mlp_norm=Norm(scale(), EPS),
        gate_up=packed(rng, width, [(ff, mlp), (ff, mlp)], dtype),
        gate="silu",
        down=packed(rng, ff, [(width, mlp)], dtype),
        next_norm=Norm(scale(), EPS),
        following=packed(rng, width, [(width, attention), (128, attention), (128, attention)], dtype),
    )
    x, attended = (jnp.asarray(rng.standard_normal((batch, 1, width)), dtype) for _ in "xa")
    return (x, attended), between


@dataclasses.dataclass
class Machine:
    """Words, and the programs that read and write them. A program that needs a word that is not there waits."""

    segment: Segment
    operands: list[np.ndarray]

    def __post_init__(self) -> None:
        self.words = np.full(self.segment.words, np.nan)
        self.stream = np.full((self.segment.batch, self.segment.width), np.nan)
        self.plain: dict[tuple[int, int], np.ndarray] = {}

    def run(self, rng: np.random.Generator) -> None:
        """One item at a time, of a program chosen at random among those that can go on."""
        programs = {g: self.program(g) for g in range(self.segment.programs)}
        while programs:
            order = list(programs)
            rng.shuffle(order)
            moved = False
            for g in order:
                state = next(programs[g], "ended")
                moved = moved or state != "waits"
                if state == "ended":
                    del programs[g]
            assert moved, "no program can go on"

    def program(self, g: int) -> Iterator[str]:
        for j, phase in enumerate(self.segment.phases):
            numbers = range(self.segment.first_item(j, g), phase.items, self.segment.programs)
            held = None
            for number in numbers:
                row_tile, split = divmod(number, phase.splits)
                if held is None:
                    while (held := self.input(j, split)) is None:
                        yield "waits"
                    part, values = split, held
                    if row_tile == 0:
                        self.publish(j, split, values)
                assert part == split
                self.multiply(j, row_tile, split, values)
                yield "moves"

    def input(self, j: int, split: int) -> dict[tuple[int, int], np.ndarray] | None:
        """[batch, columns] before rounding for every slice, or None if a word is missing."""
        phase, found = self.segment.phases[j], {}
        columns = phase.k_tiles * TILE_K
        for start, k in phase.slices:
            within = np.arange(split * columns, min((split + 1) * columns, k))
            values = self.columns(j, start + within)
            if np.isnan(values).any():
                return None
            found[start, k] = np.pad(values, ((0, 0), (0, columns - within.size)))
        return found

    def columns(self, j: int, at: np.ndarray) -> np.ndarray:
        source = self.segment.phases[j].source
        if source.kind == "plain":
            return self.operands[1][:, at]
        if source.kind == "stream":
            return self.operands[0][:, at] + sum(self.partial(i, at) for i in source.of)
        root = 1.0 if source.scaled is None else self.root(source.scaled)[:, None]
        if source.kind == "sum":
            return root * self.partial(source.of[0], at)
        gate, up = (root * self.partial(source.of[0], at + half) for half in (0, source.half))
        return gate / (1 + np.exp(-gate)) * up

    def partial(self, j: int, at: np.ndarray) -> np.ndarray:
        phase = self.segment.phases[j]
        return self.array(j, phase)[:, :, at].sum(0)

    def array(self, j: int, phase: Any) -> np.ndarray:
        begin = self.segment.word_offset(j)
        shape = (phase.splits, self.segment.batch, phase.padded_rows)
        return self.words[begin : begin + np.prod(shape)].reshape(shape)

    def squares(self, j: int) -> np.ndarray:
        begin, splits = self.segment.square_offset(j), self.segment.phases[j].splits
        return self.words[begin : begin + self.segment.batch * splits].reshape(self.segment.batch, splits)

    def root(self, j: int) -> np.ndarray:
        return 1 / np.sqrt(self.squares(j).sum(1) / self.segment.width + EPS)

    def publish(self, j: int, split: int, values: dict[tuple[int, int], np.ndarray]) -> None:
        phase = self.segment.phases[j]
        if phase.source.kind != "stream":
            return
        (stream,) = values.values()
        assert np.isnan(self.squares(j)[:, split]).all(), "a word is written twice"
        self.squares(j)[:, split] = (stream**2).sum(1)
        if j == self.segment.streams[-1]:
            begin = split * stream.shape[1]
            real = min(stream.shape[1], self.segment.width - begin)
            self.stream[:, begin : begin + real] = stream[:, :real]

    def multiply(self, j: int, row_tile: int, split: int, values: dict[tuple[int, int], np.ndarray]) -> None:
        phase = self.segment.phases[j]
        ends = np.cumsum([group.row_tiles for group in phase.groups])
        index = int(np.searchsorted(ends, row_tile, side="right"))
        group = phase.groups[index]
        tile = row_tile - int(ends[index]) + group.row_tiles
        x = values[group.x_start, group.k]
        if phase.source.kind == "stream":
            scale = self.operands[phase.source.scale or 0][split * x.shape[1] :][: x.shape[1]]
            x = x * np.pad(scale, (0, x.shape[1] - scale.size))
        rows = slice(group.row_start + tile * TILE_ROWS, group.row_start + (tile + 1) * TILE_ROWS)
        weight = self.operands[group.weight][rows, split * x.shape[1] : (split + 1) * x.shape[1]]
        y = np.zeros((self.segment.batch, TILE_ROWS))
        y[:, : weight.shape[0]] = x[:, : weight.shape[1]] @ weight.T
        if not phase.plain:
            into = self.array(j, phase)[split, :, row_tile * TILE_ROWS : (row_tile + 1) * TILE_ROWS]
            assert np.isnan(into).all(), "a word is written twice"
            into[...] = y
            return
        if phase.source.kind == "stream":
            y = y / np.sqrt((values[group.x_start, group.k] ** 2).sum(1) / self.segment.width + EPS)[:, None]
        out = self.plain.setdefault((j, index), np.full((self.segment.batch, group.rows), np.nan))
        real = min(TILE_ROWS, group.rows - tile * TILE_ROWS)
        out[:, tile * TILE_ROWS : tile * TILE_ROWS + real] = y[:, :real]


RANKS: list[Ranks] = [(136, 200), (None, None), (None, 200), (136, None)]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("programs", [8, 24, 128])
def test_the_plan_computes_the_op_whatever_the_order(ranks: Ranks, programs: int) -> None:
    (x, attended), between = call(ranks, width=1024, ff=1160, dtype=jnp.float32)
    built, weights = segments._plan(2, 1024, programs, between)
    assert built.problems() is None
    assert programs < 24 or max(phase.splits for phase in built.phases) == 2
    operands = [x[:, 0], attended[:, 0], between.mlp_norm.scale, between.next_norm.scale, *weights]
    want, outputs = segment.reference(x, attended, between)
    for seed in range(2):
        machine = Machine(built, [np.asarray(a, np.float64) for a in operands])
        machine.run(np.random.default_rng(seed))
        np.testing.assert_allclose(machine.stream, want[:, 0], rtol=0, atol=2e-5)
        plain = [machine.plain[key] for key in sorted(machine.plain)]
        for got, expected in zip(plain, outputs, strict=True):
            np.testing.assert_allclose(got, expected[:, 0], rtol=0, atol=2e-5)


@given(
    ranks=st.tuples(st.none() | st.integers(16, 80), st.none() | st.integers(16, 80)),
    sizes=st.tuples(st.integers(16, 200), st.integers(16, 300)),
    programs=st.integers(1, 17),
    batch=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_items_words_and_memory(ranks: Ranks, sizes: tuple[int, int], programs: int, batch: int) -> None:
    eighths = lambda n: None if n is None else 8 * n  # noqa: E731
    width, ff = (8 * n for n in sizes)
    attention, mlp = (eighths(rank) for rank in ranks)
    shapes = jax.eval_shape(lambda: call((attention, mlp), batch, width, ff)[1])
    built, _ = segments._plan(batch, width, 8 * programs, shapes)
    used = np.zeros(built.words, int)
    for j, phase in enumerate(built.phases):
        taken = [
            number
            for g in range(built.programs)
            for number in range(built.first_item(j, g), phase.items, built.programs)
        ]
        assert sorted(taken) == list(range(phase.items))
        assert built.programs % phase.splits == 0
        assert phase.k_tiles * phase.splits * TILE_K >= max(group.k for group in phase.groups)
        if not phase.plain:
            begin = built.word_offset(j)
            used[begin : begin + phase.splits * batch * phase.padded_rows] += 1
            assert begin % 4 == 0 and phase.padded_rows % 4 == 0
        if phase.source.kind == "stream":
            begin = built.square_offset(j)
            used[begin : begin + batch * phase.splits] += 1
    assert used.max(initial=0) <= 1
    assert built.stages * TILE_BYTES + built.activation_tiles * 8 * TILE_K * 2 < SHARED_MEMORY
    last = [g for g in range(built.programs) if built.first_item(1, g) == 0]
    assert last == [built.phases[0].items % built.programs]  # a phase begins where the one before ended


def test_splits_fill_the_programs_and_leave_items_long() -> None:
    assert [splits_for(rows, k, 128) for rows, k in ((1024, 4096), (4096, 1024), (3072, 4096), (22016, 1536), (1536, 11008))] == [
        8, 2, 4, 1, 8,
    ]  # fmt: skip
    assert splits_for(64, 256, 128) == 1


def test_problems_are_told() -> None:
    (_, _), between = call((136, 200), width=1024)
    built, _ = segments._plan(2, 1024, 128, between)
    assert built.problems() is None
    assert "do not divide" in str(dataclasses.replace(built, programs=3).problems())
    huge = dataclasses.replace(built.phases[0].groups[0], k=2**20)
    phases = (dataclasses.replace(built.phases[0], groups=(huge,)), *built.phases[1:])
    assert "no shared memory" in str(dataclasses.replace(built, phases=phases).problems())


def test_it_serves_those_that_ask_and_refuses_with_reasons() -> None:
    (x, attended), between = call((136, 200))
    with assume_target(H200):
        assert segment.choose(x, attended, between)[0].name == "products"
        with prefer("persistent"):
            assert segment.choose(x, attended, between)[0].name == "persistent"
            changed = lambda **fields: dataclasses.replace(between, **fields)  # noqa: E731
            biased = dataclasses.replace(between.o, biases=(jnp.zeros(256, jnp.bfloat16),))
            mixed = packed(np.random.default_rng(0), 256, [(456, None), (456, 200)], jnp.bfloat16)
            wide, wide_between = call((136, 200), dtype=jnp.float32)
            other = Norm(between.mlp_norm.scale, 1e-6)
            for arguments, reason in (
                ((x, attended, changed(following=None, next_norm=None)), "last layer"),
                ((jnp.zeros((5, 1, 256), jnp.bfloat16), attended, between), "5 rows"),
                ((*wide, wide_between), "bfloat16"),
                ((x, attended, changed(o=biased)), "biases"),
                ((x, attended, changed(gate="gelu")), "silu"),
                ((x, attended, changed(gate_up=mixed)), "dense and low-rank"),
                ((x, attended, changed(next_norm=other)), "eps"),
            ):
                chosen, refusals = segment.choose(*arguments)
                assert chosen.name == "products" and reason in refusals["persistent"]
    for device in (
        Target("cpu"),
        Target("cuda", "NVIDIA A100", (8, 0), 108),
        dataclasses.replace(H200, interpret=True),
    ):
        with assume_target(device), prefer("persistent"):
            assert segment.choose(x, attended, between)[0].name == "products"


def test_products_and_reference_agree() -> None:
    (x, attended), between = call((136, 200), dtype=jnp.float32)
    for last in (False, True):
        chosen = dataclasses.replace(between, following=None, next_norm=None) if last else between
        want, outputs = segment.reference(x, attended, chosen)
        got, projected = segment(x, attended, chosen, implementation="products")
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
        assert len(projected) == len(outputs) == (0 if last else 3)
        for a, b in zip(projected, outputs, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
