"""Ranks by what each further one gains for what it costs, over all projections together."""

import dataclasses
import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flashsvd_jax.compress.budget import Budget, too_little
from flashsvd_jax.param_specs import Site
from flashsvd_jax.shapes import by_kind


class _Point(NamedTuple):
    """What a site may have: a rank, or None for its weight as it is."""

    rank: int | None
    cost: float
    gain: float  # over having nothing


def greedy_ranks(sites: Sequence[Site], budget: Budget, gains: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Ranks by what each further one gains for its cost, over all sites together, until the budget is used up.

    Args:
      sites: the projections.
      budget: for all of them.
      gains: what each further rank takes off a site's loss, the most first, in a unit that all sites have in common.

    Raises:
      RequestError: the budget does not suffice for the lowest rank of every site.
    """
    ladders = {site.name: _ladder(site, gains[site.name], budget) for site in sites}
    left = budget.amount - sum(ladder[0].cost for ladder in ladders.values())
    if left < 0:
        raise too_little(budget, budget.amount - left)
    at = dict.fromkeys(ladders, 0)
    # First along each ladder's upper hull, where every step is worth less than the one before; then what room is left, in the
    # smallest steps there are.
    for next_step in (_hull_step, _single_step):
        queue: list[tuple[float, str, int]] = []

        def offer(name: str, next_step: Callable[..., int | None] = next_step, queue: list = queue) -> None:
            step = next_step(ladders[name], at[name])
            if step is not None:
                heapq.heappush(queue, (-_worth(ladders[name], at[name], step), name, step))

        for name in ladders:
            offer(name)
        while queue:
            _, name, step = heapq.heappop(queue)
            cost = ladders[name][step].cost - ladders[name][at[name]].cost
            if cost <= left:  # else this site is done, but a smaller step may still have room
                at[name], left = step, left - cost
                offer(name)
    found = {name: ladder[at[name]].rank for name, ladder in ladders.items()}
    return {name: rank for name, rank in found.items() if rank is not None}


def alike_ranks(sites: Sequence[Site], budget: Budget, gains: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The same with one rank for all projections of a kind, such as all query projections: they cost and gain together.

    Arguments, and errors, are those of `greedy_ranks`.
    """
    kinds = by_kind(sites)
    # Bases of fewer layers than others are smaller, and so are the ranks that they can have.
    smallest = {kind: min(members, key=lambda site: site.d_out * site.d_in) for kind, members in kinds.items()}
    members = {site.name: kinds[kind] for kind, site in smallest.items()}
    together = dataclasses.replace(
        budget, cost=lambda site, rank: sum(budget.cost(member, rank) for member in members[site.name])
    )
    summed = {name: _summed([gains[site.name] for site in of_kind]) for name, of_kind in members.items()}
    found = greedy_ranks(list(smallest.values()), together, summed)
    return {site.name: rank for name, rank in found.items() for site in members[name]}


def _summed(gains: Sequence[np.ndarray]) -> np.ndarray:
    """Of what can have the fewest ranks, further ranks gain nothing."""
    total = np.zeros(max(map(len, gains)))
    for found in gains:
        total[: len(found)] += found
    return total


def _ladder(site: Site, gains: np.ndarray, budget: Budget) -> list[_Point]:
    """What a site may have, by cost."""
    totals = np.concatenate([[0.0], np.cumsum(gains)])
    points = [_Point(rank, budget.cost(site, rank), float(totals[rank])) for rank in budget.ranks(site)]
    dense = _Point(None, budget.cost(site, None), float(totals[-1]))
    return [*points, dense]


def _worth(ladder: Sequence[_Point], start: int, step: int) -> float:
    cost = ladder[step].cost - ladder[start].cost
    return (ladder[step].gain - ladder[start].gain) / max(cost, 1e-300)


def _hull_step(ladder: Sequence[_Point], start: int) -> int | None:
    """The step of the most worth, the longest of equals."""
    steps = range(len(ladder) - 1, start, -1)
    return max(steps, key=lambda step: _worth(ladder, start, step), default=None)


def _single_step(ladder: Sequence[_Point], start: int) -> int | None:
    return start + 1 if start + 1 < len(ladder) else None
