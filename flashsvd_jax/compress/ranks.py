"""From a recipe to the rank of every projection."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.compress.allocation import (
    check_ranks,
    largest_within,
    sensitivity_ranks,
    uniform_ranks,
    v2_ranks,
)
from flashsvd_jax.compress.budget import Budget, Target, budget_of
from flashsvd_jax.compress.effective_rank import effective_ranks
from flashsvd_jax.compress.greedy import alike_ranks, greedy_ranks
from flashsvd_jax.compress.heads import head_groups, ranked_parts
from flashsvd_jax.compress.layer_importance import importance_ranks
from flashsvd_jax.compress.learned_ranks import learned_ranks
from flashsvd_jax.compress.recipe import Recipe
from flashsvd_jax.compress.shared_bases import bases_of, joined, joined_ranks
from flashsvd_jax.param_specs import Site
from flashsvd_jax.shapes import layer_sites

# By the name of a site, what each further rank takes off its loss.
Gains = Mapping[str, np.ndarray]


class Measures(NamedTuple):
    """What ranks may depend on; each is measured only where they do.

    Attributes:
      gains: by the method's own loss, for "fisher" in units of the model's.
      similarities: of what goes into each site's layer and what comes out, the mean over layers that share a basis.
      learned: the share of parameters that each site keeps, trained for a ratio of all of them.
      sensitivity: the model's loss with each site alone compressed at each of `SENSITIVITY_RATIOS`.
    """

    gains: Callable[[], Gains] = dict
    similarities: Callable[[], Mapping[str, float]] = dict
    sensitivity: Callable[[], Mapping[str, list[float]]] = dict
    learned: Callable[[float], Mapping[str, float]] = lambda ratio: {}


def choose_ranks(recipe: Recipe, config: AnyConfig, itemsize: int, measures: Measures) -> dict[str, int]:
    """Ranks by site, of each head where they have factors of their own, by the first site of those that share a basis; those that
    stay dense are not there.

    Args:
      recipe: the choices of the caller, settled for this model.
      config: the dense model.
      itemsize: bytes of a stored number.
      measures: of it.

    Raises:
      RequestError: the target cannot be met, or given ranks are not of this model.
    """
    groups = head_groups(config, recipe.heads)
    bases = bases_of(config, recipe.layers_per_basis or 1)
    sites = joined(ranked_parts(layer_sites(config), groups), bases)
    if recipe.ranks is not None:
        ranks = joined_ranks(recipe.ranks, bases)
        check_ranks(ranks, sites)
        return ranks
    target = recipe.target
    assert isinstance(target, Target)
    budget = budget_of(target, config, itemsize, recipe.multiple, groups, recipe.by_layer)
    if recipe.alloc == "sensitivity":
        return sensitivity_ranks(sites, budget, measures.sensitivity())
    greedily = alike_ranks if recipe.alike else greedy_ranks
    if recipe.alloc == "fisher":
        return greedily(sites, budget, measures.gains())
    if recipe.alloc == "greedy":
        # Losses of different projections have no unit in common; the shares of them that ranks take off have.
        measured = measures.gains()
        shares = {first: len(bases[first]) * found / (found.sum() or 1.0) for first, found in measured.items()}
        return greedily(sites, budget, shares)
    at = _by_ratio(recipe, sites, budget, measures)
    return at(target.amount) if target.unit == "ratio" else largest_within(budget, sites, at)


def _by_ratio(
    recipe: Recipe, sites: list[Site], budget: Budget, measures: Measures
) -> Callable[[float], dict[str, int]]:
    """Ranks as a function of the ratio that is kept."""
    if recipe.alloc in ("v2", "effective"):
        ranks, gains = v2_ranks if recipe.alloc == "v2" else effective_ranks, measures.gains()
        return lambda ratio: ranks(sites, ratio, gains, budget)
    if recipe.alloc == "learned":
        shares = measures.learned(_ratio_within(budget, sites))
        return lambda ratio: learned_ranks(sites, ratio, shares, budget)
    if recipe.alloc == "importance":
        similarities = measures.similarities()
        return lambda ratio: importance_ranks(sites, ratio, similarities, budget)
    return lambda ratio: uniform_ranks(sites, ratio, budget)


def _ratio_within(budget: Budget, sites: list[Site]) -> float:
    """The share of parameters that a budget of any unit allows at uniform ranks."""
    ranks = largest_within(budget, sites, lambda ratio: uniform_ranks(sites, ratio, budget))
    kept = sum(ranks[site.name] * (site.d_out + site.d_in) for site in sites)
    return kept / sum(site.d_out * site.d_in for site in sites)
