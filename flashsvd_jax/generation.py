"""Text in, text out: `generate`, `stream_generate` and `batch_generate` over a loaded model."""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from flashsvd_jax.compile_cache import cache_hits, compile_count
from flashsvd_jax.engine import TokenBlock
from flashsvd_jax.errors import RequestError
from flashsvd_jax.model import Model
from flashsvd_jax.sampling import SamplingParams
from flashsvd_jax.stop_text import StopText
from flashsvd_jax.token_ids import as_token_ids

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities of one position under the model itself: of the chosen token, and of the most likely ones."""

    token: int
    logprob: float
    top: dict[int, float]


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Times of one call, in seconds of wall clock.

    Attributes:
      prompt_tokens, generated_tokens: of this completion, an end token included that its ids leave out.
      time_to_first_token: from the call to the first token on the host, compilation included.
      decode_seconds: from the first token to the last one.
      compiled: executables built meanwhile; 0 for a warm call.
      read: of those, how many an earlier process had left.
    """

    prompt_tokens: int
    generated_tokens: int
    time_to_first_token: float
    decode_seconds: float
    compiled: int
    read: int

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed of this sequence, the first token not counted; 0 where there was only one."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.generated_tokens > 1 else 0.0


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of streamed text. ``finish_reason`` ("stop" or "length") is set on the last one."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    statistics: Statistics
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclasses.dataclass(frozen=True)
class Completion:
    """A whole completion."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    statistics: Statistics
    logprobs: tuple[TokenLogprob, ...] = ()


def generate(model: Model, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> str:
    """The completion of a prompt.

    Args:
      model: from `load`.
      prompt: text, or token ids.
      params: options; or give their fields as keywords, such as ``temperature=0.0, max_tokens=64``.

    Raises:
      RequestError: the prompt is empty or too long, or an option is not valid.
    """
    return batch_generate(model, [prompt], params, **options)[0].text


def stream_generate(
    model: Model, prompt: Prompt, params: SamplingParams | None = None, **options: Any
) -> Iterator[Piece]:
    """Yields the completion in pieces, as tokens arrive; arguments as for `generate`."""
    return (piece for _, piece in _run(model, [prompt], [_params(params, options)]))


def batch_generate(
    model: Model,
    prompts: Iterable[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    **options: Any,
) -> list[Completion]:
    """Completions of several prompts, computed together; each is what the prompt alone would give, but for rounding, as sums
    are made otherwise at another batch size.

    Args:
      model: from `load`.
      prompts: texts or token ids, of any lengths.
      params: options for all, or one a prompt.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise RequestError("batch_generate takes a list of prompts; a single one goes to generate")
    prompts = list(prompts)
    if isinstance(params, Sequence):
        if options or len(params) != len(prompts):
            raise RequestError(
                f"{len(prompts)} prompts need one set of options or as many, and no keywords beside a list"
            )
        everyone = list(params)
    else:
        everyone = [_params(params, options)] * len(prompts)
    pieces: list[list[Piece]] = [[] for _ in prompts]
    for row, piece in _run(model, prompts, everyone):
        pieces[row].append(piece)
    return [_join(parts) for parts in pieces]


