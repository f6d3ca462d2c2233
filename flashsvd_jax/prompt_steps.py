"""The compiled steps that process prompts, chunk by chunk, up to the first token of each sequence."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.kv_cache import empty_cache
from flashsvd_jax.models import decoder
from flashsvd_jax.models.weights import DecoderWeights
from flashsvd_jax.sampling.counts import no_counts
from flashsvd_jax.sampling.device import Sampled, sample
from flashsvd_jax.sequences import NO_TOKEN, DecodeState, Requests
from pallas_kernels import target

_MANY_TOKENS = 512
"""Of all prompts together, from which on a step's kernels take longer than the host takes to send them."""


def compiled_by_tokens(step: Callable[..., Any], tokens: int, **options: Any) -> Callable[..., Any]:
    """`jax.jit` of a step of prompts, whose argument number ``tokens`` [batch, bucket] says how it is compiled.

    Where there are many tokens, kernels are sent one by one. As a CUDA graph they begin when the host has updated and sent all of
    them, after 2 of the 9 ms that 512 tokens of Llama-2-7B take (H200, ratio 0.5; bench/NOTES.md).
    """
    few, many = jax.jit(step, **options), jax.jit(step, compiler_options=many_tokens_options(), **options)
    return lambda *arguments: (many if arguments[tokens].size >= _MANY_TOKENS else few)(*arguments)


def many_tokens_options() -> dict[str, Any] | None:
    """XLA options by which nothing becomes part of a CUDA graph; None where there are none."""
    if target().platform != "cuda" or target().interpret:
        return None
    return {"xla_gpu_graph_min_graph_size": 2**30}


def prefill(
    config: ModelConfig, slots: int, weights: DecoderWeights, tokens: jax.Array, requests: Requests
) -> tuple[DecodeState, jax.Array, Sampled]:
    """Prompts' first tokens [batch, bucket] into a new cache; the first output token of those that end here."""
    batch = tokens.shape[0]
    cache = empty_cache(config, batch, slots, weights.embedding.dtype)
    cache, x = decoder.prefill(config, weights, cache, tokens, requests.prompt_length)
    counts = no_counts(batch, config.vocab_size).with_prompt(tokens, jnp.int32(0), requests.prompt_length)
    state = DecodeState(cache, jnp.full((batch,), NO_TOKEN, jnp.int32), requests.prompt_length, counts)
    return _first_token(config, weights, state, x, jnp.int32(0), requests)


def extend(
    config: ModelConfig, weights: DecoderWeights, state: DecodeState, tokens: jax.Array, start: jax.Array, requests: Requests,
    earlier: jax.Array, earlier_sampled: Sampled,
) -> tuple[DecodeState, jax.Array, Sampled]:  # fmt: skip
    """Prompts' next tokens [batch, bucket] from position ``start`` on; keeps the first tokens found in earlier chunks."""
    cache, x = decoder.extend(config, weights, state.cache, tokens, start, requests.prompt_length)
    counts = state.counts.with_prompt(tokens, start, requests.prompt_length)
    state = dataclasses.replace(state, cache=cache, counts=counts)
    state, found, sampled = _first_token(config, weights, state, x, start, requests)
    here = found != NO_TOKEN
    pick: Callable[[jax.Array, jax.Array], jax.Array] = lambda new, old: jnp.where(  # noqa: E731
        here.reshape(here.shape + (1,) * (new.ndim - 2)), new, old
    )
    return state, pick(found, earlier), jax.tree.map(pick, sampled, earlier_sampled)


def _first_token(
    config: ModelConfig, weights: DecoderWeights, state: DecodeState, x: jax.Array, start: jax.Array, requests: Requests
) -> tuple[DecodeState, jax.Array, Sampled]:
    """The first output token [1, batch] of prompts whose last token is among hidden states x [batch, bucket, embed]."""
    last = requests.prompt_length - 1 - start
    here = (last >= 0) & (last < x.shape[1]) & (requests.max_tokens > 0)
    at = jnp.clip(last, 0, x.shape[1] - 1)
    logits = decoder.head_logits(config, weights, jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0])
    with jax.named_scope("sample"):
        sampled = sample(logits, requests.options, state.counts, jnp.zeros_like(state.token))
    token = jnp.where(here, sampled.token, state.token)
    state = dataclasses.replace(state, token=token, counts=state.counts.with_output(token, here))
    return state, jnp.where(here, token, NO_TOKEN)[None], jax.tree.map(lambda a: a[None], sampled)
