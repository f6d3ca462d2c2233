"""Programs of the persistent kernel in any order that words allow: they must end, and give the op's result."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from persistent_machine import Machine, Schedule, as_far_as_it_goes, in_random_order, with_a_laggard
from persistent_models import MODELS, Model, arrays_of, models, plan_of, shapes_of

from pallas_kernels import (
    decode_layers,
)
from pallas_kernels.persistent.building import DEFAULT
from pallas_kernels.persistent.steps import Attention, Phase
from pallas_kernels.persistent.tuning import Tuning

SCHEDULES = [in_random_order, with_a_laggard, as_far_as_it_goes]


@functools.cache
def called(name: str) -> tuple[tuple[Any, ...], Any]:
    """Arguments of `decode_layers` and what the reference makes of them."""
    arguments = arrays_of(MODELS[name])
    return arguments, jax.jit(decode_layers.reference)(*arguments)


def check(name: str, programs: int, schedule: Schedule, seed: int) -> None:
    """A machine that follows a schedule gives what the reference does."""
    compare(*called(name), programs, schedule, seed)


def compare(
    arguments: tuple[Any, ...], want: Any, programs: int, schedule: Schedule, seed: int, tuning: Tuning = DEFAULT
) -> None:
    machine = Machine.of(arguments, programs, tuning)
    schedule(machine, np.random.default_rng(seed))
    check_results(machine, want)


def check_results(machine: Machine, want: Any) -> None:
    np.testing.assert_allclose(machine.logits, want.logits, rtol=1e-3, atol=1e-3)
    for layer, caches in enumerate(zip(want.keys, want.values, strict=True)):
        for got, expected in zip(machine.caches(layer), caches, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("programs", [8, 24])
def test_the_plan_computes_the_op_whatever_the_order(name: str, programs: int) -> None:
    for seed in range(2):
        check(name, programs, in_random_order, seed)


@pytest.mark.parametrize("name", MODELS)
def test_so_does_one_whose_phases_are_divided_by_cost(name: str) -> None:
    compare(*called(name), 24, in_random_order, 0, Tuning(kilobyte_tiles=0.3))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("schedule", [with_a_laggard, as_far_as_it_goes])
def test_no_word_is_lost_when_programs_are_far_apart(name: str, schedule: Schedule) -> None:
    check(name, 8, schedule, 2)
    check(name, 24, schedule, 3)


def steps_of(name: str, count: int) -> list[tuple[tuple[Any, ...], Any]]:
    """Steps of a model at other positions each, some of them before those of the last, with what the reference makes of them."""
    arguments, _ = called(name)
    rng, (x, *between, start), slots = np.random.default_rng(0), arguments, arguments[4][0].shape[2]
    found = []
    for _ in range(count):
        there = rng.integers(0, slots, start.shape).astype(np.int32)
        given = (rng.standard_normal(x.shape).astype(x.dtype), *between, there)
        found.append((given, jax.jit(decode_layers.reference)(*given)))
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_word_of_a_step_before_is_taken(name: str, schedule: Schedule) -> None:
    """The machine would say so: of words that steps hand on it knows when they were written."""
    machine = None
    for seed, (arguments, want) in enumerate(steps_of(name, 3)):
        machine = Machine.of(arguments, 24, before=machine)
        schedule(machine, np.random.default_rng(seed))
        check_results(machine, want)


def test_without_odd_steps_one_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "epoch", lambda machine, layer: machine.plan.epoch(layer))
    with pytest.raises(AssertionError, match="a word of another time was taken"):
        test_no_word_of_a_step_before_is_taken("split latents", in_random_order)


@pytest.mark.slow
@given(models(), st.integers(1, 6).map(lambda n: 8 * n), st.sampled_from(SCHEDULES))
@settings(max_examples=8, deadline=None)
def test_a_model_of_any_structure(model: Model, programs: int, schedule: Schedule) -> None:
    arguments = arrays_of(model)
    compare(arguments, jax.jit(decode_layers.reference)(*arguments), programs, schedule, 0)


def test_the_models_have_what_the_protocol_must_stand() -> None:
    """Inputs in parts, positions in parts, and sizes that differ from layer to layer."""
    plans = {name: plan_of(shapes_of(model), 24)[0] for name, model in MODELS.items()}
    splits = {
        name: {step.name: step.splits for step in plan.steps if isinstance(step, Phase)} for name, plan in plans.items()
    }
    split = {(name, step) for name, of in splits.items() for step, count in of.items() if count > 1}
    assert split == {
        *(("split inputs", step) for step in ("qkv down", "o down", "gate_up", "head")),
        *(("first layer low rank", step) for step in ("qkv down", "gate_up down", "head")),
        *(("absorbed, split inputs", step) for step in ("qkv down", "o down", "gate_up up", "down up", "head")),
        *(("split latents", step) for step in ("qkv", "gate_up down", "down down", "down up", "head down", "head up")),
    }
    parts = {
        step.parts
        for model in MODELS.values()
        for programs in (8, 24)
        for step in plan_of(shapes_of(model), programs)[0].steps
        if isinstance(step, Attention)
    }
    assert parts == {1, 2, 4, 8, 16}
    assert plans["low rank, other ranks in every layer"].numbers.columns
    few, _ = plan_of(shapes_of(MODELS["many rows"]), 8)
    phases = [step for step in few.steps if isinstance(step, Phase)]
    assert {step.name for step in phases if step.whole} >= {"head", "gate_up up"}
    assert {step.pieces for step in phases} >= {1, 2}


@pytest.mark.parametrize("name", ["norms and biases", "dense attention, low-rank MLP"])
def test_products_and_reference_agree(name: str) -> None:
    arguments, want = called(name)
    got = jax.jit(functools.partial(decode_layers, implementation="products"))(*arguments)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    assert not got.carried.stall.any()
