"""Ranks within their budget, and greedy ones against every other choice where there are few."""

import itertools

import numpy as np
import pytest

from flashsvd_jax.compress.allocation import uniform_ranks
from flashsvd_jax.compress.budget import Budget, Target, budget_of
from flashsvd_jax.compress.greedy import greedy_ranks
from flashsvd_jax.errors import RequestError
from flashsvd_jax.param_specs import Site
from flashsvd_jax.shapes import SHAPES, kept_share, layer_sites, shape_config


def site(name: str, d_out: int, d_in: int) -> Site:
    return Site(name, d_out, d_in, "heads", "embed", False)


def numbers(site: Site, rank: int | None) -> int:
    return site.d_out * site.d_in if rank is None else rank * (site.d_out + site.d_in)


def share(sites: list[Site], ratio: float, multiple: int = 1) -> Budget:
    return Budget(ratio * sum(s.d_out * s.d_in for s in sites), numbers, multiple)


def falling(count: int, seed: int, size: float = 1.0) -> np.ndarray:
    return size * np.sort(np.random.default_rng(seed).uniform(size=count) ** 4)[::-1]


def lost(gains: dict[str, np.ndarray], ranks: dict[str, int]) -> float:
    return sum(float(gains[name][rank:].sum()) for name, rank in ranks.items())


def size(sites: list[Site], ranks: dict[str, int]) -> int:
    return sum(ranks[s.name] * (s.d_out + s.d_in) if s.name in ranks else s.d_out * s.d_in for s in sites)


SITES = [site("square", 24, 24), site("wide", 16, 48), site("tall", 48, 16), site("small", 8, 24)]
GAINS = {s.name: falling(min(s.d_out, s.d_in), i, 10.0**i) for i, s in enumerate(SITES)}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_uniform_ranks_are_those_of_the_published_shapes(name: str, ratio: float) -> None:
    config = shape_config(name, ratio)
    budget = budget_of(Target("ratio", ratio), config.dense(), 2)
    assert uniform_ranks(layer_sites(config), ratio, budget) == config.factorization.rank_by_site
    assert kept_share(config) <= ratio


def test_uniform_ranks_are_rounded_down_but_not_away() -> None:
    assert uniform_ranks(SITES, 0.9, share(SITES, 0.9, 4)) == {"square": 8, "wide": 8, "tall": 8, "small": 4}
    assert uniform_ranks(SITES, 0.9, share(SITES, 0.9, 8)) == {"square": 8, "wide": 8, "tall": 8, "small": 5}


@pytest.mark.parametrize("ratio", [0.4, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("multiple", [1, 4])
def test_greedy_ranks_use_the_budget_up_and_do_not_exceed_it(ratio: float, multiple: int) -> None:
    ranks = greedy_ranks(SITES, share(SITES, ratio, multiple), GAINS)
    budget = ratio * sum(s.d_out * s.d_in for s in SITES)
    largest_step = max(s.d_out + s.d_in for s in SITES) * 2 * multiple
    assert budget - largest_step < size(SITES, ranks) <= budget
    assert all(rank % multiple == 0 for rank in ranks.values())


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
def test_greedy_ranks_lose_least_of_all_of_that_size(ratio: float) -> None:
    """Sites of one shape, so that every step costs the same and the best choice is that of the largest gains."""
    sites = [site(name, 12, 18) for name in "abc"]
    gains = {s.name: falling(12, i, 3.0**i) for i, s in enumerate(sites)}
    ranks = greedy_ranks(sites, share(sites, ratio), gains)
    budget = ratio * sum(s.d_out * s.d_in for s in sites)
    choices = (dict(zip("abc", choice, strict=True)) for choice in itertools.product(range(1, 8), repeat=3))
    least = min(lost(gains, choice) for choice in choices if size(sites, choice) <= budget)
    assert lost(gains, ranks) <= least + 1e-12


def test_greedy_ranks_lose_less_than_uniform_ones() -> None:
    greedy, uniform = greedy_ranks(SITES, share(SITES, 0.5), GAINS), uniform_ranks(SITES, 0.5, share(SITES, 0.5))
    assert lost(GAINS, greedy) < 0.7 * lost(GAINS, uniform)


def test_of_equal_gains_those_of_the_smaller_site_come_first() -> None:
    sites = [site("large", 24, 96), site("small", 24, 24)]
    gains = dict.fromkeys(("large", "small"), 0.8 ** np.arange(24))
    ranks = greedy_ranks(sites, share(sites, 0.4), gains)
    assert ranks["small"] > ranks["large"] + 3


def test_a_site_that_is_worth_it_stays_dense() -> None:
    gains = {"even": np.full(24, 1.0), "steep": np.array([1e3] + [1e-9] * 23)}
    sites = [site("even", 24, 24), site("steep", 24, 24)]
    assert greedy_ranks(sites, share(sites, 0.6), gains) == {"steep": 2}


def test_a_budget_too_low_for_the_lowest_rank_is_an_error() -> None:
    with pytest.raises(RequestError, match=r"lowest ranks everywhere: they cost 1600, and 249.6 is left"):
        greedy_ranks(SITES, share(SITES, 0.1, 8), GAINS)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 60.0, float("nan")])
def test_a_ratio_is_between_0_and_1(ratio: float) -> None:
    with pytest.raises(RequestError, match=r"between 0 and 1, not"):
        Target("ratio", ratio)
