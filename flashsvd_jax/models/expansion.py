"""Which low-rank sites become dense weights when a model is loaded.

Two factors above the break-even rank hold more numbers than the weight they stand for, and padding moves break-even down. With
``"auto"`` such sites are expanded. What is compared is what would be held, ranks as padded, in the smallest sets of sites that can
change alone:

- a site by itself, as a rule;
- sites of one packed group that read one first factor: it counts once, and they are expanded together or not at all;
- all low-rank sites of layers that share one packed array (a cross-layer basis): its factors count once for all those layers.

So expanding never makes a model larger, and a packed group never reads more than its dense weights would. One exception: every
layer reads a cross-layer basis that is held once, so a step may read more than the dense model's as long as that saves memory.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence

from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.errors import RequestError
from flashsvd_jax.factorization import MATERIALIZE
from flashsvd_jax.models.packing import first_parts, packed_sites
from flashsvd_jax.schema import Site, sites


@dataclasses.dataclass(frozen=True)
class SiteSet:
    """Low-rank sites that are expanded together or not at all.

    Attributes:
      sites: their names, in the order they are computed.
      factors: numbers in their factors, ranks as padded, a shared factor once.
      dense: numbers in the weights that they stand for.
    """

    sites: tuple[str, ...]
    factors: int
    dense: int


def site_sets(config: AnyConfig, pad_rank: Callable[[int], int]) -> list[SiteSet]:
    """All low-rank sites of a model, in the sets described in this module's text."""
    ranks, by_name = config.factorization.rank_by_site, {site.name: site for site in sites(config)}
    number = config.factorization.groups_by_site
    groups: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
    for group in packed_sites(config):
        groups[first_parts(config, group, ranks.keys())].append(group)
    found = []
    for parts, in_common in groups.items():
        pairs = [pair for group in in_common for pair in zip(group, parts, strict=True)]
        members = [(by_name[name], down, pad_rank(ranks[name]), number[name]) for name, down in pairs if name in ranks]
        # With one site expanded, each layer would need a packed array of its own: so all that hold one in common go together.
        keys = {down: "" if len(in_common) > 1 else down for _, down, *_ in members}
        for key in dict.fromkeys(keys.values()):
            found.append(_site_set([member for member in members if keys[member[1]] == key]))
    return found


def expanded_sets(config: AnyConfig, materialize: str, pad_rank: Callable[[int], int]) -> list[SiteSet]:
    """The sets that are expanded.

    Args:
      config: the model.
      materialize: "auto" for those that get smaller, "never" for none, "always" for all.
      pad_rank: rank -> the rank it would be padded to.

    Raises:
      RequestError: ``materialize`` is none of these.
    """
    if materialize not in MATERIALIZE:
        raise RequestError(f"materialize {materialize!r} is not one of {', '.join(MATERIALIZE)}")
    if materialize == "never":
        return []
    return [found for found in site_sets(config, pad_rank) if materialize == "always" or found.factors > found.dense]


def expanded_sites(config: AnyConfig, materialize: str, pad_rank: Callable[[int], int]) -> frozenset[str]:
    """Names of all sites in `expanded_sets`."""
    return frozenset(name for found in expanded_sets(config, materialize, pad_rank) for name in found.sites)


def as_loaded[C: AnyConfig](config: C, materialize: str, pad_rank: Callable[[int], int]) -> C:
    """The configuration with those sites dense: weights that are drawn at random need no product to have the loaded form."""
    expanded = expanded_sites(config, materialize, pad_rank)
    return dataclasses.replace(config, factorization=config.factorization.without(expanded))


def _site_set(members: Sequence[tuple[Site, str, int, int]]) -> SiteSet:
    """Counts a set; members are (site, name of its first factor, padded rank, groups)."""
    downs = {down: groups * rank * site.d_in for site, down, rank, groups in members}
    ups = sum(site.d_out * rank for site, _, rank, _ in members)
    dense = sum(site.d_out * site.d_in for site, *_ in members)
    return SiteSet(tuple(site.name for site, *_ in members), sum(downs.values()) + ups, dense)
