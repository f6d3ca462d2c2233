"""What the persistent kernel emits to find its items and its inputs, run by numpy, against the machine that knows the protocol."""

import types
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from persistent_ended import PROGRAMS, Recorded, ended, found_items, last_phases
from persistent_machine import ACTIVATIONS
from persistent_models import EPS, Item, items_of
from persistent_threads import OPERANDS, Threads, running

from pallas_kernels.persistent import code, gates, inputs, stream, words
from pallas_kernels.persistent.columns import Columns, columns
from pallas_kernels.persistent.items import PhaseItems
from pallas_kernels.persistent.steps import THREADS, TILE_ROWS, Attention, Collect, Keep, Phase

ALL_PRODUCTS = (
    "dense among low rank", "some layers dense", "first layer low rank", "split latents", "norms and biases of dense ones",
    "one first factor for gate and up", "one layer", "absorbed", "absorbed, split inputs",
)  # fmt: skip


@pytest.mark.parametrize("name", ALL_PRODUCTS)
def test_items_and_inputs_are_those_of_the_protocol(name: str) -> None:
    machine = ended(name)
    plan = machine.plan
    for layer, number in last_phases(plan):
        phase = plan.steps[number]
        assert isinstance(phase, Phase)
        own = layer if number < plan.in_layer else 0
        seen = set()
        for program in range(PROGRAMS):
            found, wanted = found_items(plan, number, layer, program), items_of(plan, number, own, program)
            assert int(found.count) == len(wanted)
            if not wanted:
                continue
            team, split = int(found.team.number), int(found.split)
            check_items(phase, own, found, wanted)
            if (team, split, bool(found.is_first)) in seen:
                continue
            seen.add((team, split, bool(found.is_first)))
            check_input(machine, number, layer, program, found)


def test_the_embedding_is_published_as_the_protocol_does() -> None:
    machine = ended("one layer")
    plan, stored = machine.plan, 0
    machine.operands.append(machine.x)
    for program in range(PROGRAMS):
        threads = Threads(machine, program)

        def emit(body: Any, refs: Any, threads: Threads = threads) -> None:
            body(threads.emitter(0, -1, EPS), [], refs, None)

        place: Any = types.SimpleNamespace(launch=types.SimpleNamespace(plan=plan), emit=emit)
        with running(threads):
            inputs.embed(place, OPERANDS + (len(machine.operands) - 1 << 32))
        stored += len(threads.published)
    (added,) = plan.steps[0].source.of
    assert stored == plan.batch * plan.width * (1 + plan.steps[added.steps[0]].parts)


@pytest.mark.parametrize("name", ["absorbed", "absorbed, split inputs"])
def test_the_stream_is_kept_as_the_protocol_does(name: str) -> None:
    machine = ended(name)
    plan, layer, stored = machine.plan, machine.plan.layers - 1, 0
    (number,) = (number for number, step in enumerate(plan.steps) if isinstance(step, Keep))
    keep = plan.steps[number]
    for program in range(PROGRAMS):
        threads = Threads(machine, program)
        turn = (program - plan.first_programs[number][layer]) % PROGRAMS

        def emit(body: Any, given: Any, threads: Threads = threads) -> None:
            body(threads.emitter(number, layer, EPS), given, [], None)

        place: Any = types.SimpleNamespace(launch=types.SimpleNamespace(plan=plan), step=number, emit=emit)
        with running(threads), mock.patch.object(stream, "turn_of", lambda place, turn=turn: turn):
            stream.keep_stream(place)
        stored += len(threads.published)
    assert stored == plan.batch * (plan.width + keep.parts)


