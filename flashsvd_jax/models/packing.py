"""Packing a model's arrays for its forward pass: projections of the same input together, one group at a time."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.errors import CheckpointError
from flashsvd_jax.schema import sites
from pallas_kernels import PackedProjection, Projection, pack
from pallas_kernels.projection import by_group, groups_of

# Projections of one input, which are packed together; every other one is packed alone.
_GROUPS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


def packed_sites(config: AnyConfig) -> list[tuple[str, ...]]:
    """The sites of every packed group, in the order they are computed."""

    def group(name: str) -> tuple[str, str]:
        block, _, leaf = name.rpartition(".")
        return block, _GROUPS.get(leaf, leaf)

    return [tuple(names) for _, names in itertools.groupby((site.name for site in sites(config)), group)]


def first_parts(config: AnyConfig, group: tuple[str, ...], low_rank: Collection[str]) -> tuple[str, ...]:
    """Names of the arrays that a packed group's first matrix is made of; groups where they are the same hold it in common.

    ``low_rank`` are the sites that are kept as factors. Dense weights are never held in common.
    """
    owners = config.factorization.owner_by_name
    return tuple(owners.get(f"{s}.down", f"{s}.down") if s in low_rank else f"{s}.weight" for s in group)


class Packer:
    """Makes packed groups one at a time; the arguments are those of `flashsvd_jax.models.weights.build_weights`."""

    def __init__(
        self,
        config: AnyConfig,
        get: Callable[[str], Any],
        pad_rank: Callable[[int], int],
        place: Callable[[Any], Any],
        expand: Collection[str],
        dtype: DTypeLike | None,
    ):
        self._config, self._get, self._pad_rank, self._place, self._dtype = config, get, pad_rank, place, dtype
        self._owners = config.factorization.owner_by_name
        self._stored_ranks = config.factorization.rank_by_site
        self._low_rank = self._stored_ranks.keys() - set(expand)
        self._shared_firsts: dict[tuple[str, ...], Any] = {}

    def array(self, name: str) -> Any:
        """An array of no projection."""
        return self._place(self._cast(self._get(name)))

    def group(self, has_bias: bool, sites: tuple[str, ...], widths: tuple[int, ...] = ()) -> PackedProjection:
        """The packed projections of one input: a member for each site, or of a lone site one for each number of rows."""
        downs: dict[str, Any] = {}
        projections = [self._projection(site, has_bias, downs) for site in sites]
        packed = pack([part for projection in projections for part in _split(projection, widths)], self._pad_rank)
        place = self._place
        return dataclasses.replace(
            packed,
            first=self._place_once(packed.first, sites),
            ups=tuple(None if up is None else place(up) for up in packed.ups),
            biases=tuple(None if bias is None else place(bias) for bias in packed.biases),
        )

    def _projection(self, site: str, has_bias: bool, downs: dict[str, Any]) -> Projection:
        """One site. ``downs`` holds the group's first factors by owner: `pack` must see a shared one as one object, cast or not."""
        bias = self._cast(self._get(f"{site}.bias")) if has_bias else None
        if site not in self._stored_ranks:
            return Projection(weight=self._cast(self._get(f"{site}.weight")), bias=bias)
        name = f"{site}.down"
        if site not in self._low_rank:
            return Projection(weight=self._expanded(self._get(name), self._get(f"{site}.up")), bias=bias)
        down = downs.setdefault(self._owners.get(name, name), self._cast(self._get(name)))
        return Projection(down=down, up=self._cast(self._get(f"{site}.up")), bias=bias)

    def _expanded(self, down: Any, up: Any) -> jax.Array:
        # Padding leaves few different ranks, so that few shapes are compiled for a model with a rank of its own for each site.
        padded = pack([Projection(down=down, up=up)], self._pad_rank)
        return _product(padded.ups[0], padded.first, down.dtype if self._dtype is None else jnp.dtype(self._dtype))

    def _cast(self, array: Any) -> Any:
        return array if self._dtype is None else array.astype(self._dtype, copy=False)

    def _place_once(self, first: Any, sites: tuple[str, ...]) -> Any:
        """Layers that share all their first factors (a cross-layer basis) share the packed array too."""
        parts = first_parts(self._config, sites, self._low_rank)
        if not any(part in self._owners.values() for part in parts):
            return self._place(first)
        if parts not in self._shared_firsts:
            self._shared_firsts[parts] = self._place(first)
        return self._shared_firsts[parts]


def _split(projection: Projection, widths: tuple[int, ...]) -> list[Projection]:
    """A projection as several with so many of its outputs each; factors have their first one in common, or also share that out
    where the second is block-diagonal.

    Raises:
      CheckpointError: the parts would cut a group of outputs in two.
    """
    if not widths:
        return [projection]
    total, up = sum(widths), projection.up
    groups = 1 if up is None else groups_of(up)
    if groups > 1 and any(width * groups % total for width in widths):
        raise CheckpointError(
            f"a projection that stands for {len(widths)} has {groups} groups, which cross their borders"
        )

    def share(array: Any, first: int, width: int) -> Any:
        """Of an array whose leading axis is that of all outputs, or of anything that is shared out like them."""
        if array is None:
            return None
        start, stop = (place * array.shape[0] // total for place in (first, first + width))
        return array[start:stop]

    starts = itertools.accumulate(widths, initial=0)
    return [
        Projection(
            share(projection.weight, first, width),
            share(projection.down, first, width) if groups > 1 else projection.down,
            share(up, first, width),
            share(projection.bias, first, width),
        )
        for first, width in zip(starts, widths, strict=False)
    ]


@functools.partial(jax.jit, static_argnums=2)
def _product(up: jax.Array, down: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """up times down as [d_out, d_in], in float32 whatever the device would take for that by itself."""
    wide = jnp.matmul(
        up.astype(jnp.float32), by_group(down, up).astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return wide.reshape(-1, down.shape[1]).astype(dtype)
