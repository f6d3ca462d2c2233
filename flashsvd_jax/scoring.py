"""Log-probabilities of given tokens, and the perplexity of a text, through forward passes of a few fixed shapes."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.errors import RequestError
from flashsvd_jax.length_batches import SMALLEST_BUCKET, batch_within_workspace, bucket, length_batches, scores_held
from flashsvd_jax.model import Model
from flashsvd_jax.models.decoder import full_logits, token_losses
from flashsvd_jax.models.pass_options import prompt_options
from flashsvd_jax.models.weights import DecoderWeights
from flashsvd_jax.progress import progress_bar
from flashsvd_jax.token_ids import as_token_ids

PERPLEXITY_WINDOW = 2048
# From so many windows on, the spread between them gives the error; tokens of one window are not independent.
ENOUGH_WINDOWS = 20


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """How likely each token of a sequence is after those before it; the first one, after which none is, has no entry.

    Attributes:
      logprobs: float32 [tokens - 1], natural logarithms.
      greedy: bool [tokens - 1], whether the token is the most likely one.
    """

    logprobs: np.ndarray
    greedy: np.ndarray


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text: the exponential of its tokens' mean negative log-likelihood.

    Attributes:
      value: the perplexity.
      standard_error: ``value`` times the standard error of the mean negative log-likelihood, from the spread between
        windows, or between tokens where there are fewer than `ENOUGH_WINDOWS` windows.
      tokens: number of tokens scored.
      windows: number of windows that the text was cut into.
      window: their length in tokens; the last one may be shorter.
      losses: of each token that is scored, float64, by window.
    """

    value: float
    standard_error: float
    tokens: int
    windows: int
    window: int
    losses: tuple[np.ndarray, ...] = dataclasses.field(repr=False, compare=False)

    def over(self, other: "Perplexity") -> tuple[float, float]:
        """This perplexity divided by another one of the same tokens, and the standard error of that.

        Texts differ in difficulty more than models do; the difference at each token, or window, leaves that out.

        Raises:
          RequestError: the other one is of other tokens or windows.
        """
        if [len(loss) for loss in self.losses] != [len(loss) for loss in other.losses]:
            raise RequestError("perplexities of different tokens or windows cannot be compared")
        differences = [mine - theirs for mine, theirs in zip(self.losses, other.losses, strict=True)]
        return _exponential(*_mean_and_error(differences))


def score(
    model: Model, sequences: Sequence[Sequence[int]], *, batch: int | None = None, progress: bool = True
) -> list[TokenScores]:
    """Scores every token of each sequence but its first.

    Sequences are padded to powers of two and computed together, so that a few shapes are compiled for any lengths.

    Args:
      model: from `load`.
      sequences: token ids, at least 2 and at most ``model.max_length + 1`` each: the last one is predicted, not read.
      batch: sequences computed together; by default as many as keep the temporaries near 1 GiB.
      progress: show a bar when it takes more than two seconds.

    Raises:
      RequestError: a sequence is too short or too long, or has a token outside the vocabulary.
    """
    given = "score takes a list of sequences, each a list of token ids"
    if isinstance(sequences, str) or not isinstance(sequences, Iterable):
        raise RequestError(given)
    sequences = [as_token_ids(ids, given) for ids in sequences]
    buckets = [bucket(len(ids) - 1, model.max_length, SMALLEST_BUCKET) for ids in sequences]
    return _score(model, sequences, buckets, batch, progress)


def perplexity(
    model: Model,
    text: str | Sequence[int],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch: int | None = None,
    progress: bool = True,
) -> Perplexity:
    """Perplexity of a text, tokenized as a whole and cut into windows.

    By default windows do not overlap, and the first token of each is not scored, because nothing in its window comes
    before it; so SVD papers report WikiText-2, except that a shorter last window counts here too. With a smaller
    ``stride`` windows overlap: each begins so many tokens after the one before and scores only what that one did not.

    Args:
      model: from `load`.
      text: a text, or its token ids.
      window: tokens in a window; by default 2048, or ``model.max_length`` if that is less.
      stride: tokens from one window's start to the next one's; by default ``window``.
      batch: windows computed together; see `score`.
      progress: show a bar when it takes more than two seconds.

    Raises:
      RequestError: fewer than 3 tokens, or a window or stride that cannot be used.
    """
    window = min(model.max_length, PERPLEXITY_WINDOW) if window is None else window
    stride = window if stride is None else stride
    if not 2 <= window <= model.max_length:
        raise RequestError(f"window must be from 2 to {model.max_length}, the model's max_length, not {window}")
    if not 1 <= stride <= window:
        raise RequestError(f"stride must be from 1 to the window of {window} tokens, not {stride}")
    ids = _token_ids(model, text)
    windows = list(_windows(len(ids), window, stride))
    pieces = [ids[start:end] for start, end, _ in windows]
    padded = bucket(min(window, len(ids)) - 1, model.max_length, SMALLEST_BUCKET)
    buckets = [padded] * len(pieces)  # the last one's too: one shape is enough
    scores = _score(model, pieces, buckets, batch, progress)
    losses = [
        -piece.logprobs[first - start - 1 :].astype(np.float64)
        for (start, _, first), piece in zip(windows, scores, strict=True)
    ]
    value, error = _exponential(*_mean_and_error(losses))
    return Perplexity(value, error, sum(map(len, losses)), len(windows), window, tuple(losses))


