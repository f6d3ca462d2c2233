"""A decode step updates its cache in place: what it needs besides is less than a cache."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import build_model, reference_of
from jax import lax

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.kv_cache import KVCache, cache_bytes, empty_cache
from flashsvd_jax.models.decoder import head_logits
from flashsvd_jax.models.prompts import begin, first_chunk, layer_runs, next_chunk
from flashsvd_jax.models.weights import DecoderWeights, weights_from_params

CACHE, LAYERS = 16 * 2**20, 2
# The CPU's matrix product may want one layer's keys in another order, at batch 1; a copy of the cache would be CACHE.
LIMIT = 1.1 * CACHE / (2 * LAYERS)

Model = tuple[ModelConfig, DecoderWeights]
State = tuple[KVCache, jax.Array]
Step = Callable[..., Any]


@pytest.fixture(scope="module")
def model() -> Model:
    """Layers whose cache dwarfs everything else: heads are wide beside their number, and the rest is tiny."""
    pair = reference_of(build_model("llama", head_dim=64, num_hidden_layers=LAYERS))
    return pair.config, jax.device_put(weights_from_params(pair.config, pair.params))


def temporary_bytes(step: Step, config: ModelConfig, weights: DecoderWeights, batch: int, *rest: np.ndarray) -> int:
    """Temporary memory of a step that is given its cache to keep; the cache holds CACHE bytes."""
    cache = jax.eval_shape(lambda: empty_cache(config, batch, CACHE // cache_bytes(config, batch, 1, 4), jnp.float32))
    assert sum(leaf.size * 4 for leaf in jax.tree.leaves(cache)) == CACHE
    compiled = jax.jit(functools.partial(step, config), donate_argnums=1).lower(weights, cache, *rest).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= CACHE  # donated indeed
    return memory.temp_size_in_bytes


def decode_step(
    config: ModelConfig, weights: DecoderWeights, cache: KVCache, token: jax.Array, position: jax.Array
) -> State:
    chunk = begin(config, weights, token[:, None], position, jnp.broadcast_to(position + 1, token.shape))
    (run,) = layer_runs(config, weights.layers)
    cache, chunk = next_chunk(config, run, cache, chunk)
    return cache, head_logits(config, weights, (chunk.x + chunk.added)[:, 0]).argmax(-1).astype(jnp.int32)


def decode_loop(
    config: ModelConfig, weights: DecoderWeights, cache: KVCache, token: jax.Array, position: jax.Array
) -> State:
    def body(i: jax.Array, state: State) -> State:
        return decode_step(config, weights, *state, position + i)

    return lax.fori_loop(0, 8, body, (cache, token))


@pytest.mark.parametrize(
    ("step", "batch", "per_sequence_start"),
    [(decode_step, 1, False), (decode_step, 4, True), (decode_loop, 1, False), (decode_loop, 4, True)],
)
def test_decoding_updates_the_cache_in_place(model: Model, step: Step, batch: int, per_sequence_start: bool) -> None:
    position = np.full(batch if per_sequence_start else (), 7, np.int32)
    assert temporary_bytes(step, *model, batch, np.zeros(batch, np.int32), position) < LIMIT


def test_a_first_chunk_fills_its_cache_in_place(model: Model) -> None:
    """The cache is made by the step; beside it there is no other."""
    config, weights = model
    slots = CACHE // cache_bytes(config, 2, 1, 4)
    tokens, lengths = np.zeros((2, 16), np.int32), np.full(2, 16, np.int32)
    (run,) = (dataclasses.replace(run, is_last=False) for run in layer_runs(config, weights.layers))
    chunk = jax.eval_shape(functools.partial(begin, config), weights, tokens, np.int32(0), lengths)
    step = jax.jit(functools.partial(first_chunk, config, slots), donate_argnums=1)
    memory = step.lower(run, chunk).compile().memory_analysis()
    assert memory.output_size_in_bytes >= CACHE
    assert memory.temp_size_in_bytes < LIMIT
