"""What ranks may cost, all projections of the layers together: parameters, bytes read to decode a token, or milliseconds."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.compress.decode_costs import DecodeCosts
from flashsvd_jax.compress.heads import ranked_parts
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.errors import RequestError
from flashsvd_jax.kv_cache import cache_bytes
from flashsvd_jax.models.packing import packed_sites
from flashsvd_jax.param_specs import Site
from flashsvd_jax.schema import count_params, schema
from flashsvd_jax.shapes import by_kind, layer_sites
from pallas_kernels import hardware_rank

Unit = Literal["ratio", "params", "bytes", "ms"]
_TEXTS = {"params": "{:,.0f} parameters", "bytes": "{:,.0f} bytes of weights a token", "ms": "{:g} ms a token"}
# Keys and values are read too, so a time is for a context; this is the one of the decode benchmark.
CONTEXT = 512


@dataclasses.dataclass(frozen=True)
class Target:
    """How large the compressed model is to be at most.

    Attributes:
      unit: "ratio", the share of the layers' parameters that is kept; "params", of the whole model; "bytes", the weights that
        decoding a token reads, ranks as kernels pad them; "ms", the time of a token at batch 1 and a context of 512 tokens.
      amount: of that.
      costs: what milliseconds are reckoned with.

    Raises:
      RequestError: no model can have that.
    """

    unit: Unit
    amount: float
    costs: DecodeCosts | None = None

    def __post_init__(self) -> None:
        if self.unit == "ratio" and not 0 < self.amount < 1:
            raise RequestError(
                f"ratio is the share of the layers' parameters that is kept, between 0 and 1, not {self.amount}"
            )
        if not 0 < self.amount < float("inf"):
            raise RequestError(f"a target in {self.unit} must be above 0, not {self.amount}")
        if (self.unit == "ms") != (self.costs is not None):
            raise RequestError("a target in milliseconds, and no other, needs a table of what decoding costs")

    def __str__(self) -> str:
        if self.unit == "ratio":
            return f"{self.amount:g} of the layers' parameters"
        return _TEXTS[self.unit].format(self.amount) + (f" by the costs of {self.costs.name}" if self.costs else "")


@dataclasses.dataclass(frozen=True)
class Budget:
    """What is left of a target for the projections of the layers.

    Attributes:
      amount: how much that is.
      cost: what a site costs at a rank, or dense for None.
      multiple: of which ranks are, where a site is not too small for it.
      padded: whether ranks that kernels would pad are passed over, too.
    """

    amount: float
    cost: Callable[[Site, int | None], float]
    multiple: int = 1
    padded: bool = False

    def ranks(self, site: Site) -> list[int]:
        """The ranks that a site may have, up to break-even; one at least, if it has any."""
        break_even = site.d_out * site.d_in // (site.d_out + site.d_in)
        ranks = [rank for rank in range(self.multiple, break_even + 1, self.multiple) if self._fits(rank)]
        return ranks or [break_even] * (break_even > 0)

    def rounded(self, rank: int) -> int:
        """The next lower of such ranks; a rank below all of them stays as it is."""
        below = range(rank // self.multiple * self.multiple, 0, -self.multiple)
        return next((lower for lower in below if self._fits(lower)), rank)

    def total(self, sites: Sequence[Site], ranks: Mapping[str, int]) -> float:
        """What all sites cost; those without a rank are dense."""
        return sum(self.cost(site, ranks.get(site.name)) for site in sites)

    def _fits(self, rank: int) -> bool:
        return not self.padded or hardware_rank(rank) == rank


def budget_of(
    target: Target,
    config: AnyConfig,
    itemsize: int,
    multiple: int = 1,
    groups: Mapping[str, int] = MappingProxyType({}),
    differ: bool = False,
) -> Budget:
    """The budget that a target leaves.

    Args:
      target: for the whole model, or the share of its layers.
      config: the dense model.
      itemsize: bytes of a stored number.
      multiple: of which ranks are.
      groups: heads by site, where they have factors of their own: the budget is for one such part of each site, but all count.
      differ: whether ranks will differ from layer to layer, which takes time.

    Raises:
      RequestError: the target does not suffice for what stays dense, or the dense model does not exceed it.
    """
    sites = ranked_parts(layer_sites(config), groups)

    def params(site: Site, rank: int | None) -> int:
        return groups.get(site.name, 1) * _params(site, rank)

    weights = sum(params(site, None) for site in sites)
    if target.unit == "ratio":
        return Budget(int(target.amount * weights), params, multiple)
    if target.unit == "params":
        return _checked(Budget(target.amount - (count_params(config) - weights), params, multiple), target, sites)
    assert isinstance(config, ModelConfig)  # an encoder decodes nothing
    if target.unit == "bytes":
        left = target.amount - itemsize * _read_beside_layers(config)
        return _checked(Budget(left, lambda s, r: itemsize * _padded_params(s, r), multiple, True), target, sites)
    assert target.costs is not None
    fixed, milliseconds = _times(config, itemsize, target.costs, differ)
    return _checked(Budget(target.amount - fixed, milliseconds, multiple, True), target, sites)


def decode_milliseconds(config: ModelConfig, itemsize: int, costs: DecodeCosts) -> float:
    """The time of a token at batch 1 and a context of 512 tokens, as a target in milliseconds counts it.

    Args:
      config: a model with any ranks, none of its factors shared.
      itemsize: bytes of a stored number.
      costs: what is reckoned with.
    """
    ranks = {site: config.factorization.rank(site.name) for site in layer_sites(config)}
    differ = any(len({ranks[site] for site in members}) > 1 for members in by_kind(ranks).values())
    fixed, milliseconds = _times(config, itemsize, costs, differ)
    return fixed + sum(milliseconds(site, rank) for site, rank in ranks.items())


def _times(
    config: ModelConfig, itemsize: int, costs: DecodeCosts, differ: bool
) -> tuple[float, Callable[[Site, int | None], float]]:
    """Milliseconds of all but the layers' projections, and of each of those at a rank."""
    members = {name: len(group) for group in packed_sites(config) for name in group}

    def milliseconds(site: Site, rank: int | None) -> float:
        # Sites that are packed together share the launch of each of their products.
        products = (1 if rank is None else 2) / members[site.name]
        return costs.milliseconds(itemsize * _padded_params(site, rank), products=products)

    read = itemsize * _read_beside_layers(config) + cache_bytes(config, 1, CONTEXT, itemsize)
    return costs.milliseconds(read, products=1, layers=config.num_layers, differ=differ), milliseconds