def _params(params: SamplingParams | None, options: dict[str, Any]) -> SamplingParams:
    if params is not None and options:
        raise RequestError(f"give options in params or as keywords, not both: {', '.join(options)}")
    known = [field.name for field in dataclasses.fields(SamplingParams)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise RequestError(f"unknown option {', '.join(unknown)}; known: {', '.join(known)}")
    return params or SamplingParams(**options)


def _join(pieces: list[Piece]) -> Completion:
    last = pieces[-1]
    return Completion(
        text="".join(p.text for p in pieces),
        token_ids=tuple(t for p in pieces for t in p.token_ids),
        finish_reason=last.finish_reason or "length",
        statistics=last.statistics,
        logprobs=tuple(entry for p in pieces for entry in p.logprobs),
    )


def _run(model: Model, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> Iterator[tuple[int, Piece]]:
    """Yields (row, piece); every row ends with one piece that has a finish reason."""
    before = time.perf_counter(), compile_count(), cache_hits()
    if not prompts:
        raise RequestError("no prompts were given")
    if model.tokenizer is None and any(p.stop for p in params):
        raise RequestError("stop needs a tokenizer, and this model was made without one: use stop_token_ids")
    ids = [_encode(model, prompt) for prompt in prompts]
    engine = model.engine(len(prompts))
    limits = [
        min(p.max_tokens or engine.max_length, engine.max_length - len(i)) for p, i in zip(params, ids, strict=True)
    ]
    rows = [_Row(model, p, len(i), limit, *before) for p, i, limit in zip(params, ids, limits, strict=True)]
    for block in engine.generate(ids, params):
        for number, row in enumerate(rows):
            if row.finish_reason is None and (piece := row.take(block, number)) is not None:
                yield number, piece
        if all(row.finish_reason is not None for row in rows):
            return


def _encode(model: Model, prompt: Prompt) -> list[int]:
    if not isinstance(prompt, str):
        return as_token_ids(prompt, "a prompt is a text or a list of token ids; several prompts go to batch_generate")
    if model.tokenizer is None:
        raise RequestError("this model was made without a tokenizer: give prompts as token ids")
    if not prompt:
        raise RequestError("the prompt is empty: it has no token to start from")
    return model.tokenizer.encode(prompt)


class _Row:
    """One sequence on the host: decodes its tokens, looks for stop texts, keeps its times."""

    def __init__(
        self,
        model: Model,
        params: SamplingParams,
        prompt_tokens: int,
        limit: int,
        clock: float,
        compiled: int,
        read: int,
    ):
        self.finish_reason: str | None = None
        self._params, self._prompt_tokens, self._limit = params, prompt_tokens, limit
        ends = () if params.ignore_eos else model.config.eos_token_ids
        self._stop_ids = {*params.stop_token_ids, *ends}
        self._text = model.tokenizer.stream() if model.tokenizer else None
        self._stop = StopText(tuple(params.stop))
        self._clock, self._compiled, self._read = clock, compiled, read
        self._first = self._last = clock
        self._count = 0

    def take(self, block: TokenBlock, row: int) -> Piece | None:
        """The piece that a block of tokens adds to this sequence, if it adds any."""
        shown: list[str] = []
        kept: list[int] = []
        logprobs: list[TokenLogprob] = []
        for step, token in enumerate(block.tokens[:, row].tolist()):
            if token < 0 or self.finish_reason is not None:
                break
            self._count += 1
            if token in self._stop_ids:
                self.finish_reason = "stop"
                break
            kept.append(token)
            if self._params.logprobs is not None:
                logprobs.append(_logprob(block, step, row, token, self._params.logprobs))
            shown.append(self._stop.add(self._text.add(token)) if self._text else "")
            if self._stop.found:
                self.finish_reason = "stop"
            elif self._count >= self._limit:
                self.finish_reason = "length"
        if not kept and self.finish_reason is None:
            return None
        if self.finish_reason is not None and self._text and not self._stop.found:
            shown.append(self._stop.add(self._text.finish()))
            if self._stop.found:
                self.finish_reason = "stop"
            shown.append(self._stop.finish())
        return Piece("".join(shown), tuple(kept), self.finish_reason, self._statistics(), tuple(logprobs))

    def _statistics(self) -> Statistics:
        self._last = time.perf_counter()
        if self._first == self._clock:
            self._first = self._last
        return Statistics(
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._count,
            time_to_first_token=self._first - self._clock,
            decode_seconds=self._last - self._first,
            compiled=compile_count() - self._compiled,
            read=cache_hits() - self._read,
        )


def _logprob(block: TokenBlock, step: int, row: int, token: int, best: int) -> TokenLogprob:
    sampled = block.sampled
    assert sampled is not None  # it is None where nobody wants log-probabilities
    ids = np.asarray(sampled.top_ids)[step, row, :best].tolist()
    values = np.asarray(sampled.top_logprobs)[step, row, :best].tolist()
    top = {i: v for i, v in zip(ids, values, strict=True) if i >= 0}
    return TokenLogprob(token, float(np.asarray(sampled.logprob)[step, row]), top)
