"""Texts to vectors, through an encoder's forward passes of a few fixed shapes."""

from collections.abc import Iterable, Sequence

import numpy as np

from flashsvd_jax.encoder_config import EncoderConfig
from flashsvd_jax.encoder_model import EncoderModel
from flashsvd_jax.errors import RequestError
from flashsvd_jax.length_batches import SMALLEST_BUCKET, batch_within_workspace, bucket, length_batches, scores_held
from flashsvd_jax.models.encoder import POOLINGS
from flashsvd_jax.progress import progress_bar
from flashsvd_jax.token_ids import as_token_ids


def encode(
    model: EncoderModel,
    texts: Iterable[str | Sequence[int]],
    *,
    pooling: str = "mean",
    normalize: bool = False,
    max_length: int | None = None,
    truncate: bool = False,
    batch: int | None = None,
    progress: bool = True,
) -> np.ndarray:
    """One vector for each text.

    Texts are padded to powers of two and computed together, so that a few shapes are compiled for any lengths.

    Args:
      model: from `load_encoder`.
      texts: texts, or token ids with the special tokens that the model expects.
      pooling: "mean" over a text's tokens, special ones included, or "cls" for its first one.
      normalize: scale each vector to length 1, so that products of vectors are cosines.
      max_length: tokens of the longest text; by default, and at most, what the model knows positions for.
      truncate: cut longer texts off there; otherwise they are an error.
      batch: texts computed together; by default as many as keep the temporaries near 1 GiB.
      progress: show a bar when it takes more than two seconds.

    Returns:
      float32 [texts, embed], in the order given.

    Raises:
      RequestError: a text is too long or has no token, an option cannot be used, or the model is no encoder.
    """
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise RequestError(
            f"texts is {'a single text' if isinstance(texts, str) else repr(texts)}: give a list of them"
        )
    texts = list(texts)
    _check(model, pooling, max_length, batch)
    limit = model.config.max_position if max_length is None else max_length
    ids = _token_ids(model, texts, limit, truncate)
    buckets = [bucket(len(row), model.config.max_position, SMALLEST_BUCKET) for row in ids]

    def batch_size(padded: int, count: int) -> int:
        return batch or _batch_size(model.config, padded, count)

    found = np.zeros((len(ids), model.config.hidden_size), np.float32)
    with progress_bar("encoding", total=len(ids), unit=" texts", enabled=progress) as bar:
        for padded, size, rows in length_batches([len(row) for row in ids], buckets, batch_size):
            tokens, lengths = np.zeros((size, padded), np.int32), np.zeros(size, np.int32)
            for place, row in enumerate(rows):
                tokens[place, : len(ids[row])], lengths[place] = ids[row], len(ids[row])
            vectors = model.vectors(tokens, lengths, pooling=pooling, normalize=normalize)
            found[rows] = np.asarray(vectors)[: len(rows)]
            bar.update(len(rows))
    return found


def _check(model: EncoderModel, pooling: str, max_length: int | None, batch: int | None) -> None:
    if not isinstance(model, EncoderModel):
        raise RequestError("only an encoder encodes texts: load one with load_encoder")
    if pooling not in POOLINGS:
        raise RequestError(f"pooling {pooling!r} is not one of {', '.join(POOLINGS)}")
    if max_length is not None and not 1 <= max_length <= model.config.max_position:
        most = model.config.max_position
        raise RequestError(f"max_length must be from 1 to the {most} positions that the model knows, not {max_length}")
    if batch is not None and batch < 1:
        raise RequestError(f"batch must be at least 1, not {batch}")


def _token_ids(
    model: EncoderModel, texts: Sequence[str | Sequence[int]], limit: int, truncate: bool
) -> list[Sequence[int]]:
    given = "texts are texts or lists of token ids"
    ids: list[Sequence[int]] = [() if isinstance(text, str) else as_token_ids(text, given) for text in texts]
    written = [number for number, text in enumerate(texts) if isinstance(text, str)]
    if written and model.tokenizer is None:
        raise RequestError("this model was made without a tokenizer: give the texts as token ids")
    if written and model.tokenizer is not None:
        cut = limit if truncate else None
        for number, row in zip(written, model.tokenizer.encode_all([str(texts[n]) for n in written], cut), strict=True):
            ids[number] = row
    ids = [row[:limit] for row in ids] if truncate else ids
    for number, row in enumerate(ids):
        if not row:
            raise RequestError(f"text {number} has no token")
        if len(row) > limit:
            raise RequestError(
                f"text {number} has {len(row)} tokens, more than the {limit} that are read; truncate=True cuts texts off there"
            )
        if min(row) < 0 or max(row) >= model.config.vocab_size:
            raise RequestError(f"text {number} has token ids outside the vocabulary of {model.config.vocab_size}")
    return ids


def _batch_size(config: EncoderConfig, padded: int, count: int) -> int:
    """Texts at once, by the largest temporary of one: attention scores, or what lies between the feed-forward projections."""
    row = 4 * padded * max(scores_held(config.num_heads, padded), config.intermediate_size * (1 + config.gated))
    return batch_within_workspace(row, count)
