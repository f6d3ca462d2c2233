"""The decoder's entry points compiled once for the tests to share, each giving logits in place of hidden states."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from hf_models import Reference

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.kv_cache import KVCache, empty_cache, joined
from flashsvd_jax.models.decoder import decode, full_logits, head_logits
from flashsvd_jax.models.prompts import Chunk, LayerRun, begin, first_chunk, layer_runs, next_chunk
from flashsvd_jax.models.weights import DecoderWeights, weights_from_params

Array = jax.Array | np.ndarray | np.integer

full = jax.jit(full_logits, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill_logits(
    config: ModelConfig, weights: DecoderWeights, cache: KVCache, tokens: Array, lengths: Array
) -> tuple[KVCache, jax.Array]:
    """Of prompts' first tokens, all of them; behind them the cache keeps what it held."""
    chunk, parts = begin(config, weights, jnp.asarray(tokens), jnp.int32(0), jnp.asarray(lengths)), []
    for run in _runs(config, weights):
        part, chunk = first_chunk(config, cache.length, run, chunk)
        parts.append(part)
    written = jnp.arange(cache.length)[:, None] < tokens.shape[1]
    return jax.tree.map(functools.partial(jnp.where, written), joined(parts), cache), _logits(config, weights, chunk)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def extend_logits(
    config: ModelConfig, weights: DecoderWeights, cache: KVCache, tokens: Array, start: Array, lengths: Array
) -> tuple[KVCache, jax.Array]:
    """Of tokens behind those in the cache."""
    chunk, parts, at = begin(config, weights, jnp.asarray(tokens), jnp.asarray(start), jnp.asarray(lengths)), [], 0
    for run in _runs(config, weights):
        here = slice(at, at := at + len(run.weights))
        part, chunk = next_chunk(config, run, KVCache(cache.keys[here], cache.values[here]), chunk)
        parts.append(part)
    return joined(parts), _logits(config, weights, chunk)


def _runs(config: ModelConfig, weights: DecoderWeights) -> list[LayerRun]:
    """Runs that keep all tokens, so that the logits of all can be compared."""
    return [dataclasses.replace(run, is_last=False) for run in layer_runs(config, weights.layers)]


def _logits(config: ModelConfig, weights: DecoderWeights, chunk: Chunk) -> jax.Array:
    return head_logits(config, weights, chunk.x + chunk.added)


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
