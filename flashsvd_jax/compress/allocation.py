"""Which rank each projection gets, for a share of the layers' parameters that is kept. The head stays dense."""

import dataclasses
import heapq
from collections.abc import Mapping, Sequence

import numpy as np

from flashsvd_jax.errors import RequestError
from flashsvd_jax.param_specs import Site
from flashsvd_jax.shapes import uniform_rank

ALLOCATIONS = ("uniform", "greedy")


@dataclasses.dataclass(frozen=True)
class _Step:
    """What a site may get next: a larger rank, or None, its weight as it is."""

    rank: int | None
    cost: int  # further parameters
    worth: float  # gain for each of them


def check_budget(ratio: float, multiple: int) -> None:
    """Raises RequestError for a ratio or a multiple that no model can have."""
    if not 0 < ratio < 1:
        raise RequestError(f"ratio is the share of the layers' parameters that is kept, between 0 and 1, not {ratio}")
    if multiple < 1:
        raise RequestError(f"ranks can be multiples of 1 or more, not of {multiple}")


def uniform_ranks(sites: Sequence[Site], ratio: float, multiple: int = 1) -> dict[str, int]:
    """Each site at the ratio, rounded down to a multiple; a rank below the multiple stays as it is."""
    ranks = {site.name: uniform_rank(site, ratio) for site in sites}
    return {name: rank // multiple * multiple or rank for name, rank in ranks.items()}


def greedy_ranks(
    sites: Sequence[Site], ratio: float, gains: Mapping[str, np.ndarray], multiple: int = 1
) -> dict[str, int]:
    """Ranks by the gain of each further parameter, over all sites together, until the share of parameters is used up.

    Args:
      sites: the projections.
      ratio: share of their parameters that is kept.
      gains: what each further rank takes off a site's loss, the most first, in a unit that all sites have in common.
      multiple: of which ranks are, where a site is not too small for it.

    Returns:
      Rank by site. A site that is worth its break-even rank is not there: it stays dense, which costs no more.

    Raises:
      RequestError: the ratio does not suffice for the lowest rank of every site.
    """
    budget = int(ratio * sum(site.d_out * site.d_in for site in sites))
    steps = {site.name: iter(_steps(site, gains[site.name], multiple)) for site in sites}
    found = {name: next(ladder) for name, ladder in steps.items()}
    budget -= sum(step.cost for step in found.values())
    if budget < 0:
        raise RequestError(f"ratio {ratio} does not suffice for rank {multiple} everywhere; give a higher one")
    queue: list[tuple[float, str, _Step]] = []

    def offer(name: str) -> None:
        step = next(steps[name], None)
        if step is not None:
            heapq.heappush(queue, (-step.worth, name, step))

    for name in found:
        offer(name)
    while queue:
        _, name, step = heapq.heappop(queue)
        if step.cost <= budget:  # else this site is done, but a smaller one may still have room
            found[name], budget = step, budget - step.cost
            offer(name)
    return {name: step.rank for name, step in found.items() if step.rank is not None}


def _steps(site: Site, gains: np.ndarray, multiple: int) -> list[_Step]:
    """A site's ranks up to break-even, then its weight, each with what it adds to the one before."""
    dense, per_rank = site.d_out * site.d_in, site.d_out + site.d_in
    break_even = dense // per_rank
    ranks = list(range(multiple, break_even + 1, multiple)) or [break_even] * (break_even > 0)
    sizes = [*(rank * per_rank for rank in ranks), dense]
    kept = np.concatenate([[0.0], np.cumsum(gains)])
    totals = kept[[*ranks, -1]]
    steps = []
    for rank, cost, gain in zip([*ranks, None], np.diff(sizes, prepend=0), np.diff(totals, prepend=0.0), strict=True):
        steps.append(_Step(rank, int(cost), float(gain) / max(int(cost), 1)))
    return steps
