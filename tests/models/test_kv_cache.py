"""The cache: where a write lands, and how large it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import reference

from flashsvd_jax.kv_cache import KVCache, cache_bytes, empty_cache, write

LAYERS, SLOTS, TOKENS = 2, 9, 3


def cache_and_update(batch: int) -> tuple[KVCache, jax.Array, jax.Array]:
    config = dataclasses.replace(reference("mistral").config, num_layers=LAYERS)
    rng = np.random.default_rng(0)
    shape = (batch, config.num_kv_heads, TOKENS, config.head_dim)
    keys, values = (jax.device_put(rng.standard_normal(shape).astype(np.float32)) for _ in range(2))
    return empty_cache(config, batch, SLOTS, jnp.float32), keys, values


@pytest.mark.parametrize(
    ("batch", "start"), [(3, 4), (1, 4), (1, [4]), (3, [4, 0, 6])], ids=["scalar", "one", "one_of_one", "per_sequence"]
)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_write_fills_its_own_slots_of_its_own_layer(batch: int, start: int | list[int], layer: int) -> None:
    cache, keys, values = cache_and_update(batch)
    written = jax.jit(write, static_argnums=1)(cache, layer, keys, values, np.int32(start))
    for arrays, new in ((written.keys, keys), (written.values, values)):
        for other in range(LAYERS):
            want = np.zeros(arrays[0].shape, np.float32)
            for row, first in enumerate(np.broadcast_to(start, batch)):
                if other == layer:
                    want[row, :, first : first + TOKENS] = new[row]
            np.testing.assert_array_equal(arrays[other], want)


@pytest.mark.parametrize(("dtype", "itemsize"), [(jnp.bfloat16, 2), (jnp.float32, 4)])
def test_size_is_known_before_it_is_made(dtype: jnp.dtype, itemsize: int) -> None:
    config = reference("qwen2").config
    cache = empty_cache(config, batch=3, length=SLOTS, dtype=dtype)
    assert cache.length == SLOTS
    assert cache_bytes(config, 3, SLOTS, itemsize) == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
