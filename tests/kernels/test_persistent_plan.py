"""The arithmetic of the persistent kernel's plan: items, words, memory, and what differs from layer to layer."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from persistent_models import (
    LOW_RANK,
    MODELS,
    PROGRAMS,
    Item,
    Model,
    eighths,
    items_of,
    models,
    pieces_of,
    plan_of,
    shapes_of,
)

from pallas_kernels.persistent import attend, building, layers
from pallas_kernels.persistent.launch import SMALL_FLOATS
from pallas_kernels.persistent.numbers import outputs_of
from pallas_kernels.persistent.plan import SHARED_MEMORY, Plan, parts_for, splits_for
from pallas_kernels.persistent.sources import Output, Source
from pallas_kernels.persistent.steps import (
    HEADS_BYTES,
    KEEP_TILES,
    TILE_BYTES,
    TILE_K,
    TILE_ROWS,
    Attention,
    Collect,
    Group,
    Keep,
    Phase,
    most_pieces,
    sharer,
)
from pallas_kernels.persistent.tuning import Tuning, tuning_for
from pallas_kernels.target import H200, assume_target

TUNING = Tuning()


@functools.lru_cache(maxsize=256)
def drawn_plan(model: Model, programs: int) -> Plan:
    plan, operands = plan_of(shapes_of(model), programs)
    assert plan.problems() is None
    assert len(operands) == plan.layers * plan.operands + len(set(operand_numbers(plan.steps[plan.in_layer :])))
    return plan


def operand_numbers(steps: Any) -> Iterator[int]:
    for step in steps:
        if isinstance(step, (Collect, Keep)):
            continue
        yield from (group.weight for groups in step.layers for group in groups)
        yield from [step.source.scale] if step.source.kind in ("stream", "kept") else []


@given(models(), PROGRAMS)
@settings(max_examples=60, deadline=None)
def test_every_tile_has_one_program_and_programs_have_alike(model: Model, programs: int) -> None:
    plan = drawn_plan(model, programs)
    order = [(layer, number) for layer in range(plan.layers) for number in range(plan.in_layer)]
    order += [(0, number) for number in range(plan.in_layer, len(plan.steps))]
    assert [(layer, number) for number, layer in plan.in_order()] == order
    load = np.zeros(programs, int)
    for layer, number in order:
        step = plan.steps[number]
        if isinstance(step, Collect):
            continue
        taken = [items_of(plan, number, layer, g) for g in range(programs)]
        if isinstance(step, Attention):
            assert sorted(item for items in taken for item in items) == list(range(step.items))
            tiles = np.array([2 * len(items) for items in taken])
        elif isinstance(step, Keep):
            assert sorted(item for items in taken for item in items) == list(range(step.items))
            assert plan.batch * plan.width <= 512 * step.items < plan.batch * (plan.width + 512)
            tiles = np.array([KEEP_TILES * len(items) for items in taken])
        else:
            check_teams(step, layer, programs, [item for items in taken for item in items])
            check_pieces(plan, number, layer)
            tiles = np.array([sum(item.end - item.begin for item in items) for items in taken])
        first = plan.first_programs[number][layer]
        assert np.roll(step.work(layer, programs), first).tolist() == tiles.tolist()
        assert tiles @ load == min(np.roll(tiles, turn) @ load for turn in range(programs))
        load += tiles


def test_what_is_read_first_is_fetched_before_as_long_as_it_fits() -> None:
    low_rank = Model((512,) * 2, (512,) * 2, batch=1, width=4096, ff=11008, heads=32, kv_heads=32, dtype=jnp.bfloat16)
    for model in (low_rank, dataclasses.replace(low_rank, attention=(None, None))):
        plan, operands = plan_of(shapes_of(model), 132)
        phases = [step for step in plan.steps[: plan.in_layer] if isinstance(step, Phase)]
        order = list(dict.fromkeys(group.weight for phase in phases for group in phase.layers[0]))
        ends = np.cumsum([2 * operands[number].size for number in order])
        assert layers.read_first(plan, operands) == order[: int((ends <= layers.MOST_FETCHED).sum())]
        assert (ends <= layers.MOST_FETCHED).sum() == (0 if model.attention[0] is None else 5)


def check_teams(phase: Phase, layer: int, programs: int, taken: list[Item]) -> None:
    """Every team computes all its tiles and reads one slice; programs of a split have alike, and teams nearly so."""
    sizes, groups = phase.team_programs(layer, programs), phase.layers[layer]
    rows = [sum(groups[i].row_tiles for i in team) for team in phase.teams]
    assert [size > 0 for size in sizes] == [count > 0 for count in rows]
    assert programs - phase.splits < sum(sizes) <= programs if any(rows) else not any(sizes)
    assert all(size % phase.splits == 0 for size in sizes)
    assert sorted(i for team in phase.teams for i in team) == list(range(len(groups)))
    tiles = [(i.team, i.split, i.row_tile, tile) for i in taken for tile in range(i.begin, i.end)]
    wanted = []
    for number, team in enumerate(phase.teams):
        k_tiles = phase.k_tiles(number, layer)
        wanted += itertools.product([number], range(phase.splits), range(rows[number]), range(k_tiles))
        assert len({(groups[i].x_start, groups[i].k) for i in team}) == 1
        assert k_tiles * phase.splits * TILE_K >= groups[team[0]].k
        in_all, sharers = rows[number] * k_tiles, phase.sharers(layer, programs)[number]
        assert phase.team_tiles(number, layer) == in_all
        most = min(sizes[number] // phase.splits, rows[number] * (1 if phase.whole else k_tiles))
        if not phase.whole and sharers < most:
            # Fewer only where all others of as short shares would divide row tiles into more pieces, or into too many.
            pieces = {n: most_pieces(in_all, k_tiles, n) for n in range(sharers, most + 1)}
            too_many = min(pieces[n] for n in pieces if n > sharers) * phase.splits > phase.most_parts
            same = -(-in_all // sharers) == -(-in_all // most)
            assert too_many or (same and all(pieces[n] > pieces[sharers] for n in pieces if n > sharers))
        assert not phase.whole or sharers == most
    assert sorted(tiles) == sorted(wanted)
    busy = [team for team, size in enumerate(sizes) if size]
    shares = {team: phase.team_tiles(team, layer) / sizes[team] for team in busy}
    for slow, fast in itertools.permutations(busy, 2):
        if sizes[fast] > phase.splits:
            assert shares[slow] <= phase.team_tiles(fast, layer) / (sizes[fast] - phase.splits)


def check_pieces(plan: Plan, number: int, layer: int) -> None:
    """Pieces of a row tile are counted from 0 on, and who reads a column knows how many there are."""
    phase = plan.steps[number]
    assert isinstance(phase, Phase)
    pieces = pieces_of(plan, number, layer)
    if phase.whole:
        many = phase.row_tiles_each(plan.programs) >= plan.tuning.whole_row_tiles
        assert many or phase.longer_if_whole(plan.programs) <= plan.tuning.uneven_tiles
        assert set(pieces) - {0} <= {phase.pieces} == {1}
        return
    assert max(pieces) <= phase.pieces and phase.parts == phase.splits * phase.pieces <= phase.most_parts
    row_tile = 0
    for i, group in enumerate(phase.layers[layer]):
        (team,) = (t for t, groups in enumerate(phase.teams) if i in groups)
        tiles, k_tiles = phase.team_tiles(team, layer), phase.k_tiles(team, layer)
        sharers = phase.sharers(layer, plan.programs)[team]
        for _ in range(group.row_tiles):
            begin = (row_tile + phase.tile_shift(i, layer)) * k_tiles
            first, last = (sharer(tiles, sharers, tile) for tile in (begin, begin + k_tiles - 1))
            assert pieces[row_tile] == last - first + 1
            row_tile += 1
        row_tile = phase.tile_starts[i + 1]


def arrays(plan: Plan) -> Iterator[tuple[int, int]]:
    """First word and size of every array of a layer's words and of the head's."""
    for number, step in enumerate(plan.steps):
        if isinstance(step, Attention):
            yield plan.offset("sums", number), step.parts * plan.batch * step.heads * step.head_dim
            yield plan.offset("weights", number), step.parts * plan.batch * step.heads
            continue
        if isinstance(step, Collect):
            continue
        if isinstance(step, Phase):
            yield plan.offset("sums", number), step.parts * plan.batch * step.padded_rows
        if step.source.kind == "stream":
            yield plan.offset("squares", number), plan.batch * plan.squares(number)
            yield plan.offset("stream", number), plan.batch * plan.width


@given(models(), PROGRAMS)
@settings(max_examples=60, deadline=None)
def test_words_and_shared_memory(model: Model, programs: int) -> None:
    plan = drawn_plan(model, programs)
    end = 0
    for begin, size in sorted(arrays(plan)):
        assert begin >= end and begin % 4 == 0
        end = begin + size
        assert end <= plan.layer_words or begin >= 2 * plan.layer_words
    assert end <= plan.words and plan.layer_words % 4 == 0
    phases = [step for step in plan.steps if isinstance(step, Phase)]
    for phase in phases:
        for layer, groups in enumerate(phase.layers):
            assert all(
                begin + group.row_tiles <= end
                for group, begin, end in zip(groups, phase.tile_starts[:-1], phase.tile_starts[1:], strict=True)
            ), layer
        assert phase.padded_rows == TILE_ROWS * phase.tile_starts[-1]
        for team, layer in itertools.product(range(len(phase.teams)), range(len(phase.layers))):
            assert phase.k_tiles(team, layer) <= plan.activation_tiles
    held = plan.stages * (TILE_BYTES + 16) + plan.input_bytes + HEADS_BYTES + 4 * SMALL_FLOATS
    assert plan.stages >= 4 and held <= SHARED_MEMORY
    epochs = [plan.epoch(layer, odd) for layer in range(-1, plan.layers + 1) for odd in range(2)]
    assert len({0, *epochs}) == 1 + len(epochs) and max(epochs) < 256


@given(models(), PROGRAMS)
@settings(max_examples=60, deadline=None)
def test_what_differs_between_layers_has_a_column(model: Model, programs: int) -> None:
    plan = drawn_plan(model, programs)
    columns = plan.numbers.columns
    assert list(columns.values()) == list(range(len(columns)))
    assert all(len(values) == plan.layers and len(set(values)) > 1 for values in columns)
    for number, step in enumerate(plan.steps):
        numbers = plan.numbers.of_steps[number]
        for output in outputs_of(step):
            check_output(plan, output)
            for values in plan.numbers.of_output(output).values():
                assert len(values) == len(output.steps)
                assert len(set(values)) == 1 or values in columns
        for values in (plan.first_programs[number], *numbers.values()):
            assert len(values) == (plan.layers if number < plan.in_layer else 1)
            assert len(set(values)) == 1 or values in columns
        if isinstance(step, Attention):
            assert numbers == {"window": tuple(window or 0 for window in model.windows)}
        if isinstance(step, Phase):
            check_numbers(step, numbers, plan.programs)


def check_output(plan: Plan, output: Output) -> None:
    """Its first word and those after it are in its phase's array, behind rows that the layer has."""
    numbers = plan.numbers.of_output(output)
    for layer, (step, group) in enumerate(zip(output.steps, output.groups, strict=True)):
        phase, now = plan.steps[step], {name: values[layer] for name, values in numbers.items()}
        assert isinstance(phase, Phase)
        column = now["begin"] - plan.offset("sums", step)
        assert phase.layers[layer][group].rows > 0 and now["row"] == phase.padded_rows
        assert phase.tile_starts[group] * TILE_ROWS <= column < phase.tile_starts[group + 1] * TILE_ROWS
        # Tiles are told from a column of the member's: the first one's is that of the phase's column.
        tile = now["start"] // TILE_ROWS + now["shift"]
        assert tile == column // TILE_ROWS + phase.tile_shift(group, layer)
        assert now["second"] == (step == output.phases[-1] != output.phases[0])
    assert len(output.phases) <= 2


