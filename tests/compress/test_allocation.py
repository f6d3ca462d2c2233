"""Ranks within their budget, and greedy ones against every other choice where there are few."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from flashsvd_jax.compress.allocation import (
    SENSITIVITY_RATIOS,
    check_ranks,
    read_ranks,
    sensitivity_ranks,
    shared_out,
    uniform_ranks,
    v2_ranks,
)
from flashsvd_jax.compress.budget import Budget, Target, budget_of
from flashsvd_jax.compress.greedy import alike_ranks, greedy_ranks
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


def test_alike_ranks_are_the_best_of_those_that_are_the_same_in_all_layers() -> None:
    sites = [site(f"layers_{i}.{kind}", 12, 18) for i in range(3) for kind in "ab"]
    gains = {s.name: falling(12, i, 3.0**i) for i, s in enumerate(sites)}
    ranks = alike_ranks(sites, share(sites, 0.5), gains)
    assert all(ranks[f"layers_{i}.{kind}"] == ranks[f"layers_0.{kind}"] for i in range(3) for kind in "ab")
    budget = 0.5 * sum(s.d_out * s.d_in for s in sites)
    assert size(sites, ranks) <= budget
    choices = ({s.name: pair[s.name[-1] == "b"] for s in sites} for pair in itertools.product(range(1, 8), repeat=2))
    least = min(lost(gains, choice) for choice in choices if size(sites, choice) <= budget)
    assert lost(gains, greedy_ranks(sites, share(sites, 0.5), gains)) < lost(gains, ranks) <= least + 1e-12


def test_alike_ranks_are_those_that_the_smallest_of_a_kind_can_have() -> None:
    """As the basis of a last block, which fewer layers share, is smaller."""
    sites = [site("layers_0.q", 24, 24), site("layers_2.q", 12, 24)]
    ranks = alike_ranks(sites, share(sites, 0.5), {"layers_0.q": falling(24, 0), "layers_2.q": falling(12, 1)})
    assert len(set(ranks.values())) == 1 and 0 < ranks["layers_0.q"] <= 8


def test_of_equal_gains_those_of_the_smaller_site_come_first() -> None:
    sites = [site("large", 24, 96), site("small", 24, 24)]
    gains = dict.fromkeys(("large", "small"), 0.8 ** np.arange(24))
    ranks = greedy_ranks(sites, share(sites, 0.4), gains)
    assert ranks.get("small", 24) > ranks["large"] + 3


def test_a_site_that_is_worth_it_stays_dense() -> None:
    gains = {"even": np.full(24, 1.0), "steep": np.array([1e3] + [1e-9] * 23)}
    sites = [site("even", 24, 24), site("steep", 24, 24)]
    assert greedy_ranks(sites, share(sites, 0.6), gains) == {"steep": 2}


def test_what_pays_only_in_the_end_is_seen_from_the_start() -> None:
    """Each rank of "even" is worth less than one of "other", but dense, for the price of rank 12, it gains twice as much."""
    sites = [site("even", 24, 24), site("other", 24, 24)]
    gains = {"even": np.full(24, 1.0), "other": np.array([1.1] * 12 + [0.0] * 12)}
    assert greedy_ranks(sites, share(sites, 624 / 1152), gains) == {"other": 1}


def test_a_budget_too_low_for_the_lowest_rank_is_an_error() -> None:
    with pytest.raises(RequestError, match=r"lowest ranks everywhere: they cost 1600, and 230.4 is left"):
        greedy_ranks(SITES, share(SITES, 0.1, 8), GAINS)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 60.0, float("nan")])
def test_a_ratio_is_between_0_and_1(ratio: float) -> None:
    with pytest.raises(RequestError, match=r"between 0 and 1, not"):
        Target("ratio", ratio)


@pytest.mark.parametrize("multiple", [1, 3])
def test_greedy_is_near_the_best_of_all_choices_where_sites_may_stay_dense(multiple: int) -> None:
    """Within the worth of the one step for which there was no room."""
    sites = [site("a", 12, 18), site("b", 10, 14), site("c", 16, 12)]
    gains = {s.name: falling(min(s.d_out, s.d_in), i, 3.0**i) for i, s in enumerate(sites)}
    for ratio in (0.5, 0.7, 0.9):
        budget = share(sites, ratio, multiple)
        choices = itertools.product(*[[*budget.ranks(s), None] for s in sites])
        least = np.inf
        for choice in choices:
            ranks = {s.name: rank for s, rank in zip(sites, choice, strict=True) if rank is not None}
            if size(sites, ranks) <= budget.amount:
                least = min(least, lost(gains, ranks))
        found = greedy_ranks(sites, budget, gains)
        assert size(sites, found) <= budget.amount
        assert lost(gains, found) <= least + 0.1 * sum(float(g.sum()) for g in gains.values())


LAYERS = [Site(f"layers_{i}.{name}", *shape, "heads", "embed", False)
          for i in range(4) for name, shape in (("q_proj", (40, 40)), ("up_proj", (64, 40)))]  # fmt: skip
LAYER_GAINS = {s.name: falling(40, i, 1e6 * 10.0**i) for i, s in enumerate(LAYERS)}


@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.8])
def test_v2_removes_shares_in_inverse_proportion_to_the_logarithm_of_the_loss(ratio: float) -> None:
    found = v2_ranks(LAYERS, ratio, LAYER_GAINS, share(LAYERS, ratio))
    for kind in ("q_proj", "up_proj"):
        members = [s for s in LAYERS if s.name.endswith(kind)]
        inverse = []
        for s in members:
            at = int(ratio * s.d_out * s.d_in / (s.d_out + s.d_in))
            inverse.append(1 / np.log(np.sqrt(LAYER_GAINS[s.name][at:].sum())))
        for s, value in zip(members, inverse, strict=True):
            removed = len(members) * (1 - ratio) * value / sum(inverse)  # Wang et al. 2025, algorithm 2
            assert found[s.name] == max(1, int((1 - removed) * s.d_out * s.d_in / (s.d_out + s.d_in)))
    assert size(LAYERS, found) <= ratio * sum(s.d_out * s.d_in for s in LAYERS)
    assert found["layers_3.q_proj"] > found["layers_0.q_proj"]  # larger losses keep more


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0])
def test_v2_of_losses_that_have_no_logarithm_above_0(scale: float) -> None:
    gains = {name: scale * 1e-6 * found for name, found in LAYER_GAINS.items()}
    found = v2_ranks(LAYERS, 0.5, gains, share(LAYERS, 0.5))
    assert all(1 <= rank <= 40 for rank in found.values())
    assert found["layers_3.q_proj"] >= found["layers_0.q_proj"]
    assert size(LAYERS, found) <= 0.5 * sum(s.d_out * s.d_in for s in LAYERS)
    same = v2_ranks(LAYERS, 0.5, dict.fromkeys(gains, np.zeros(40)), share(LAYERS, 0.5))
    assert same == uniform_ranks(LAYERS, 0.5, share(LAYERS, 0.5))


def test_what_v2_cannot_take_from_one_site_it_takes_from_the_others() -> None:
    removed = shared_out(np.array([100.0, 1.0, 1.0, 1.0]), 0.6)
    np.testing.assert_allclose(removed, [0.99, 0.47, 0.47, 0.47])


def test_sensitivity_takes_the_lowest_threshold_that_the_budget_allows() -> None:
    rng = np.random.default_rng(3)
    losses = {s.name: list(3 + np.sort(rng.uniform(0, 1 + i, 9))[::-1]) for i, s in enumerate(SITES)}

    def ranks(threshold: float) -> dict[str, int]:
        found = {}
        for s in SITES:
            fit = [r for r, loss in zip(SENSITIVITY_RATIOS, losses[s.name], strict=True) if loss <= threshold]
            if fit:
                found[s.name] = max(1, int(fit[0] * s.d_out * s.d_in / (s.d_out + s.d_in)))
        return found

    for ratio in (0.3, 0.5, 0.8):
        budget = share(SITES, ratio)
        fit = [t for t in sorted(itertools.chain(*losses.values())) if size(SITES, ranks(t)) <= budget.amount]
        assert sensitivity_ranks(SITES, budget, losses) == ranks(fit[0])
    with pytest.raises(RequestError, match="does not suffice for the lowest ranks everywhere"):
        sensitivity_ranks(SITES, share(SITES, 0.05), losses)


def test_ranks_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "ranks.json"
    file.write_text(json.dumps({"wide": 3}))
    assert read_ranks(file) == ({"wide": 3}, None)
    file.write_text(json.dumps({"family": "svd", "ranks": {"wide": 4}}))  # as a manifest
    assert read_ranks(file) == ({"wide": 4}, None)
    q, k = "layers_0.self_attn.q_proj", "layers_0.self_attn.k_proj"
    for groups, heads in (({q: 4, k: 4}, "own"), ({}, "whole")):
        file.write_text(json.dumps({"ranks": {q: 3, k: 2, "wide": 4}, "groups": groups}))
        assert read_ranks(file) == ({q: 3, k: 2, "wide": 4}, heads)
    file.write_text(json.dumps({"ranks": {q: 3, k: 2}, "groups": {q: 4}}))
    with pytest.raises(RequestError, match="of single heads for some"):
        read_ranks(file)
    for text in ("[1]", "{}", '{"wide": 1.5}', '{"ranks": {}}', "ranks"):
        file.write_text(text)
        with pytest.raises(RequestError, match=r"ranks\.json"):
            read_ranks(file)
    with pytest.raises(RequestError, match="no projection of the model's layers: lm_head"):
        check_ranks({"lm_head": 3, "wide": 3}, SITES)
    with pytest.raises(RequestError, match="the rank of wide must be from 1 to 16, its smaller side, not 17"):
        check_ranks({"wide": 17}, SITES)
