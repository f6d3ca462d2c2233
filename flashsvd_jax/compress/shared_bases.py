"""Bases that layers share (Basis Sharing, Wang et al. 2024): one first factor for the weights of a kind in neighbouring layers.

Their weights below each other are one weight, the sum of their inputs' second moments is its second moment, and its factors are
those of any other: the first is the basis, the rows of the second are the layers' coefficients.
"""

import dataclasses
from collections.abc import Iterable, Mapping

from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.compress.float64 import float64_module
from flashsvd_jax.compress.methods import Statistics
from flashsvd_jax.errors import RequestError
from flashsvd_jax.param_specs import Site
from flashsvd_jax.shapes import layer_sites

# What reads the residual stream, whose directions neighbouring layers have in common; the others the paper leaves to themselves.
_SHARE = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj")

# Sites that have one first factor, in the order of their layers, by the name of the first of them.
Bases = Mapping[str, tuple[str, ...]]


def layer_blocks(num_layers: int, layers_per_basis: int) -> list[range]:
    """The layers in order, those together that share; what is left over in the end is a smaller block."""
    starts = range(0, num_layers, layers_per_basis)
    return [range(start, min(start + layers_per_basis, num_layers)) for start in starts]


def bases_of(config: AnyConfig, layers_per_basis: int) -> Bases:
    """All of a model's sites of its layers; those that share nothing are alone."""
    blocks = layer_blocks(config.num_layers, layers_per_basis)
    found: dict[str, tuple[str, ...]] = {}
    for site in layer_sites(config):
        layer, _, kind = site.name.partition(".")
        first = site.name
        if site.name.rpartition(".")[2] in _SHARE:
            block = blocks[int(layer.removeprefix("layers_")) // layers_per_basis]
            first = f"layers_{block.start}.{kind}"
        found[first] = (*found.get(first, ()), site.name)
    return found


def joined(sites: Iterable[Site], bases: Bases) -> list[Site]:
    """The sites with those that share a basis as one, by the name of the first: their weights below each other."""
    by_name = {site.name: site for site in sites}
    return [
        dataclasses.replace(by_name[first], d_out=sum(by_name[name].d_out for name in members))
        for first, members in bases.items()
    ]


def joined_ranks(ranks: Mapping[str, int], bases: Bases) -> dict[str, int]:
    """Ranks by site as ranks of what is `joined`; names of no site stay, for others to complain about.

    Raises:
      RequestError: sites that share a basis have different ranks, or not all have one.
    """
    found = dict(ranks)
    for members in bases.values():
        given = {ranks.get(name) for name in members}
        if len(given) > 1:
            said = ", ".join(f"{name} {ranks.get(name, 'none')}" for name in members)
            raise RequestError(f"sites that share a basis must have one rank, or none: {said}")
        for name in members[1:]:
            found.pop(name, None)
    return found


def shared_names(ranks: Mapping[str, int], bases: Bases) -> dict[str, str]:
    """For every first factor that is another site's, that one's name; ``ranks`` by the first of the sites."""
    return {f"{name}.down": f"{first}.down" for first in ranks for name in bases[first][1:]}


def summed(found: Mapping[str, Statistics], more: Mapping[str, Statistics]) -> dict[str, Statistics]:
    """Second moments of the same keys, or of none yet, added up; what was one object for several keys in both is one again."""
    if not found:
        return dict(more)
    sums: dict[tuple[int, int], Statistics] = {}
    for key, one in found.items():
        other, pair = more[key], (id(one), id(more[key]))
        if pair not in sums:
            assert one.moment is not None and other.moment is not None
            with float64_module():
                sums[pair] = Statistics(moment=one.moment + other.moment)
    return {key: sums[id(one), id(more[key])] for key, one in found.items()}
