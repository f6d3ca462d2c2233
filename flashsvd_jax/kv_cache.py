"""Keys and values of every position so far: fixed shapes, one array a layer.

One array a layer, because an update of a stacked cache inside a loop copies it, donated or not; that this one is updated in place
is tested.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from flashsvd_jax.config import ModelConfig
from pallas_kernels import write_slots

CACHE_UNIT = 64
"""Slots of a cache come in this many: kernels read tiles of keys and values, and a tile should be of one sequence."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """``keys[layer]`` and ``values[layer]``, each [batch, kv_heads, slots, head_dim]; slot i holds position i."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    @property
    def length(self) -> int:
        """Number of slots."""
        return self.keys[0].shape[2]

    def replace(self, layer: int, keys: jax.Array, values: jax.Array) -> "KVCache":
        """The cache with other arrays for one layer."""
        put = lambda arrays, array: (*arrays[:layer], array, *arrays[layer + 1 :])  # noqa: E731
        return KVCache(put(self.keys, keys), put(self.values, values))


def empty_cache(
    config: ModelConfig, batch: int, length: int, dtype: jnp.dtype, num_layers: int | None = None
) -> KVCache:
    """A cache of zeros for ``batch`` sequences of up to ``length`` tokens; of all layers, or of so many."""
    shape = (batch, config.num_kv_heads, length, config.head_dim)
    layers = range(config.num_layers if num_layers is None else num_layers)
    return KVCache(tuple(jnp.zeros(shape, dtype) for _ in layers), tuple(jnp.zeros(shape, dtype) for _ in layers))


def joined(caches: Iterable[KVCache]) -> KVCache:
    """The cache of all layers from those of neighbouring ones."""
    caches = list(caches)
    return KVCache(tuple(a for c in caches for a in c.keys), tuple(a for c in caches for a in c.values))


def cache_bytes(config: ModelConfig, batch: int, length: int, itemsize: int = 2) -> int:
    """Memory of a cache in bytes."""
    return 2 * config.num_layers * batch * config.num_kv_heads * length * config.head_dim * itemsize


def write(cache: KVCache, layer: int, keys: jax.Array, values: jax.Array, start: jax.Array) -> KVCache:
    """Writes keys and values [batch, kv_heads, tokens, head_dim] of one layer from slot ``start`` on.

    ``start`` is [] where all sequences are at the same position, else [batch].
    """
    return cache.replace(
        layer, write_slots(cache.keys[layer], keys, start), write_slots(cache.values[layer], values, start)
    )
