"""The decoder's entry points compiled once for the tests to share, each giving logits in place of hidden states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hf_models import Reference

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.kv_cache import KVCache, empty_cache
from flashsvd_jax.models.decoder import decode, extend, full_logits, head_logits, prefill
from flashsvd_jax.models.weights import DecoderWeights, weights_from_params

Array = jax.Array | np.ndarray | np.integer

full = jax.jit(full_logits, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill_logits(
    config: ModelConfig, weights: DecoderWeights, cache: KVCache, tokens: Array, lengths: Array
) -> tuple[KVCache, jax.Array]:
    cache, x = prefill(config, weights, cache, tokens, lengths)
    return cache, head_logits(config, weights, x)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def extend_logits(
    config: ModelConfig, weights: DecoderWeights, cache: KVCache, tokens: Array, start: Array, lengths: Array
) -> tuple[KVCache, jax.Array]:
    cache, x = extend(config, weights, cache, tokens, start, lengths)
    return cache, head_logits(config, weights, x)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode_logits(
    config: ModelConfig, weights: DecoderWeights, cache: KVCache, tokens: Array, positions: Array
) -> tuple[KVCache, jax.Array]:
    cache, logits, _ = decode(config, weights, cache, tokens, positions)
    return cache, logits


def device_weights(reference: Reference) -> DecoderWeights:
    """The reference's values as the forward pass reads them."""
    return jax.device_put(weights_from_params(reference.config, reference.params))


def used_cache(config: ModelConfig, batch: int, slots: int) -> KVCache:
    """A cache that others have used before: large values, so that one slot read by mistake shows."""
    cache = jax.eval_shape(lambda: empty_cache(config, batch, slots, jnp.float32))
    return jax.device_put(jax.tree.map(lambda a: np.full(a.shape, 50.0, a.dtype), cache))
