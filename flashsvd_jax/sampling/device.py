"""Choosing tokens on the device. Every option is an array: what is compiled serves any values of them."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flashsvd_jax.errors import RequestError
from flashsvd_jax.sampling.counts import TokenCounts
from flashsvd_jax.sampling.params import MAX_LOGPROBS, MAX_STOP_IDS, MIN_TEMPERATURE, SamplingParams

_TILE = 8192  # of logits; few enough for XLA to reduce them in one block


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """Options of every sequence of a batch; the fields are those of SamplingParams, one entry a sequence."""

    temperature: jax.Array  # float32 [batch]; 0 is greedy
    top_k: jax.Array  # int32 [batch]; vocabulary size for all
    top_p: jax.Array  # float32 [batch]
    min_p: jax.Array  # float32 [batch]
    repetition_penalty: jax.Array  # float32 [batch]
    presence_penalty: jax.Array  # float32 [batch]
    frequency_penalty: jax.Array  # float32 [batch]
    seed: jax.Array  # uint32 [batch, 2]
    stop_ids: jax.Array  # int32 [batch, MAX_STOP_IDS]; -1 where unused
    wants_logprobs: jax.Array  # bool [batch]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
    """One token a sequence. Log-probabilities are zeros where nobody asked for them."""

    token: jax.Array  # int32 [batch]
    logprob: jax.Array  # float32 [batch]
    top_ids: jax.Array  # int32 [batch, MAX_LOGPROBS]
    top_logprobs: jax.Array  # float32 [batch, MAX_LOGPROBS]


def sampling_arrays(
    params: Sequence[SamplingParams], end_ids: Sequence[int], vocab_size: int, seeds: Sequence[int]
) -> SamplingArrays:
    """Puts the options of a batch into numpy arrays; ``seeds`` stand in for those that are None.

    Raises:
      RequestError: more stop tokens than are kept on the device, or one outside the vocabulary.
    """
    stop_ids = np.full((len(params), MAX_STOP_IDS), -1, np.int32)
    for row, p in enumerate(params):
        ids = sorted({*p.stop_token_ids, *(() if p.ignore_eos else end_ids)})
        if len(ids) > MAX_STOP_IDS:
            raise RequestError(
                f"stop_token_ids: at most {MAX_STOP_IDS} with the model's own end tokens, not {len(ids)}"
            )
        if ids and ids[-1] >= vocab_size:
            raise RequestError(f"stop_token_ids: {ids[-1]} is not a token; the vocabulary has {vocab_size}")
        stop_ids[row, : len(ids)] = ids
    actual = [seed if p.seed is None else p.seed for p, seed in zip(params, seeds, strict=True)]

    def column(name: str) -> np.ndarray:
        return np.array([getattr(p, name) for p in params], np.float32)

    arrays: dict[str, Any] = {  # of numpy until jit takes them
        "temperature": np.where(column("temperature") < MIN_TEMPERATURE, 0.0, column("temperature")).astype(np.float32),
        "top_k": np.array([min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params], np.int32),
        "top_p": np.maximum(column("top_p"), np.finfo(np.float32).tiny),  # of 0 no token at all would be enough
        "min_p": column("min_p"),
        "repetition_penalty": column("repetition_penalty"),
        "presence_penalty": column("presence_penalty"),
        "frequency_penalty": column("frequency_penalty"),
        "seed": np.array([[s >> 32, s & 0xFFFFFFFF] for s in actual], np.uint32),
        "stop_ids": stop_ids,
        "wants_logprobs": np.array([p.logprobs is not None for p in params]),
    }
    return SamplingArrays(**arrays)


def wants_more_than_greedy(options: SamplingArrays) -> jax.Array:
    """bool []: whether some sequence wants a draw, a penalty or log-probabilities. Numpy's if the options are of numpy."""
    return ((options.temperature > 0) | _penalised(options) | options.wants_logprobs).any()


