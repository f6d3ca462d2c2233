"""D-Rank's ranks against the equations of its paper (Mi et al. 2025), and what sites cannot hold."""

import math

import numpy as np
import pytest

from flashsvd_jax.compress.budget import Budget
from flashsvd_jax.compress.effective_rank import TO_VALUES, effective_rank, effective_ranks
from flashsvd_jax.param_specs import Site

ATTENTION = {"q_proj": (64, 64), "k_proj": (64, 64), "v_proj": (64, 64)}
GROUPED = {"q_proj": (64, 64), "k_proj": (16, 64), "v_proj": (16, 64)}


def sites_of(shapes: dict[str, tuple[int, int]], layers: int = 4) -> list[Site]:
    return [
        Site(f"layers_{i}.self_attn.{name}", *shape, "heads", "embed", False)
        for i in range(layers)
        for name, shape in {**shapes, "o_proj": (64, 96)}.items()
    ]


def spectra(sites: list[Site], steepness: float) -> dict[str, np.ndarray]:
    """Squared singular values, steeper for queries and keys than for the others, and for some layers than for others."""
    rates = np.random.default_rng(0).uniform(0.2, 1.0, len(sites))
    return {
        s.name: np.exp(-steepness * rate * (1 + 3 * s.name.endswith(("q_proj", "k_proj"))) * np.arange(min(s.d_out, s.d_in)))
        for s, rate in zip(sites, rates, strict=True)
    }  # fmt: skip


def numbers(site: Site, rank: int | None) -> int:
    return site.d_out * site.d_in if rank is None else rank * (site.d_out + site.d_in)


def budget(sites: list[Site], ratio: float, multiple: int = 1) -> Budget:
    return Budget(ratio * sum(s.d_out * s.d_in for s in sites), numbers, multiple)


def of_kind(sites: list[Site], kind: str) -> list[Site]:
    return [s for s in sites if s.name.endswith(kind)]