def _token_ids(model: Model, text: str | Sequence[int]) -> list[int]:
    if isinstance(text, str):
        if model.tokenizer is None:
            raise RequestError("this model was made without a tokenizer: give the text as token ids")
        ids = model.tokenizer.encode(text)
    else:
        ids = as_token_ids(text, "a perplexity is that of one text, or of one list of token ids")
    if len(ids) < 3:
        raise RequestError(f"the text has {len(ids)} tokens; a perplexity with its error needs at least 3")
    return ids


def _windows(count: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first token scored) of each window over ``count`` tokens; one that scores nothing is left out."""
    scored = 1
    for start in range(0, count, stride):
        end = min(start + window, count)
        first = max(scored, start + 1)
        if first < end:
            yield start, end, first
        scored = end
        if end == count:
            return


def _mean_and_error(losses: list[np.ndarray]) -> tuple[float, float]:
    """Mean over all tokens and its standard error: a ratio estimate over windows of unequal length, or over tokens."""
    if len(losses) >= ENOUGH_WINDOWS:
        sums, counts = np.array([loss.sum() for loss in losses]), np.array([len(loss) for loss in losses])
    else:
        sums = np.concatenate(losses)
        counts = np.ones(len(sums))
    mean = sums.sum() / counts.sum()
    groups = len(sums)
    spread = np.square(sums - mean * counts).sum() * groups / (groups - 1)
    return float(mean), float(np.sqrt(spread) / counts.sum())


def _exponential(mean: float, error: float) -> tuple[float, float]:
    """Of a mean and its standard error."""
    with np.errstate(over="ignore"):
        value = float(np.exp(mean))
    return value, value * error


def _score(
    model: Model, sequences: Sequence[Sequence[int]], buckets: Sequence[int], batch: int | None, progress: bool
) -> list[TokenScores]:
    _check(model, sequences, batch)
    lengths = [len(ids) for ids in sequences]
    found: dict[int, TokenScores] = {}

    def batch_size(padded: int, count: int) -> int:
        return batch or _batch_size(model.config, padded, count)

    scores = _compiled_scores(frozenset((prompt_options(model.weights.layers) or {}).items()))
    with progress_bar("scoring", total=sum(lengths), unit=" tokens", enabled=progress) as bar:
        for padded, size, rows in length_batches(lengths, buckets, batch_size):
            pieces = [sequences[i] for i in rows]
            found |= zip(rows, _score_batch(model, scores, pieces, padded, size), strict=True)
            bar.update(sum(map(len, pieces)))
    return [found[i] for i in range(len(sequences))]


def _check(model: Model, sequences: Sequence[Sequence[int]], batch: int | None) -> None:
    if batch is not None and batch < 1:
        raise RequestError(f"batch must be at least 1, not {batch}")
    for number, ids in enumerate(sequences):
        if not 2 <= len(ids) <= model.max_length + 1:
            allowed = f"from 2 to {model.max_length + 1}, one more than max_length"
            raise RequestError(f"sequence {number} has {len(ids)} tokens; it may have {allowed}")
        if min(ids) < 0 or max(ids) >= model.config.vocab_size:
            raise RequestError(f"sequence {number} has token ids outside the vocabulary of {model.config.vocab_size}")


def _batch_size(config: ModelConfig, padded: int, count: int) -> int:
    """Sequences at once, by the largest temporary of one: logits or attention scores."""
    return batch_within_workspace(4 * padded * max(config.vocab_size, scores_held(config.num_heads, padded)), count)


def _score_batch(
    model: Model, scores: Callable[..., Any], sequences: Sequence[Sequence[int]], bucket: int, batch: int
) -> list[TokenScores]:
    tokens = np.zeros((batch, bucket + 1), np.int32)
    lengths = np.zeros(batch, np.int32)  # rows that only fill the batch read nothing
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids)] = ids
        lengths[row] = len(ids) - 1
    logprobs, greedy = map(np.asarray, scores(model.config, model.weights, tokens, lengths))
    return [TokenScores(logprobs[row, : lengths[row]], greedy[row, : lengths[row]]) for row in range(len(sequences))]


@cache
def _compiled_scores(options: frozenset[tuple[str, Any]]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`_token_scores`, compiled with these options of XLA."""
    return jax.jit(_token_scores, static_argnums=0, compiler_options=dict(options))


def _token_scores(
    config: ModelConfig, weights: DecoderWeights, tokens: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of tokens[:, 1:] and whether each is the most likely, [batch, bucket] both."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    real = jnp.arange(inputs.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
    logits = full_logits(config, weights, inputs, real)
    return -token_losses(logits, targets), jnp.argmax(logits, axis=-1) == targets
