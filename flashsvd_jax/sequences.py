"""The sequences of a batch: what each asks for, and where it stands."""

import dataclasses
import functools
import operator

import jax

from flashsvd_jax.kv_cache import KVCache
from flashsvd_jax.sampling.counts import TokenCounts
from flashsvd_jax.sampling.device import SamplingArrays

NO_TOKEN = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Requests:
    """What each sequence of a batch asks for."""

    prompt_length: jax.Array  # int32 [batch]
    max_tokens: jax.Array  # int32 [batch]; 0 for a row that only fills the batch
    options: SamplingArrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Where every sequence of a batch stands. Donated to each step, so the cache is updated in place."""

    cache: KVCache
    token: jax.Array  # int32 [batch], chosen last, not in the cache yet; NO_TOKEN before the first and after the last
    length: jax.Array  # int32 [batch], tokens in the cache; of the whole prompt from its first chunk on
    counts: TokenCounts  # of all tokens chosen, or of none but the first if all requests are greedy


def wants_more(state: DecodeState, requests: Requests) -> jax.Array:
    """bool [batch]: sequences whose last token neither is a stop token nor reaches their limit."""
    # One comparison after the other: XLA makes a reduction over them a launch of its own.
    stopped = functools.reduce(operator.or_, (state.token == ids for ids in requests.options.stop_ids.T))
    generated = state.length - requests.prompt_length + 1
    return (state.token != NO_TOKEN) & ~stopped & (generated < requests.max_tokens)
