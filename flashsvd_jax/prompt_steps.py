"""The compiled steps that process prompts, chunk by chunk and in runs of layers, up to the first token of each sequence."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flashsvd_jax.background_compile import BackgroundStep, BackgroundSteps
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.kv_cache import joined
from flashsvd_jax.models import decoder, prompts
from flashsvd_jax.models.weights import DecoderWeights
from flashsvd_jax.sampling.counts import TokenCounts, no_counts
from flashsvd_jax.sampling.device import Sampled, best_token, sample
from flashsvd_jax.sequences import NO_TOKEN, DecodeState, Requests

Step = tuple[DecodeState, jax.Array, Sampled | None]
"""The state; output tokens int32 [1, batch], NO_TOKEN where there is none yet; how they were chosen, None of greedy requests."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FirstTokens:
    """What is known after a chunk.

    Attributes:
      state: all of a `DecodeState` but the cache: the token of each sequence, int32 [batch], NO_TOKEN where its prompt goes on; the
        prompts' lengths; counts of tokens.
      tokens: as `Step` has them.
      sampled: likewise.
    """

    state: tuple[jax.Array, jax.Array, TokenCounts]
    tokens: jax.Array
    sampled: Sampled | None


class PromptSteps:
    """A model's steps. Whether requests are ``greedy``, of the most likely tokens and nothing else, matters behind the layers only.

    Args:
      config: the model.
      weights: its weights.
      slots: of the cache.
      steps_of: makes the steps of a function, given what its first arguments are and options of `jax.jit`.
    """

    def __init__(
        self, config: ModelConfig, weights: DecoderWeights, slots: int, steps_of: Callable[..., BackgroundSteps]
    ):
        self._config, self._outer = config, dataclasses.replace(weights, layers=())
        self._runs = prompts.layer_runs(config, weights.layers)
        kinds = [_kind(run) for run in self._runs]
        self._kinds = [kinds.index(kind) for kind in kinds]
        # By bucket; those of layers by the kind of run too, the last by whether a chunk came before.
        self._begin = steps_of(prompts.begin, config)
        self._first = steps_of(prompts.first_chunk, config, slots, donate_argnums=1)
        self._next = steps_of(prompts.next_chunk, config, donate_argnums=(1, 2))
        # What the last run gives is smaller, so what it is given cannot hold it.
        self._first_of_last = steps_of(prompts.first_chunk, config, slots)
        self._next_of_last = steps_of(prompts.next_chunk, config, donate_argnums=1)
        self._end = {greedy: steps_of(first_tokens, config, greedy) for greedy in (True, False)}

    def __call__(self, chunks: Sequence[np.ndarray], requests: Requests, greedy: bool) -> Step:
        """Processes prompts, given in chunks of tokens int32 [batch, bucket], padded on the right."""
        return self.through(lambda step, *arguments: step(*arguments), chunks, requests, greedy)

    def compile(self, chunks: Sequence[jax.ShapeDtypeStruct], requests: Requests, greedy: bool) -> list[BackgroundStep]:
        """The steps that chunks of such shapes need, of which what is not compiled yet has begun to be."""
        steps = []

        def begun(step: BackgroundStep, *arguments: Any) -> Any:
            steps.append(step)
            return step.begin(*arguments)

        self.through(begun, chunks, requests, greedy)
        return steps

    def lower(self, chunks: Sequence[jax.ShapeDtypeStruct], requests: Requests) -> dict[BackgroundStep, Any]:
        """The steps of greedy requests for such chunks, each lowered, in order: for analysis, and to compile them elsewhere."""
        lowered = {}

        def shapes(step: BackgroundStep, *arguments: Any) -> Any:
            if step not in lowered:
                lowered[step] = step.lower(*arguments)
            return step.shapes(*arguments)

        self.through(shapes, chunks, requests, greedy=True)
        return lowered

    def of(self, weights: DecoderWeights) -> "PromptSteps":
        """The same steps with other weights of the same shapes."""
        other = copy.copy(self)
        other._outer = dataclasses.replace(weights, layers=())
        other._runs = prompts.layer_runs(self._config, weights.layers)
        return other

    def through(self, call: Callable[..., Any], chunks: Sequence[Any], requests: Requests, greedy: bool) -> Step:
        """All steps in order, each by ``call(step, *arguments)``."""
        start, caches, found = 0, list[Any](), None
        for tokens in chunks:
            bucket = tokens.shape[1]
            of = requests.prompt_length, requests.max_tokens
            chunk = call(self._begin[bucket], self._outer, tokens, np.int32(start), *of)
            for place, (run, kind) in enumerate(zip(self._runs, self._kinds, strict=True)):
                if found is None:
                    steps = self._first_of_last if run.is_last else self._first
                    cache, chunk = call(steps[bucket, kind], run, chunk)
                    caches.append(cache)
                else:
                    steps = self._next_of_last if run.is_last else self._next
                    caches[place], chunk = call(steps[bucket, kind], run, caches[place], chunk)
            found = call(self._end[greedy][bucket, found is None], self._outer, chunk, tokens, requests, found)
            start += bucket
        assert found is not None  # there is a chunk
        return DecodeState(joined(caches), *found.state), found.tokens, found.sampled


def first_tokens(
    config: ModelConfig, greedy: bool, weights: DecoderWeights, chunk: prompts.Chunk, tokens: jax.Array, requests: Requests,
    earlier: FirstTokens | None,
) -> FirstTokens:  # fmt: skip
    """The first output token of prompts whose last token is in a chunk behind all layers; keeps those found in earlier chunks.

    For ``greedy`` requests tokens are not counted, as no penalty needs it, and nothing is told of how they were chosen.
    """
    batch, bucket = tokens.shape
    last = requests.prompt_length - 1 - chunk.start
    here = (last >= 0) & (last < bucket) & (requests.max_tokens > 0)
    logits = decoder.head_logits(config, weights, (chunk.x + chunk.added)[:, 0])
    before = jnp.full((batch,), NO_TOKEN, jnp.int32) if earlier is None else earlier.state[0]
    counts = no_counts(batch, config.vocab_size) if earlier is None else earlier.state[2]
    if not greedy:
        counts = counts.with_prompt(tokens, chunk.start, requests.prompt_length)
    with jax.named_scope("sample"):
        # Not chosen on the device: the host would wait there for the prompt, and send what follows only then.
        sampled = None if greedy else sample(logits, requests.options, counts, jnp.zeros_like(last))
        chosen = best_token(logits) if sampled is None else sampled.token
    token = jnp.where(here, chosen, before)
    if not greedy:
        counts = counts.with_output(token, here)
    if earlier is not None:
        pick = lambda new, old: jnp.where(here.reshape(here.shape + (1,) * (new.ndim - 1)), new, old[0])  # noqa: E731
        sampled = jax.tree.map(pick, sampled, earlier.sampled)
    state = token, requests.prompt_length, counts
    return FirstTokens(state, token[None], jax.tree.map(lambda a: a[None], sampled))


def _kind(run: prompts.LayerRun) -> Any:
    """Equal for runs that one compiled step serves."""
    leaves, tree = jax.tree.flatten(run)
    return tree, [(a.shape, a.dtype) for a in leaves]
