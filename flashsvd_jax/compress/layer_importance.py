"""Ranks by how important a layer is, as AdaSVD's adaCR chooses them (Li et al. 2025)."""

from collections.abc import Mapping, Sequence

import numpy as np

from flashsvd_jax.compress.allocation import shared_out
from flashsvd_jax.compress.budget import Budget
from flashsvd_jax.param_specs import Site
from flashsvd_jax.shapes import by_kind, uniform_rank

MARGIN = 0.1
"""What the lowest ratio that a layer could have is below the mean: what was best at each of the ratios in the paper's table 3d."""
_SMALLEST = 1e-6


def importance_ranks(
    sites: Sequence[Site], ratio: float, similarities: Mapping[str, float], budget: Budget
) -> dict[str, int]:
    """Ranks at the ratio ``least + I (ratio - least)``, I being a layer's importance over the mean one (equations 17 to 20).

    Importance is the cosine similarity of what goes into a layer and what comes out of it, as equation 18 has it; similarities
    below 0 count as none. What is beyond a site's break-even goes to the others of its kind.

    Args:
      sites: the projections, those that share a basis as one.
      ratio: of their parameters, to keep.
      similarities: of the layers, or the mean over those that share a basis, by site.
      budget: how ranks are rounded.
    """
    found = {}
    for members in by_kind(sites).values():
        sizes = np.array([site.d_out * site.d_in for site in members], float)
        importances = np.maximum([similarities[site.name] for site in members], _SMALLEST)
        least = max(ratio - MARGIN, 0.0)
        more = shared_out(importances * sizes, (ratio - least) * sizes.mean(), (1 - least) * sizes)
        for site, kept in zip(members, least + more / sizes, strict=True):
            found[site.name] = budget.rounded(uniform_rank(site, kept))
    return found
