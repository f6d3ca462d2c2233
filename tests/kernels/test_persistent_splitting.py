"""How phases are divided by what it costs: by count for Llama-2-7B's widths, and what is weighed against what."""

import dataclasses

import pytest
from persistent_models import Model, plan_of, shapes_of

from pallas_kernels.persistent import splitting
from pallas_kernels.persistent.plan import Plan
from pallas_kernels.persistent.steps import Phase
from pallas_kernels.persistent.tuning import Tuning

COSTS = Tuning(kilobyte_tiles=0.175, readers=2)


def plan(rank: int | None, batch: int, tuning: Tuning) -> Plan:
    """Of two layers."""
    model = Model(
        (rank,) * 2, (rank if rank is None else rank * 3 // 2,) * 2, batch=batch, width=4096, ff=11008, heads=32
    )
    found, _ = plan_of(shapes_of(model), 132, tuning)
    assert found.problems() is None
    return found


def costs_of(plan: Plan) -> splitting.Costs:
    tuning = dataclasses.replace(plan.tuning, kilobyte_tiles=COSTS.kilobyte_tiles)
    return splitting.Costs(plan.steps, plan.in_layer, plan.programs, plan.batch, tuning)


def words(plan: Plan) -> float:
    """Of a layer, that a program reads."""
    costs = costs_of(plan)
    return sum(map(costs.words, range(plan.in_layer)))


@pytest.mark.parametrize("rank", [832, 1232, None])
@pytest.mark.parametrize("batch", [1, 4, 8])
def test_a_layer_costs_less(rank: int | None, batch: int) -> None:
    before, after = (plan(rank, batch, dataclasses.replace(COSTS, kilobyte_tiles=cost)) for cost in (0.0, 0.175))
    assert costs_of(after).whole() < costs_of(before).whole()
    assert words(after) < (0.8 if rank and batch > 1 else 0.95) * words(before)
    assert after.stages >= before.stages


def test_more_sequences_have_fewer_words_each() -> None:
    few, many = (words(plan(1024, batch, COSTS)) / batch for batch in (1, 8))
    assert many < 0.8 * few


def test_where_words_cost_little_shares_are_alike() -> None:
    """Nothing is left to gain for a phase alone."""
    found = plan(1024, 4, dataclasses.replace(COSTS, kilobyte_tiles=1e-6))
    for step in found.steps[: found.in_layer]:
        if isinstance(step, Phase):
            share = step.work(0, found.programs)
            assert max(share) <= sum(share) / len(share) + 2


def test_words_of_an_input_are_its_columns_times_their_parts() -> None:
    found = plan(1024, 2, COSTS)
    costs = costs_of(found)
    for number, step in enumerate(found.steps[: found.in_layer]):
        if isinstance(step, Phase) and step.source.kind == "sum":
            (output,) = step.source.of
            parts = found.steps[output.steps[0]]
            assert isinstance(parts, Phase)
            each = costs.words(number) / (2 * 128 * step.activation_tiles)
            assert parts.splits <= each <= parts.parts


def test_the_stream_as_it_was_before_costs_a_word_a_column() -> None:
    model = Model((832,) * 2, (1200,) * 2, batch=2, width=4096, ff=11008, heads=32, absorbed=True)
    found, _ = plan_of(shapes_of(model), 132, COSTS)
    (number,) = (i for i, s in enumerate(found.steps) if isinstance(s, Phase) and s.source.kind == "kept")
    assert costs_of(found).words(number) == 2 * 128 * found.phase(number).activation_tiles
