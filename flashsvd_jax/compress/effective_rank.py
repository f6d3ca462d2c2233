"""Ranks by how many directions of a weight count, as D-Rank chooses them (Mi et al. 2025)."""

from collections.abc import Mapping, Sequence

import numpy as np

from flashsvd_jax.compress.allocation import shared_out
from flashsvd_jax.compress.budget import Budget
from flashsvd_jax.param_specs import Site
from flashsvd_jax.shapes import by_kind, uniform_rank

TO_VALUES = 0.3
"""Which share of their parameters queries and keys give to values: the paper finds 0.3 to 0.4 best."""


def effective_rank(gains: np.ndarray) -> float:
    """The exponential of the entropy of squared singular values as shares of their sum; 1 where all are 0."""
    shares = gains / (gains.sum() or 1.0)
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def effective_ranks(
    sites: Sequence[Site], ratio: float, gains: Mapping[str, np.ndarray], budget: Budget
) -> dict[str, int]:
    """Ranks within the sites of one kind, such as all query projections, then some of queries' and keys' for values.

    Of ranks k with as many parameters as the ratio says, those of least ``sum R / k``, R being effective ranks: a site has
    parameters in proportion to the root of R times what a rank costs. Then queries and keys of all layers give `TO_VALUES` of
    theirs, and values get them in equal parts. The paper moves ranks, which is the same where those three are of one shape; else
    the number of parameters would change. Where the paper leaves open what a site cannot hold, its rank ends at break-even, what
    is cut off goes to the others of its kind, and what values cannot hold stays with queries and keys.

    Args:
      sites: the projections, those that share a basis as one.
      ratio: of their parameters, to keep.
      gains: the squared singular values of each.
      budget: how ranks are rounded.
    """
    kept: dict[str, dict[str, float]] = {}
    kinds = by_kind(sites)
    for kind, members in kinds.items():
        sizes = np.array([_size(site) for site in members], float)
        weights = [np.sqrt(effective_rank(gains[s.name]) * (s.d_out + s.d_in)) for s in members]
        found = shared_out(np.array(weights), ratio * sizes.mean(), sizes)
        kept[kind] = {site.name: float(params) for site, params in zip(members, found, strict=True)}
    for kind in kinds:
        block = kind.removesuffix("v_proj")
        if kind.endswith("v_proj") and {f"{block}q_proj", f"{block}k_proj"} <= kinds.keys():
            _give_to_values([kept[f"{block}q_proj"], kept[f"{block}k_proj"]], kept[kind], kinds[kind])
    params = {name: found for of_kind in kept.values() for name, found in of_kind.items()}
    return {site.name: budget.rounded(uniform_rank(site, params[site.name] / _size(site))) for site in sites}


def _give_to_values(givers: Sequence[dict[str, float]], values: dict[str, float], sites: Sequence[Site]) -> None:
    """Moves parameters from queries and keys to values, by the names of the sites."""
    room = np.array([_size(site) - values[site.name] for site in sites])
    owned = sum(sum(of_kind.values()) for of_kind in givers)
    given = min(TO_VALUES * owned, float(room.sum()))
    for of_kind in givers:
        for name in of_kind:
            of_kind[name] *= 1 - given / owned
    # A basis of fewer layers than the others gets less.
    parts = shared_out(np.array([site.d_out for site in sites], float), given / len(sites), room)
    for site, part in zip(sites, parts, strict=True):
        values[site.name] += float(part)


def _size(site: Site) -> int:
    return site.d_out * site.d_in
