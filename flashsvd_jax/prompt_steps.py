"""The compiled steps that process prompts, chunk by chunk, up to the first token of each sequence."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.kv_cache import empty_cache
from flashsvd_jax.models import decoder
from flashsvd_jax.models.weights import DecoderWeights
from flashsvd_jax.sampling.counts import no_counts
from flashsvd_jax.sampling.device import Sampled, best_token, sample
from flashsvd_jax.sequences import NO_TOKEN, DecodeState, Requests

Step = tuple[DecodeState, jax.Array, Sampled | None]
"""The state; output tokens int32 [1, batch], NO_TOKEN where there is none yet; how they were chosen, None of greedy requests."""


def prefill(
    config: ModelConfig, slots: int, greedy: bool, weights: DecoderWeights, tokens: jax.Array, requests: Requests
) -> Step:
    """Prompts' first tokens [batch, bucket] into a new cache; the first output token of those that end here.

    Where requests are ``greedy``, of the most likely tokens and nothing else, tokens are not counted, as no penalty needs it, and
    nothing is told of how they were chosen.
    """
    batch = tokens.shape[0]
    cache = empty_cache(config, batch, slots, weights.embedding.dtype)
    cache, x = decoder.prefill(config, weights, cache, tokens, requests.prompt_length)
    start, nothing = jnp.int32(0), no_counts(batch, config.vocab_size)
    counts = nothing if greedy else nothing.with_prompt(tokens, start, requests.prompt_length)
    state = DecodeState(cache, jnp.full((batch,), NO_TOKEN, jnp.int32), requests.prompt_length, counts)
    return _first_token(config, greedy, weights, state, x, start, requests)


def extend(
    config: ModelConfig, greedy: bool, weights: DecoderWeights, state: DecodeState, tokens: jax.Array, start: jax.Array,
    requests: Requests, earlier: jax.Array, earlier_sampled: Sampled | None,
) -> Step:  # fmt: skip
    """Prompts' next tokens [batch, bucket] from position ``start`` on; keeps the first tokens found in earlier chunks."""
    cache, x = decoder.extend(config, weights, state.cache, tokens, start, requests.prompt_length)
    counts = state.counts if greedy else state.counts.with_prompt(tokens, start, requests.prompt_length)
    state = dataclasses.replace(state, cache=cache, counts=counts)
    state, found, sampled = _first_token(config, greedy, weights, state, x, start, requests)
    here = found != NO_TOKEN
    pick: Callable[[jax.Array, jax.Array], jax.Array] = lambda new, old: jnp.where(  # noqa: E731
        here.reshape(here.shape + (1,) * (new.ndim - 2)), new, old
    )
    return state, pick(found, earlier), jax.tree.map(pick, sampled, earlier_sampled)


def _first_token(
    config: ModelConfig, greedy: bool, weights: DecoderWeights, state: DecodeState, x: jax.Array, start: jax.Array,
    requests: Requests,
) -> Step:  # fmt: skip
    """The first output token [1, batch] of prompts whose last token is among hidden states x [batch, bucket, embed]."""
    last = requests.prompt_length - 1 - start
    here = (last >= 0) & (last < x.shape[1]) & (requests.max_tokens > 0)
    at = jnp.clip(last, 0, x.shape[1] - 1)
    logits = decoder.head_logits(config, weights, jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0])
    with jax.named_scope("sample"):
        # Not chosen on the device: the host would wait there for the prompt, and send what follows only then.
        sampled = None if greedy else sample(logits, requests.options, state.counts, jnp.zeros_like(last))
        chosen = best_token(logits) if sampled is None else sampled.token
    token = jnp.where(here, chosen, state.token)
    counts = state.counts if greedy else state.counts.with_output(token, here)
    state = dataclasses.replace(state, token=token, counts=counts)
    return state, jnp.where(here, token, NO_TOKEN)[None], jax.tree.map(lambda a: a[None], sampled)
