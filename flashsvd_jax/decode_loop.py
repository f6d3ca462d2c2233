"""The compiled steps that decode: several tokens of every sequence in one dispatch, in a loop on the device.

The loop is part of a CUDA graph. Whatever runs in its body beside the decoder costs a launch, about a microsecond however little
it does, and a condition more than ten. So greedy requests have a loop of their own, without conditions, with five launches a turn:

    rotation, embedding | the decoder | best token of each tile, the state, the tokens so far

Rotations are computed before the loop. The state that changes is of one shape, each part computed from the one before: only then
does XLA update it in one launch, and in place. tests/gates counts launches.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.models import decoder
from flashsvd_jax.models.decoder_layers import reach_of
from flashsvd_jax.models.weights import DecoderWeights
from flashsvd_jax.sampling.device import Sampled, best_token, sample
from flashsvd_jax.sequences import NO_TOKEN, DecodeState, Requests, wants_more
from pallas_kernels import target

Choice = tuple[jax.Array, Any, Any]
"""Tokens int32 [batch], what is known of how they were chosen, and the counts of tokens with them."""


def decode_greedily(
    config: ModelConfig, steps: int, weights: DecoderWeights, state: DecodeState, requests: Requests
) -> tuple[DecodeState, jax.Array, None, jax.Array]:
    """As `decode`, for requests of the most likely tokens and nothing else. It does not count tokens, as no penalty needs it."""

    def choose(state: DecodeState, logits: jax.Array, active: jax.Array) -> Choice:
        return best_token(logits), None, state.counts

    return _loop(config, steps, weights, state, requests, choose)


def decode(
    config: ModelConfig, steps: int, weights: DecoderWeights, state: DecodeState, requests: Requests
) -> tuple[DecodeState, jax.Array, Sampled, jax.Array]:
    """The next tokens of every sequence. The loop ends early when no sequence wants more, or a kernel gave up.

    Returns:
      The state; tokens, int32 [steps, batch], NO_TOKEN where a sequence has ended; how they were chosen; a stall as
      `pallas_kernels.Carried` has it, after which the rest means nothing.
    """

    def choose(state: DecodeState, logits: jax.Array, active: jax.Array) -> Choice:
        generated = state.length + 1 - requests.prompt_length
        sampled = sample(logits, requests.options, state.counts, generated)
        return sampled.token, sampled, state.counts.with_output(sampled.token, active)

    return _loop(config, steps, weights, state, requests, choose)


def loop_options() -> dict[str, Any] | None:
    """XLA options that make the loop over tokens part of the CUDA graph of its steps, so that the host sends one graph a dispatch.

    A loop by itself is sent step by step: 2.53 ms a token in place of 2.41 (H200, Llama-2-7B at ratio 0.5; bench/NOTES.md). The
    names are XLA's default ones and WHILE; a lone loop is below the default size of a graph.
    """
    if target().platform != "cuda" or target().interpret:
        return None
    kinds = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONDITIONAL,DYNAMIC_SLICE_FUSION,WHILE"
    return {"xla_gpu_enable_command_buffer": kinds, "xla_gpu_graph_min_graph_size": 1}


def _loop(
    config: ModelConfig, steps: int, weights: DecoderWeights, state: DecodeState, requests: Requests,
    choose: Callable[[DecodeState, jax.Array, jax.Array], Choice],
) -> tuple[DecodeState, jax.Array, Any, jax.Array]:  # fmt: skip
    """Decodes with ``choose(state, logits, active)``, where ``active`` says which sequences want a token; the rest as `decode`."""
    start = state.length
    reach = reach_of(requests.prompt_length, requests.max_tokens)
    rotations = decoder.rotations_ahead(config, start, steps, reach)

    cache, carried = decoder.begin(config, weights, state.cache, state.token, state.length)
    state = replace(state, cache=cache)

    def goes_on(carry: Any) -> jax.Array:
        turn, state, _, carried = carry
        return (wants_more(state, requests) & (turn < steps) & (carried.stall[0] == 0)).any()

    def step(carry: Any) -> Any:
        turn, state, outputs, carried = carry
        rotation = jax.lax.dynamic_index_in_dim(rotations, turn[0], keepdims=False)
        given = state.cache, state.token, state.length, rotation, carried
        cache, logits, carried = decoder.decode(config, weights, *given)
        active = wants_more(state, requests)
        with jax.named_scope("sample"):
            chosen, sampled, counts = choose(state, logits, active)
        turn = turn + 1
        token = jnp.where(active, chosen, NO_TOKEN)
        length = jnp.where(token == NO_TOKEN, state.length, start + turn)
        # Without the barrier XLA would write outputs with the old turn, which then could not be updated in place.
        turn, token, length = jax.lax.optimization_barrier((turn, token, length))
        put = partial(jax.lax.dynamic_update_index_in_dim, index=turn[0] - 1, axis=0)
        return turn, DecodeState(cache, token, length, counts), jax.tree.map(put, outputs, (token, sampled)), carried

    # Turns are counted in the shape of the rest of the state, so that one launch updates them.
    carry = (jnp.zeros_like(start), state, _outputs(config, steps, state, choose), carried)
    _, state, (tokens, sampled), carried = jax.lax.while_loop(goes_on, step, carry)
    return state, tokens, sampled, carried.stall


def _outputs(
    config: ModelConfig, steps: int, state: DecodeState, choose: Callable[..., Choice]
) -> tuple[jax.Array, Any]:
    """What `_loop` gives of turns that are not taken: no tokens, and zeros in the form of what ``choose`` tells of them."""
    batch = state.token.shape[0]
    logits, active = jax.ShapeDtypeStruct((batch, config.vocab_size), jnp.float32), jax.ShapeDtypeStruct((batch,), bool)
    _, sampled, _ = jax.eval_shape(choose, state, logits, active)
    return jnp.full((steps, batch), NO_TOKEN), jax.tree.map(lambda a: jnp.zeros((steps, *a.shape), a.dtype), sampled)