def _read_beside_layers(config: ModelConfig) -> int:
    """Numbers that a step reads of what is no projection of the layers: of tables of embeddings a row, which does not count."""
    dense = config.dense()
    tables = ["embed_positions.weight"] * config.learned_positions + ["embed_tokens.weight"] * (
        not config.tie_embeddings
    )
    layers = sum(_params(site, None) for site in layer_sites(config))
    return count_params(dense) - layers - sum(schema(dense)[name].size for name in tables)


def _checked(budget: Budget, target: Target, sites: Sequence[Site]) -> Budget:
    if budget.amount <= 0:
        raise RequestError(f"{target} do not suffice for what stays dense: embeddings, norms and the head")
    if budget.total(sites, {}) <= budget.amount:
        raise RequestError(f"the dense model does not exceed {target}: there is nothing to compress")
    return budget


def _params(site: Site, rank: int | None) -> int:
    return site.d_out * site.d_in if rank is None else rank * (site.d_out + site.d_in)


def _padded_params(site: Site, rank: int | None) -> int:
    """Numbers that a step reads: ranks are padded, and factors that hold more than the weight then are loaded as that."""
    return _params(site, None) if rank is None else min(_params(site, hardware_rank(rank)), _params(site, None))


def too_little(budget: Budget, needed: float) -> RequestError:
    """The error of a target below what the lowest ranks cost, ``needed`` in the budget's unit."""
    return RequestError(
        f"the target does not suffice for the lowest ranks everywhere: they cost {needed:g}, and {budget.amount:g} is left for"
        " them; give more, or a lower rank multiple"
    )
