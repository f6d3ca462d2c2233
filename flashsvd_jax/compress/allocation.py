"""Which rank each projection gets within a budget. The head stays dense.

Each function gives a rank by site; a site that is not there stays dense.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flashsvd_jax.compress.budget import Budget, too_little
from flashsvd_jax.compress.heads import is_made_of_heads
from flashsvd_jax.errors import RequestError, first_line
from flashsvd_jax.param_specs import Site
from flashsvd_jax.shapes import by_kind, uniform_rank

ALLOCATIONS = ("uniform", "greedy", "fisher", "v2", "effective", "importance", "sensitivity", "learned", "file")
SENSITIVITY_RATIOS = tuple(n / 10 for n in range(1, 10))
"""Of which ASVD measures what each does to the loss."""
_BISECTIONS = 40
# As a share of the largest of its kind; what is below it counts as that.
_SMALLEST_LOSS = 1e-12


def uniform_ranks(sites: Sequence[Site], ratio: float, budget: Budget) -> dict[str, int]:
    """Each site at the ratio, rounded down as the budget says."""
    return {site.name: budget.rounded(uniform_rank(site, ratio)) for site in sites}


def v2_ranks(sites: Sequence[Site], ratio: float, gains: Mapping[str, np.ndarray], budget: Budget) -> dict[str, int]:
    """Ranks by theoretical loss, as SVD-LLM v2 chooses them (Wang et al. 2025, algorithm 2).

    Within the sites of one kind, such as all query projections, the share that is removed is proportional to ``1 / log L``, with L
    the root of what truncation at the ratio itself would lose. The paper leaves open what that means for L of e or less: there all
    of the kind are scaled by one factor, so that the least is e. A share beyond what a site has goes to the others of its kind.
    """
    found = {}
    for members in by_kind(sites).values():
        losses = np.array([np.sqrt(gains[s.name][uniform_rank(s, ratio) :].sum()) for s in members])
        if losses.min() < np.e:
            shares = np.maximum(losses / (losses.max() or 1.0), _SMALLEST_LOSS)
            losses = np.e * shares / shares.min()
        for site, removed in zip(members, shared_out(1 / np.log(losses), 1 - ratio), strict=True):
            found[site.name] = budget.rounded(uniform_rank(site, 1 - removed))
    return found


def shared_out(weights: np.ndarray, mean: float, most: float | np.ndarray = 0.99) -> np.ndarray:
    """Numbers proportional to the weights, above 0, with that mean, none above ``most``: what is cut off goes to the others."""
    total, free, found = mean * len(weights), np.ones(len(weights), bool), np.zeros(len(weights))
    most = np.broadcast_to(np.asarray(most, float), found.shape)
    while free.any():
        found[free] = weights[free] * (total - most[~free].sum()) / weights[free].sum()
        over = free & (found > most)
        found[over], free = most[over], free & ~over
        if not over.any():
            break
    return found


def sensitivity_ranks(sites: Sequence[Site], budget: Budget, losses: Mapping[str, Sequence[float]]) -> dict[str, int]:
    """Ranks by measured sensitivity, as ASVD searches them (Yuan et al. 2023): each site has the lowest ratio at which the model's
    loss, that site alone being compressed, stays below a threshold; the lowest threshold is taken that the budget allows.

    Args:
      sites: the projections.
      budget: for all of them.
      losses: the model's loss at each of `SENSITIVITY_RATIOS`, by site.

    Raises:
      RequestError: the budget does not suffice for the lowest ratio everywhere.
    """

    def ranks(threshold: float) -> dict[str, int]:
        found = {}
        for site in sites:
            below = (r for r, loss in zip(SENSITIVITY_RATIOS, losses[site.name], strict=True) if loss <= threshold)
            ratio = next(below, None)
            if ratio is not None:
                found[site.name] = budget.rounded(uniform_rank(site, ratio))
        return found

    thresholds = sorted({loss for found in losses.values() for loss in found})
    low, high = 0, len(thresholds) - 1
    least = ranks(thresholds[high])
    if budget.total(sites, least) > budget.amount:
        raise too_little(budget, budget.total(sites, least))
    while low < high:  # a higher threshold never costs more
        middle = (low + high) // 2
        if budget.total(sites, ranks(thresholds[middle])) <= budget.amount:
            high = middle
        else:
            low = middle + 1
    return ranks(thresholds[high])


def largest_within(budget: Budget, sites: Sequence[Site], ranks: Callable[[float], dict[str, int]]) -> dict[str, int]:
    """The ranks of the highest ratio that the budget allows.

    Raises:
      RequestError: it allows none.
    """
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if budget.total(sites, ranks(middle)) <= budget.amount else (low, middle)
    found = ranks(low)
    if budget.total(sites, found) > budget.amount:
        raise too_little(budget, budget.total(sites, found))
    return found


class GivenRanks(NamedTuple):
    """Ranks by site, and whether those of queries, keys and values are of single heads ("own") or "whole" projections; None where
    nothing says so."""

    ranks: dict[str, int]
    heads: str | None = None


def read_ranks(file: Path) -> GivenRanks:
    """Ranks from a file: a JSON object of sites and their ranks, or the manifest of a factorized model.

    Raises:
      RequestError: it cannot be read, or is something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{file} cannot be read as JSON: {first_line(error)}") from error
    fields = found if isinstance(found, dict) and "ranks" in found else {"ranks": found}
    ranks, groups = fields["ranks"], fields.get("groups", {})
    if not isinstance(ranks, dict) or not ranks or not all(type(rank) is int for rank in ranks.values()):
        raise RequestError(f'{file} must be an object of ranks by site, such as {{"layers_0.self_attn.q_proj": 64}}')
    grouped = {site in groups for site in ranks if is_made_of_heads(site)} if fields is found else set()
    if len(grouped) > 1:
        raise RequestError(
            f"{file} has ranks of single heads for some queries, keys and values and of all heads for others"
        )
    return GivenRanks(ranks, None if not grouped else "own" if grouped.pop() else "whole")


def check_ranks(ranks: Mapping[str, int], sites: Sequence[Site]) -> None:
    """Raises RequestError for ranks of sites that are not among these, or that a site cannot have."""
    by_name = {site.name: site for site in sites}
    unknown = sorted(ranks.keys() - by_name.keys())
    if unknown:
        listed = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise RequestError(f"ranks are given for what is no projection of the model's layers: {listed}")
    for name, rank in ranks.items():
        most = min(by_name[name].d_out, by_name[name].d_in)
        if not 1 <= rank <= most:
            raise RequestError(f"the rank of {name} must be from 1 to {most}, its smaller side, not {rank}")
