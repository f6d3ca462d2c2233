"""Keys and values of every position so far: fixed shapes, one array a layer.

One array a layer, because an update of a stacked cache inside a loop copies it, donated or not; that this one is updated in place
is tested.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from flashsvd_jax.config import ModelConfig


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


def empty_cache(config: ModelConfig, batch: int, length: int, dtype: jnp.dtype) -> KVCache:
    """A cache of zeros for ``batch`` sequences of up to ``length`` tokens."""
    shape = (batch, config.num_kv_heads, length, config.head_dim)
    layers = range(config.num_layers)
    return KVCache(tuple(jnp.zeros(shape, dtype) for _ in layers), tuple(jnp.zeros(shape, dtype) for _ in layers))


def cache_bytes(config: ModelConfig, batch: int, length: int, itemsize: int = 2) -> int:
    """Memory of a cache in bytes."""
    return 2 * config.num_layers * batch * config.num_kv_heads * length * config.head_dim * itemsize


def write(cache: KVCache, layer: int, keys: jax.Array, values: jax.Array, start: jax.Array) -> KVCache:
    """Writes keys and values [batch, kv_heads, tokens, head_dim] of one layer from slot ``start`` on.

    ``start`` is [] where all sequences are at the same position, else [batch].
    """
    updated = []
    for old, new in ((cache.keys[layer], keys), (cache.values[layer], values)):
        if start.ndim == 0 or old.shape[0] == 1:
            updated.append(lax.dynamic_update_slice_in_dim(old, new, start.reshape(()), axis=2))
        else:
            put = jax.vmap(lambda o, n, s: lax.dynamic_update_slice_in_dim(o, n, s, axis=1))
            updated.append(put(old, new, start))
    # Without the barrier XLA's CPU backend fuses the update into the product that reads it too, and copies the cache for that.
    new_keys, new_values = lax.optimization_barrier(tuple(updated))
    replace = lambda arrays, array: (*arrays[:layer], array, *arrays[layer + 1 :])  # noqa: E731
    return KVCache(replace(cache.keys, new_keys), replace(cache.values, new_values))
