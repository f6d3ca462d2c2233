"""Ranks by time for the decode benchmark: as many parameters as uniform ranks; alike in all layers, less time by their costs."""

import jobs
import pytest
from allocated import allocated_config
from cases import CASES, tiny

from flashsvd_jax.compress.budget import decode_milliseconds
from flashsvd_jax.compress.decode_costs import load_costs
from flashsvd_jax.errors import RequestError
from flashsvd_jax.schema import count_params
from flashsvd_jax.shapes import layer_sites, shape_config


def test_it_has_as_many_parameters_as_uniform_ranks() -> None:
    case = next(case for case in CASES if case.ranks == "allocated")
    found, uniform = jobs.config_of(case), shape_config(case.model, case.ratio)
    assert count_params(found) == pytest.approx(count_params(uniform), rel=0.002)
    assert count_params(found) <= count_params(uniform)
    alike = allocated_config(case.model, case.ratio, alike=True)
    costs = load_costs()
    times = [decode_milliseconds(config, 2, costs) for config in (alike, found, uniform)]
    assert times[0] < 0.98 * times[1]
    # Layers that differ cost more than ranks by time save (rows of 1862c95), but save they do.
    differ = found.num_layers * costs.us_a_differing_layer / 1e3
    assert times[1] - differ < 0.98 * times[2] < times[2] < times[1] < times[2] + differ
    assert jobs.ranks_told(case, found) == "allocated"
    assert allocated_config(case.model, case.ratio) is found


def test_small_models_are_fastest_dense() -> None:
    with pytest.raises(RequestError, match=r"do(es)? not suffice|nothing to compress"):
        allocated_config("tiny", 0.5)
    assert not any(case.ranks.startswith("allocated") for case in tiny(CASES))


def test_alike_ranks_leave_whole_projections_dense() -> None:
    """In all layers, so that each of those is one product of the kernels, not two."""
    case = next(case for case in CASES if case.ranks == "allocated alike")
    found, uniform = jobs.config_of(case), shape_config(case.model, case.ratio)
    assert 0.99 * count_params(uniform) <= count_params(found) <= count_params(uniform)
    by_kind: dict[str, set[int | None]] = {}
    for site in layer_sites(found):
        by_kind.setdefault(site.name.partition(".")[2], set()).add(found.factorization.rank(site.name))
    assert all(len(ranks) == 1 for ranks in by_kind.values()) and {None} in by_kind.values()
    times = [decode_milliseconds(config, 2, load_costs()) for config in (found, uniform)]
    assert times[0] < 0.98 * times[1]
    assert jobs.ranks_told(case, found) == "allocated alike"
