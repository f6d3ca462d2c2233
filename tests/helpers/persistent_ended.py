"""Machines of the persistent kernel's protocol that have run a model, and the items that the kernel itself finds."""

import types
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
from persistent_machine import Machine, in_random_order
from persistent_models import MODELS, arrays_of

from pallas_kernels.persistent import items
from pallas_kernels.persistent.items import PhaseItems
from pallas_kernels.persistent.plan import Plan
from pallas_kernels.persistent.steps import Phase

PROGRAMS = 24


class Recorded(Machine):
    """Keeps every program's inputs, by layer and step."""

    def input(self, number: int, layer: int, own: int, team: int, split: int, publishes: bool) -> Any:
        held = yield from super().input(number, layer, own, team, split, publishes)
        self.held = getattr(self, "held", {})
        self.held[layer, number, team, split] = held
        return held


def ended(name: str) -> Recorded:
    """A machine that has run a model twice, the second time in an odd step."""
    arguments, machine = arrays_of(MODELS[name]), None
    for seed in range(2):
        machine = Recorded.of(arguments, PROGRAMS, before=machine)
        in_random_order(machine, np.random.default_rng(seed))
    assert machine is not None
    return machine


def last_phases(plan: Plan) -> list[tuple[int, int]]:
    """(layer, step) of all phases whose words are still there at the end: of the last layer, and of the head."""
    found = [(plan.layers - 1, number) for number in range(plan.in_layer)]
    found += [(plan.layers, number) for number in range(plan.in_layer, len(plan.steps))]
    return [(layer, number) for layer, number in found if isinstance(plan.steps[number], Phase)]


def found_items(plan: Plan, number: int, layer: int, program: int) -> PhaseItems:
    """As the kernel finds them."""
    own = layer if number < plan.in_layer else 0
    shell = types.SimpleNamespace(plan=plan, number=lambda values, layer: jnp.int32(values[own]))
    place: Any = types.SimpleNamespace(launch=shell, step=number, layer=layer)
    phase = plan.steps[number]
    assert isinstance(phase, Phase)
    with mock.patch.object(items.lax, "axis_index", lambda name: jnp.int32(program)):
        return PhaseItems(place, phase)