def best_token(logits: jax.Array) -> jax.Array:
    """The index of the largest of the logits [batch, vocab], as `jnp.argmax` has it: of equal ones the first, of any NaN too.

    XLA makes two launches of a reduction over so many. This is one, of the best of each tile, and what compares those few is part
    of whatever uses the result.
    """
    batch, vocab = logits.shape
    tiles = -(-vocab // _TILE)
    width = -(-vocab // tiles)
    padded = jnp.pad(logits, ((0, 0), (0, tiles * width - vocab)), constant_values=-jnp.inf)
    number = jax.lax.broadcasted_iota(jnp.int32, padded.shape, 1)
    pairs = padded.reshape(batch, tiles, width), number.reshape(batch, tiles, width)
    worst = jnp.float32(-jnp.inf), jnp.int32(tiles * width)
    values, indices = jax.lax.reduce(pairs, worst, _better, (2,))
    return functools.reduce(_better, zip(values.T, indices.T, strict=True))[1]


def _better(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The larger of two values with its index; that of the lower index if they are equal."""
    (value, index), (other, at) = a, b
    nan, other_nan = jnp.isnan(value), jnp.isnan(other)
    equal = (value == other) | (nan & other_nan)
    first = (value > other) | (nan & ~other_nan) | (equal & (index < at))
    return jnp.where(first, value, other), jnp.where(first, index, at)


def sample(logits: jax.Array, options: SamplingArrays, counts: TokenCounts, step: jax.Array) -> Sampled:
    """Chooses a token for each sequence. Where all of them want the most likely one and no more, `best_token` is less work.

    Args:
      logits: float32 [batch, vocab].
      options: the sequences' options.
      counts: tokens seen so far.
      step: int32 [batch], how many tokens each sequence has generated; with the seed it determines the draw.
    """
    # Only what passes over the logits many times stands under a condition: a condition costs more than a pass or two.
    penalised = _penalise(logits, options, counts)
    token = jnp.where(options.temperature > 0, _draw(penalised, options, step), best_token(penalised))
    wanted = jnp.any(options.wants_logprobs)
    return Sampled(token, *jax.lax.cond(wanted, _logprobs, _no_logprobs, logits, token))


def filter_logits(logits: jax.Array, options: SamplingArrays) -> jax.Array:
    """Temperature, then top-k, top-p and min-p, each on what the one before left; what is cut becomes -inf."""
    scaled = logits / jnp.where(options.temperature > 0, options.temperature, 1.0)[:, None]
    needs_order = jnp.any((options.top_k < logits.shape[-1]) | (options.top_p < 1.0))
    scaled = jax.lax.cond(needs_order, _keep_top, lambda x, _: x, scaled, options)
    best = scaled.max(-1, keepdims=True)
    # min_p = 0 gives log 0 = -inf, which keeps everything
    return jnp.where(scaled < best + jnp.log(options.min_p)[:, None], -jnp.inf, scaled)


def _penalised(options: SamplingArrays) -> jax.Array:
    """bool [batch]"""
    return (options.repetition_penalty != 1.0) | (options.presence_penalty != 0.0) | (options.frequency_penalty != 0.0)


def _penalise(logits: jax.Array, options: SamplingArrays, counts: TokenCounts) -> jax.Array:
    """Repetition penalty of Keskar et al. 2019 over prompt and output; OpenAI's presence and frequency over the output."""
    seen = counts.in_prompt | (counts.in_output > 0)
    factor = options.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(seen, repeated, logits)
    logits = logits - options.frequency_penalty[:, None] * counts.in_output.astype(jnp.float32)
    return logits - options.presence_penalty[:, None] * (counts.in_output > 0).astype(jnp.float32)


def _keep_top(logits: jax.Array, options: SamplingArrays) -> jax.Array:
    """Cuts to the top k, then to the smallest set of the rest whose probability reaches top_p. The best token always stays.

    Both cuts are thresholds, found by search instead of sorting: XLA sorts a vocabulary through a library call, which cannot be
    part of the step's command buffer and would make the host wait in every step.
    """
    k = options.top_k[:, None]
    kth = _largest_threshold(logits, lambda keep: keep.sum(-1, dtype=jnp.int32) >= k)
    logits = jnp.where(logits < kth, -jnp.inf, logits)
    probabilities = jax.nn.softmax(logits, axis=-1)[:, None]
    top_p = options.top_p[:, None]
    reached = _largest_threshold(logits, lambda keep: jnp.where(keep, probabilities, 0.0).sum(-1) >= top_p)
    # A top_p of 1 keeps all, whatever the rounding of the sum.
    return jnp.where((logits < reached) & (top_p < 1.0), -jnp.inf, logits)


def _largest_threshold(values: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest value t [batch, 1] among ``values`` [batch, vocab] for which keeping those of at least t is enough.

    ``enough`` takes kept masks [batch, candidates, vocab] and gives [batch, candidates]. Floats are ordered as integers once
    negative ones are flipped, so eight rounds, each settling four bits, find the exact one.
    """
    ordered = _sortable(values)[:, None]
    threshold = jnp.zeros((values.shape[0], 1), jnp.uint32)
    digits = jnp.arange(1, 16, dtype=jnp.uint32)[None]
    for shift in range(28, -1, -4):
        candidates = threshold | (digits << shift)
        settled = enough(ordered >= candidates[:, :, None]).sum(-1, keepdims=True, dtype=jnp.uint32)
        threshold = threshold | (settled << shift)
    return jnp.where(ordered[:, 0] >= threshold, values, jnp.inf).min(-1, keepdims=True)


def _sortable(values: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _draw(logits: jax.Array, options: SamplingArrays, step: jax.Array) -> jax.Array:
    """Draws by the Gumbel trick with a key of the sequence's own seed and step, so that nothing beside it matters."""

    def noise(seed: jax.Array, step: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), step)
        return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

    return best_token(filter_logits(logits, options) + jax.vmap(noise)(options.seed, step))


def _logprobs(logits: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
    ids, best, left = [], [], logprobs
    for _ in range(MAX_LOGPROBS):  # one maximum at a time, because top_k is a library call too
        at = jnp.argmax(left, axis=-1).astype(jnp.int32)
        value = left.max(axis=-1)
        ids.append(jnp.where(jnp.isneginf(value), -1, at))
        best.append(value)
        left = jnp.where(jnp.arange(left.shape[-1], dtype=jnp.int32) == at[:, None], -jnp.inf, left)
    return chosen, jnp.stack(ids, axis=-1), jnp.stack(best, axis=-1)


def _no_logprobs(logits: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    empty = (logits.shape[0], MAX_LOGPROBS)
    return jnp.zeros(token.shape, jnp.float32), jnp.zeros(empty, jnp.int32), jnp.zeros(empty, jnp.float32)