@pytest.mark.parametrize("name", ["dense among low rank", "heads of 64", "norms and biases of dense ones"])
def test_columns_are_those_of_the_protocol(name: str) -> None:
    """As attention and the head read them: every thread another sequence and column."""
    machine = ended(name)
    plan, last = machine.plan, machine.plan.layers - 1
    (attention,) = (step for step in plan.steps if isinstance(step, Attention))
    sizes = [attention.head_dim * n for n in (attention.heads, *[attention.kv_heads] * 2)]
    head = plan.steps[-1]
    assert isinstance(head, Collect)
    read = [(last, plan.steps.index(attention), of, size) for of, size in zip(attention.of, sizes, strict=True)]
    for layer, number, output, size in [*read, (plan.layers, len(plan.steps) - 1, head.of, head.columns // 4 * 4)]:
        places = np.arange(plan.batch * size // 4)
        for begin in range(0, len(places), THREADS):
            row, column = divmod(4 * np.resize(places[begin : begin + THREADS], THREADS), size)
            threads = Threads(machine, 0)
            with running(threads):
                got = columns(Columns(threads.emitter(number, layer, EPS), output), row, column)
            places_of = zip(row, column, strict=True)
            runs = [machine.output(output, layer, np.array([r]), c + np.arange(4)) for r, c in places_of]
            want = [ended_with(run) for run in runs]
            np.testing.assert_allclose(np.stack(got, 1), np.concatenate(want), rtol=1e-6, atol=1e-9)


def ended_with(run: Any) -> Any:
    """What a machine's generator gives, which need not wait."""
    while True:
        try:
            assert next(run) != "waits"
        except StopIteration as end:
            return end.value


@pytest.mark.parametrize(("name", "tolerance"), [("gelu", 5e-4), ("gelu_tanh", 1e-6)])
def test_gates_are_as_near_as_bfloat16_can_tell(name: str, tolerance: float) -> None:
    x = np.linspace(-4, 12, 3000)
    with running(Threads(ended("heads of 64"), 0)), np.errstate(over="ignore"):
        got = getattr(gates, name)(x)
        far = getattr(gates, name)(np.array([-60.0, -9.0, 60.0]))
    np.testing.assert_allclose(got, ACTIVATIONS[name](x), rtol=tolerance, atol=1e-12)
    np.testing.assert_allclose(far, [0, 0, 60], rtol=1e-6, atol=1e-12)


def test_words_of_another_epoch_are_seen() -> None:
    random = np.random.default_rng(0)
    for count in (1, 2, 3, 4, 5, 20, 128):
        written = random.integers(0, 1 << 24, count) * 256 + 7
        with mock.patch.object(code, "logic", lambda function, *bits: function(*bits)):
            assert words.differ([int(word) for word in written], 7) & 255 == 0
            for late in range(count):
                other = [int(word) - (1 if place == late else 0) for place, word in enumerate(written)]
                assert words.differ(other, 7) & 255


def test_a_function_of_three_bits_is_its_table() -> None:
    """As PTX has it: bit i of the table is the function's where i's bits are those of a, b and c, the first the highest."""
    for function in (words._any, words._either_differs):
        for i in range(8):
            bits = i >> 2 & 1, i >> 1 & 1, i & 1
            assert code.table_of(function) >> i & 1 == function(*bits)


def check_items(phase: Phase, layer: int, found: PhaseItems, wanted: list[Item]) -> None:
    for i, item in enumerate(wanted):
        got = found.item(jnp.int32(i))
        begin = int(got.begin)
        mine = (
            int(found.team.number),
            int(found.split),
            int(got.row_tile),
            begin,
            begin + int(got.count),
            int(got.piece),
        )
        assert mine == tuple(item)
        rows = found.rows(got.row_tile)
        column = phase.layers[layer], int(rows.output) // TILE_ROWS
        group = max(g for g in phase.teams[item.team] if phase.tile_starts[g] <= column[1] and column[0][g].rows)
        within = column[1] - phase.tile_starts[group]
        assert within < column[0][group].row_tiles
        assert int(rows.weight) == column[0][group].weight
        assert int(rows.row) == column[0][group].row_start + within * TILE_ROWS


def check_input(machine: Recorded, number: int, layer: int, program: int, found: PhaseItems) -> None:
    """A warpgroup that loads the input has what the machine has, and publishes what it does."""
    plan, team, split = machine.plan, int(found.team.number), int(found.split)
    phase = plan.steps[number]
    assert isinstance(phase, Phase)
    threads = Threads(machine, program, lanes=THREADS * plan.tuning.readers)
    with running(threads):
        e = threads.emitter(number, layer, EPS)
        given = (split, int(found.is_first), *(int(n) for n in (found.team.k_tiles, found.team.x_start, found.team.k)))
        inputs._Loader(e, phase, *given).run()
    held = machine.held[layer, number, team, split]
    got = threads.activations[: held.shape[1], : plan.batch].T
    np.testing.assert_allclose(got, held, rtol=1e-6, atol=1e-9)
    assert np.isnan(threads.activations[held.shape[1] :]).all() and np.isnan(threads.activations[:, plan.batch :]).all()
    count = held.shape[1] if phase.source.kind == "stream" and bool(found.is_first) else 0
    real = min(count, int(found.team.k) - split * held.shape[1])
    assert len(threads.published) == plan.batch * (real + 1 if count else 0)
