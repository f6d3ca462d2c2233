"""What drives the compiled steps of generation.

Every shape is fixed: a batch size, a cache length, a few prompt lengths (buckets), and a number of tokens per dispatch. Prompts,
lengths, positions and sampling options are arrays, so after one call of a bucket nothing is compiled again. Calls whose requests
are all greedy choose and decode by steps of their own, which are compiled when the first of them comes.

    prompt  |--- chunk ---|--- chunk ---|- bucket -|        each through the layers in runs, the next sent while one is computed
    cache   |=============|=============|======....|        slots past a prompt's end hold padding, masked until overwritten
    decode                                     |kkkk|kkkk|  k tokens a dispatch, on a GPU the next sent before the last is read
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flashsvd_jax import decode_loop
from flashsvd_jax.background_compile import BackgroundStep, BackgroundSteps, preferring
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.errors import KernelError, RequestError
from flashsvd_jax.kv_cache import empty_cache
from flashsvd_jax.models.absorption import weights_for_decoding
from flashsvd_jax.models.pass_options import prompt_options
from flashsvd_jax.models.weights import DecoderWeights
from flashsvd_jax.prompt_chunks import PromptChunks, cut
from flashsvd_jax.prompt_steps import PromptSteps
from flashsvd_jax.sampling.counts import no_counts
from flashsvd_jax.sampling.device import Sampled, sampling_arrays, wants_more_than_greedy
from flashsvd_jax.sampling.params import SamplingParams
from flashsvd_jax.sequences import DecodeState, Requests
from pallas_kernels import implementation_names, stall_reason, target
from pallas_kernels.registry import Record

DECODE_CHUNK = 8


@dataclasses.dataclass(frozen=True)
class TokenBlock:
    """Tokens of one dispatch on the host: int32 [steps, batch], -1 where a sequence had ended; log-probabilities likewise."""

    tokens: np.ndarray
    sampled: Sampled | None  # still on the device, and copied where log-probabilities are wanted; None where none are


def check_kernels(name: str) -> None:
    """Raises RequestError unless ``name`` is "auto" or that of an implementation."""
    known = implementation_names()
    if name != "auto" and name not in known:
        raise RequestError(f"no kernels named {name!r}; known: {', '.join(['auto', *sorted(known)])}")


def check_stall(stall: np.ndarray) -> None:
    """Raises KernelError if a kernel gave up waiting; ``stall`` is as `pallas_kernels.Carried` has it."""
    reason = stall_reason(stall.tolist())
    if reason is not None:
        raise KernelError(f"{reason}; kernels='products' does without that kernel")


class Engine:
    """Generates token ids for up to ``batch`` prompts at once.

    Args:
      config: the model.
      weights: its weights, on the device.
      batch: sequences computed together.
      max_length: longest prompt plus completion, in tokens.
      decode_chunk: tokens per dispatch; more hides the host, fewer stream sooner.
      prefill_chunk: longer prompts are processed in pieces of this many tokens, rounded up to a power of two; what suits the
        device if not given, see `prompt_chunks`.
      kernels: "auto" for the fastest implementation of every op, or the name of one that is tried first, such as "xla".

    Attributes:
      chunks: how prompts are cut.
      kernels_used: implementations that the steps compiled so far use, and why others refused.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        *,
        batch: int = 1,
        max_length: int,
        decode_chunk: int = DECODE_CHUNK,
        prefill_chunk: int | None = None,
        kernels: str = "auto",
    ):
        check_kernels(kernels)
        if batch < 1 or max_length < 2 or decode_chunk < 1 or (prefill_chunk is not None and prefill_chunk < 1):
            raise RequestError("batch, decode_chunk and prefill_chunk must be at least 1, max_length at least 2")
        if config.learned_positions and max_length > config.max_position:
            raise RequestError(
                f"{max_length} tokens are more than the {config.max_position} positions that the model's table holds"
            )
        self.config, self.weights, self.batch, self.max_length = config, weights, batch, max_length
        self.decode_chunk = decode_chunk
        self.chunks = PromptChunks.of(batch, max_length, kernels, prefill_chunk)
        self.kernels_used: Record = {}
        # Dispatches that are sent before the last is read, so that the device never waits for the host. A CPU is both.
        self._ahead = 0 if target().platform == "cpu" else 1
        with preferring(kernels):
            self._decoded_with = weights_for_decoding(config, weights, batch, self.chunks.slots)
        steps = partial(BackgroundSteps.of, kernels=kernels, used=self.kernels_used)
        of_prompts = partial(steps, compiler_options=prompt_options(weights.layers))
        self._prompts = PromptSteps(config, weights, self.chunks.slots, of_prompts)
        options = {"donate_argnums": 1, "compiler_options": decode_loop.loop_options()}
        self._decode = {
            greedy: steps(decode, config, decode_chunk, **options)["of all shapes"]
            for greedy, decode in ((True, decode_loop.decode_greedily), (False, decode_loop.decode))
        }

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> Iterator[TokenBlock]:
        """Yields the tokens of each dispatch, the first after the prompts are processed.

        Args:
          prompts: token ids, at most ``batch`` prompts of any lengths.
          params: one set of options a prompt.

        Raises:
          RequestError: no prompt, an empty one, one that leaves no room in the cache, or a token outside the vocabulary.
          KernelError: a kernel gave up waiting for other parts of itself.
        """
        requests = self._requests(prompts, params)
        greedy = not wants_more_than_greedy(requests.options)
        steps_left, lengths = int(np.max(requests.max_tokens)) - 1, self.chunks.lengths(max(map(len, prompts)))
        # Nothing runs before all is there: XLA takes the time of products that it tries out.
        for step in self._begin(lengths, requests, greedy, decodes=steps_left > 0):
            step.wait()
        state, first, sampled = self._prompts(cut(prompts, self.batch, lengths), requests, greedy)
        requests = jax.device_put(requests)  # once, not with every dispatch, and while the device is busy
        pending: list[tuple[jax.Array, Sampled | None, jax.Array | None]] = [(first, sampled, None)]
        while pending or steps_left > 0:
            while steps_left > 0 and len(pending) <= self._ahead:
                state, *ahead = self._decode[greedy](self._decoded_with, state, requests)
                steps_left -= self.decode_chunk
                pending.append(tuple(ahead))
            tokens, sampled, stall = pending.pop(0)
            host = np.asarray(tokens)
            if stall is not None:
                check_stall(np.asarray(stall))
            yield TokenBlock(host, sampled)
            if (host[-1] < 0).all():
                return

    def prepare(self, longest: int | None = None, *, greedy: bool) -> None:
        """Compiles what greedy requests, or all others, need for prompts of up to ``longest`` tokens, or of any that fit.

        Raises:
          RequestError: no prompt is so long.
        """
        longest = self.max_length - 1 if longest is None else longest
        if not 1 <= longest < self.max_length:
            raise RequestError(f"longest must be from 1 to {self.max_length - 1} tokens, not {longest}")
        requests = self._requests([[0]], [SamplingParams(temperature=0.0 if greedy else 1.0, max_tokens=2)])
        steps = [self._begin(cuts, requests, greedy, decodes=True) for cuts in self.chunks.cuts(longest)]
        for step in itertools.chain(*steps):
            step.wait()

    def lower_decode(self, *, greedy: bool = True) -> Any:
        """The decode step of greedy requests, or of all others, lowered for its shapes: for memory and kernel analysis."""
        shapes = partial(jax.tree.map, lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype))
        requests = shapes(self._requests([[0]], [SamplingParams(max_tokens=1)]))
        return self._decode[greedy].lower(self._decoded_with, self._state_shapes, requests)

    @functools.cached_property
    def _state_shapes(self) -> DecodeState:
        """Of what decoding begins with."""

        def state() -> DecodeState:
            nothing = jnp.zeros((self.batch,), jnp.int32)
            cache = empty_cache(self.config, self.batch, self.chunks.slots, self.weights.embedding.dtype)
            return DecodeState(cache, nothing, nothing, no_counts(self.batch, self.config.vocab_size))

        return jax.eval_shape(state)

    def _begin(
        self, lengths: Sequence[int], requests: Requests, greedy: bool, *, decodes: bool
    ) -> list[BackgroundStep]:
        """The steps that requests with chunks of these lengths need, of which what is not compiled yet has begun to be."""
        decode = [self._decode[greedy]] * decodes
        for step in decode:  # first, as it takes longest; the rest is traced meanwhile
            step.begin(self._decoded_with, self._state_shapes, requests)
        chunks = [jax.ShapeDtypeStruct((self.batch, length), jnp.int32) for length in lengths]
        return [*decode, *self._prompts.compile(chunks, requests, greedy)]

    def _requests(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> Requests:
        if not prompts or len(prompts) > self.batch or len(prompts) != len(params):
            raise RequestError(
                f"between 1 and {self.batch} prompts with as many options are needed, not {len(prompts)}"
            )
        for number, prompt in enumerate(prompts):
            which = f"prompt {number}" if len(prompts) > 1 else "the prompt"
            if not prompt:
                raise RequestError(f"{which} is empty: it has no token to start from")
            if len(prompt) >= self.max_length:
                more = "raise max_length or " if self.max_length < self.config.max_position else ""
                raise RequestError(
                    f"{which} has {len(prompt)} tokens; the cache holds {self.max_length} and the completion needs at least one:"
                    f" {more}shorten the prompt"
                )
            if min(prompt) < 0 or max(prompt) >= self.config.vocab_size:
                raise RequestError(f"{which} has token ids outside the vocabulary of {self.config.vocab_size}")
        fill = self.batch - len(prompts)
        room = [self.max_length - len(prompt) for prompt in prompts]
        limits = [
            free if p.max_tokens is None else min(free, p.max_tokens) for free, p in zip(room, params, strict=True)
        ]
        everyone = [*params, *[SamplingParams(temperature=0.0)] * fill]
        seeds = [int(s) for s in np.random.default_rng().integers(0, 2**63, self.batch)]
        arrays: dict[str, Any] = {  # of numpy until jit takes them
            "prompt_length": np.array([*map(len, prompts), *[1] * fill], np.int32),
            "max_tokens": np.array([*limits, *[0] * fill], np.int32),
            "options": sampling_arrays(everyone, self.config.eos_token_ids, self.config.vocab_size, seeds),
        }
        return Requests(**arrays)