def test_effective_rank_is_the_exponential_of_the_spectral_entropy() -> None:
    assert effective_rank(np.full(7, 3.0)) == pytest.approx(7)
    assert effective_rank(np.array([5.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(np.array([3.0, 1.0])) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )
    assert effective_rank(np.zeros(4)) == 1
    assert effective_rank(np.array([1e300, 1e-300])) == pytest.approx(1)


@pytest.mark.parametrize("ratio", [0.2, 0.35])
def test_ranks_are_those_of_the_papers_equations(ratio: float) -> None:
    """Equation 7 for each kind, then equations 9 to 12; at ratios where no site reaches its break-even."""
    sites = sites_of(ATTENTION)
    gains = spectra(sites, 0.05)
    found = effective_ranks(sites, ratio, gains, budget(sites, ratio))
    exact: dict[str, list[float]] = {}
    for kind in ("q_proj", "k_proj", "v_proj", "o_proj"):
        members, roots = of_kind(sites, kind), []
        for s in members:
            p = gains[s.name] / gains[s.name].sum()
            roots.append(math.sqrt(math.exp(-(p * np.log(p)).sum())))
        omega = members[0].d_out + members[0].d_in
        whole = ratio * sum(s.d_out * s.d_in for s in members)
        exact[kind] = [
            whole / sum(root * math.sqrt(omega) for root in roots) * root / math.sqrt(omega) for root in roots
        ]
    t = TO_VALUES * (sum(exact["q_proj"]) + sum(exact["k_proj"])) / 4
    expected = {
        "q_proj": [(1 - TO_VALUES) * k for k in exact["q_proj"]],
        "k_proj": [(1 - TO_VALUES) * k for k in exact["k_proj"]],
        "v_proj": [k + t for k in exact["v_proj"]],
        "o_proj": exact["o_proj"],
    }
    for kind, ranks in expected.items():
        assert max(ranks) < 32  # break-even, 64 x 64
        assert [found[s.name] for s in of_kind(sites, kind)] == [int(rank) for rank in ranks]


@pytest.mark.parametrize("shapes", [ATTENTION, GROUPED])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("steepness", [1e-9, 0.05, 3.0])
def test_the_budget_is_used_up_and_no_rank_is_beyond_break_even(
    shapes: dict[str, tuple[int, int]], ratio: float, steepness: float
) -> None:
    sites = sites_of(shapes)
    found = effective_ranks(sites, ratio, spectra(sites, steepness), budget(sites, ratio))
    assert found.keys() == {s.name for s in sites}
    for s in sites:
        assert 1 <= found[s.name] <= s.d_out * s.d_in / (s.d_out + s.d_in)
    whole, used = ratio * sum(s.d_out * s.d_in for s in sites), sum(numbers(s, found[s.name]) for s in sites)
    assert whole - sum(s.d_out + s.d_in for s in sites) < used <= whole


def test_what_is_beyond_break_even_goes_to_the_others_of_its_kind() -> None:
    sites = of_kind(sites_of(ATTENTION), "o_proj")
    gains = {s.name: np.ones(64) if i == 0 else np.array([1.0] + [1e-12] * 63) for i, s in enumerate(sites)}
    found = [effective_ranks(sites, 0.5, gains, budget(sites, 0.5))[s.name] for s in sites]
    break_even = 64 * 96 // (64 + 96)
    assert found == [break_even] + [int((2 * 64 * 96 - 64 * 96) / 3 / 160)] * 3


def test_what_values_cannot_hold_stays_with_queries_and_keys() -> None:
    sites = sites_of(GROUPED)
    ratio = 0.9
    even = dict.fromkeys((s.name for s in sites), np.ones(16))
    found = effective_ranks(sites, ratio, even, budget(sites, ratio))
    assert all(found[s.name] == 64 * 16 // (64 + 16) for s in of_kind(sites, "v_proj"))
    kept = 1 - (1 - ratio) * 16 / (64 + 16) / ratio  # values lack so much, of what queries and keys have
    assert all(found[s.name] == int(kept * ratio * 64 * 64 / 128) for s in of_kind(sites, "q_proj"))
    assert all(found[s.name] == int(kept * ratio * 16 * 64 / 80) for s in of_kind(sites, "k_proj"))


def test_a_basis_of_fewer_layers_gets_less_and_multiples_are_kept() -> None:
    full, last = (
        [Site(f"layers_{i}.self_attn.{n}_proj", rows, 640, "heads", "embed", False) for n in "qkv"]
        for i, rows in ((0, 1280), (2, 640))
    )
    sites = [*full, *last]
    even = {s.name: np.ones(640) for s in sites}
    found = effective_ranks(sites, 0.4, even, budget(sites, 0.4, 4))
    assert all(rank % 4 == 0 for rank in found.values())
    assert sum(numbers(s, found[s.name]) for s in sites) <= 0.4 * sum(s.d_out * s.d_in for s in sites)
    assert found["layers_0.self_attn.v_proj"] > found["layers_0.self_attn.q_proj"]
    exact = effective_ranks(sites, 0.4, even, budget(sites, 0.4))
    ranks = [exact[f"layers_{i}.self_attn.q_proj"] for i in (0, 2)]
    assert ranks[0] / ranks[1] == pytest.approx(
        math.sqrt((640 + 640) / (1280 + 640)), rel=0.01
    )  # of one effective rank
    got = {s.name: numbers(s, exact[s.name]) for s in sites}
    gained = [
        got[f"layers_{i}.self_attn.v_proj"] - got[f"layers_{i}.self_attn.k_proj"] / (1 - TO_VALUES) for i in (0, 2)
    ]
    assert gained[0] / gained[1] == pytest.approx(2, rel=0.03)


def test_projections_that_are_one_for_queries_keys_and_values_have_nothing_to_move() -> None:
    sites = [Site(f"layers_{i}.self_attn.qkv_proj", 64, 64, "heads", "embed", False) for i in range(3)]
    found = effective_ranks(sites, 0.5, {s.name: np.ones(64) for s in sites}, budget(sites, 0.5))
    assert set(found.values()) == {16}