def check_numbers(phase: Phase, numbers: dict[str, tuple[int, ...]], programs: int) -> None:
    for layer, groups in enumerate(phase.layers):
        now = {name: values[layer] for name, values in numbers.items()}
        sizes = phase.team_programs(layer, programs)
        for team, (first, *_) in enumerate(phase.teams):
            assert now[f"tiles {team}"] == phase.team_tiles(team, layer)
            assert now[f"k_tiles {team}"] == phase.k_tiles(team, layer)
            assert now[f"sharers {team}"] == max(1, phase.sharers(layer, programs)[team])
            assert now[f"start {team}"] == sum(sizes[:team])
            assert (now[f"x_start {team}"], now[f"k {team}"]) == (groups[first].x_start, groups[first].k)
        for i, group in enumerate(groups):
            assert (now[f"row_tiles {i}"], now[f"row_start {i}"]) == (group.row_tiles, group.row_start)
            assert now[f"shift {i}"] == phase.tile_shift(i, layer)


@given(
    length=st.integers(0, 3000) | st.integers(0, 40).map(lambda n: max(0, 64 * n - 1)),
    window=st.just(0) | st.integers(1, 3100) | st.integers(1, 40).map(lambda n: 64 * n),
    parts=st.sampled_from([1, 2, 4, 8, 16]),
)
@settings(max_examples=150, deadline=None)
def test_parts_of_the_positions_cover_what_is_visible_once(length: int, window: int, parts: int) -> None:
    read = Output((0,), (0,), (0,))
    attention = Attention("attention", 2, 2, 128, parts, (window,), (read,) * 3, 0, 1, None, 1)
    found = attend.span(attention, jnp.int32(length), jnp.int32(window), jnp.arange(parts, dtype=jnp.int32))
    first, begins, ends = (np.broadcast_to(np.asarray(a), parts) for a in found)
    seen = max(0, length + 1 - window) if window else 0
    assert (first == seen).all()
    tiles = [t for begin, end in zip(begins, ends, strict=True) for t in range(begin, end)]
    assert tiles == list(range(seen // TILE_ROWS, length // TILE_ROWS + 1))
    # One part alone adds the new token.
    assert sum(begin <= length // TILE_ROWS < end for begin, end in zip(begins, ends, strict=True)) == 1


@given(st.integers(1, 40000), eighths(4000), PROGRAMS)
@settings(deadline=None)
def test_splits_are_powers_of_two_and_items_stay_long(rows: int, k: int, programs: int) -> None:
    splits, k_tiles = splits_for(rows, k, programs, TUNING), math.ceil(k / TILE_K)
    assert splits in (1, 2, 4, 8)
    assert splits == 8 or math.ceil(k_tiles / splits) <= 12
    assert splits == 1 or k_tiles >= 4 * splits


@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 20).map(lambda n: 8 * n))
@settings(deadline=None)
def test_parts_are_powers_of_two_and_fit_the_programs(batch: int, kv_heads: int, programs: int) -> None:
    parts = parts_for(batch, kv_heads, programs, TUNING)
    assert 128 % parts == 0 and parts <= TUNING.most_parts
    assert parts == 1 or parts * batch * kv_heads <= programs
    assert parts == TUNING.most_parts or 2 * parts * batch * kv_heads > programs


def test_splits_fill_the_programs_and_leave_items_long() -> None:
    shapes = ((1024, 4096), (4096, 1024), (3072, 4096), (22016, 1536), (1536, 11008))
    assert [splits_for(rows, k, 128, TUNING) for rows, k in shapes] == [8, 2, 4, 1, 8]
    assert splits_for(64, 256, 128, TUNING) == 1
    assert [parts_for(batch, kv_heads, 128, TUNING) for batch, kv_heads in ((1, 8), (1, 32), (4, 8), (4, 40))] == [
        16,
        4,
        4,
        1,
    ]


def test_problems_are_told() -> None:
    plan = drawn_plan(MODELS["split inputs"], 24)
    first = plan.steps[0]
    assert isinstance(first, Phase)

    def with_first(**fields: int) -> Plan:
        groups = tuple((dataclasses.replace(group, **fields),) for (group,) in first.layers)
        return dataclasses.replace(plan, steps=(dataclasses.replace(first, layers=groups), *plan.steps[1:]))

    (group,) = first.layers[0]
    two = dataclasses.replace(first, layers=((group, dataclasses.replace(group, x_start=64)),) * len(first.layers))
    for changed, reason in (
        (dataclasses.replace(plan, steps=(two, *plan.steps[1:])), "parts of the residual stream"),
        (dataclasses.replace(plan, programs=0), "fewer programs"),
        (with_first(k=1020), "multiple of 8"),
        (with_first(x_start=2), "multiple of 4"),
        (dataclasses.replace(plan, layers=126), "125 layers"),
        (dataclasses.replace(plan, batch=9), "9 sequences for 8 warps"),
        (with_first(k=2**20), "no shared memory"),
    ):
        assert reason in str(changed.problems())


def test_row_tiles_are_whole_where_shares_stay_nearly_even() -> None:
    """Fewer words for those who read the output, for a few tiles that some program has more: as the tuning says."""
    groups = ((Group(0, 3072, 4096),),)
    phase = Phase("down", groups, Source("sum", (Output((0,), (0,), (0,)),)), splits=4)
    # 48 row tiles of 8 tiles a split, shared by 32 programs: 12 each, or 16 of some and 8 of others.
    assert (phase.longer_if_whole(128), phase.most_pieces(128)) == (4, 2)
    free = dataclasses.replace(phase, layers=((Group(0, 4096, 4096),),))
    assert (free.longer_if_whole(128), free.most_pieces(128)) == (0, 1)
    arguments = shapes_of(Model(LOW_RANK[:2], LOW_RANK[1:], batch=4, width=1024, ff=2048))
    for uneven in (-1, 0, 4, 100):
        plan, _ = building.plan_of(*arguments[:6], 24, Tuning(uneven_tiles=uneven))
        assert plan.problems() is None
        for step in plan.steps:
            if isinstance(step, Phase):
                most = uneven if step.name != "qkv up" else min(uneven, 0)
                assert step.whole == (dataclasses.replace(step, whole=False).longer_if_whole(24) <= most)


def test_sizes_of_a_device_are_data() -> None:
    measured = [tuning_for("NVIDIA H200", batch, 200, False) for batch in (1, 2, 3, 8)]
    assert measured[0] != measured[1] == measured[2] == measured[3]
    assert measured[3].readers == TUNING.readers == 2
    assert all(1 <= sizes.tiles_in_flight < 8 and sizes.tiles_in_flight % 0.5 == 0 for sizes in measured)
    assert all(sizes.words_at_once % 4 == 0 for sizes in measured)
    assert tuning_for("", 1, 200, False) == TUNING


@pytest.mark.parametrize(("batch", "megabytes", "differ"), [(1, 200, False), (1, 350, True), (4, 200, False)])
def test_other_hoppers_take_the_sizes_of_the_one_that_was_measured(batch: int, megabytes: int, differ: bool) -> None:
    found = tuning_for("NVIDIA H100 80GB HBM3", batch, megabytes, differ)
    assert found == tuning_for("NVIDIA H200", batch, megabytes, differ) != TUNING


def test_a_large_layer_has_more_tiles_in_flight_where_words_are_few() -> None:
    def tiles(rank: int | None, batch: int) -> float:
        model = Model((rank,), (rank,), batch=batch, width=4096, ff=11008, heads=32, kv_heads=32, dtype=jnp.bfloat16)
        with assume_target(H200):
            return layers.plan_here(*shapes_of(model)[:6])[0].tuning.tiles_in_flight

    assert [tiles(*case) for case in ((1024, 1), (2048, 1), (None, 1), (None, 2))] == [3.5, 4, 4, 3]


def test_layers_that_differ_have_more_readers() -> None:
    with assume_target(H200):
        alike, differ = (
            layers.plan_here(*shapes_of(Model(ranks, ranks, batch=1))[:6])[0] for ranks in ((72, 72), (72, 136))
        )
    assert (alike.tuning.readers, differ.tuning.readers) == (1, 2)
