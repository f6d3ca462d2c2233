"""Scores and perplexity against transformers' own log-probabilities."""

import math
from typing import Any

import jax
import numpy as np
import pytest
from hf_models import build_model, reference_of

from flashsvd_jax import scoring
from flashsvd_jax.compile_cache import expect_no_compile
from flashsvd_jax.errors import RequestError
from flashsvd_jax.model import Model
from flashsvd_jax.models.weights import weights_from_params
from flashsvd_jax.scoring import perplexity, score
from flashsvd_jax.shapes import shape_config

TOLERANCE = 1e-4


def draw(count: int, vocab: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, vocab, count).tolist()


@pytest.mark.parametrize("batch", [None, 3])
def test_scores_of_sequences_of_all_lengths_are_those_of_transformers(tiny: Any, batch: int | None) -> None:
    sequences = [draw(n, tiny.model.config.vocab_size, seed=n) for n in (17, 2, 30, 16, 18, 5, 33)]
    found = score(tiny.model, sequences, batch=batch)
    for ids, got in zip(sequences, found, strict=True):
        logprobs, greedy = tiny.logprobs(ids)
        np.testing.assert_allclose(got.logprobs, logprobs, rtol=0, atol=TOLERANCE)
        assert got.greedy.tolist() == greedy.tolist()


def test_the_longest_sequence_has_one_token_more_than_the_model_reads(tiny: Any) -> None:
    ids = draw(129, tiny.model.config.vocab_size)
    got = score(tiny.model, [ids])[0]
    np.testing.assert_allclose(got.logprobs, tiny.logprobs(ids)[0], rtol=0, atol=TOLERANCE)


def test_greedy_marks_the_most_likely_tokens(tiny: Any) -> None:
    ids = draw(12, tiny.model.config.vocab_size)
    while len(ids) < 16:
        ids.append(int(tiny.reference.logits(np.array([ids]))[0, -1].argmax()))
    greedy = score(tiny.model, [ids])[0].greedy
    assert greedy[-4:].all()
    assert not greedy.all()


def test_padding_does_not_count_as_length_where_rotary_embedding_depends_on_it() -> None:
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 20, **factors}
    pair = reference_of(build_model("llama", num_hidden_layers=1, rope_parameters=rope))
    model = Model(pair.config, weights_from_params(pair.config, pair.params))
    for length in (19, 24):  # both are padded beyond 20
        ids = draw(length, pair.config.vocab_size)
        expected = np.array(jax.nn.log_softmax(pair.logits(np.array([ids]))[0, :-1]))[np.arange(length - 1), ids[1:]]
        np.testing.assert_allclose(score(model, [ids])[0].logprobs, expected, rtol=0, atol=TOLERANCE)


def test_a_warm_shape_is_not_compiled_again(tiny: Any) -> None:
    vocab = tiny.model.config.vocab_size
    score(tiny.model, [draw(30, vocab), draw(20, vocab)], batch=3)
    with expect_no_compile():
        score(tiny.model, [draw(18, vocab, seed=n) for n in range(4)] + [draw(33, vocab)], batch=3)


def test_the_logits_are_the_only_array_of_their_size() -> None:
    pair = reference_of(build_model("llama", vocab_size=5000))
    weights = weights_from_params(pair.config, pair.params)
    shapes = [jax.ShapeDtypeStruct((2, 33), np.int32), jax.ShapeDtypeStruct((2,), np.int32)]
    compiled = scoring._compiled_scores(frozenset()).lower(pair.config, weights, *shapes).compile()
    logits = 2 * 32 * 5000 * 4
    assert logits <= compiled.memory_analysis().temp_size_in_bytes < 1.5 * logits


@pytest.mark.parametrize(("bucket", "count", "batch"), [(2048, 100, 2), (16, 100, 128), (16, 3, 4), (32768, 9, 1)])
def test_batch_size_keeps_memory_bounded(bucket: int, count: int, batch: int) -> None:
    config = shape_config("llama-2-7b")  # 32 heads, 32000 tokens
    assert scoring._batch_size(config, bucket, count) == batch
    assert batch == 1 or 4 * batch * bucket * max(32000, 32 * bucket) <= 2**30


@pytest.mark.parametrize(
    ("sequences", "options", "message"),
    [
        ([[5, 6], [5]], {}, "sequence 1 has 1 tokens"),
        ([[5] * 130], {}, "sequence 0 has 130 tokens"),
        ([[5, 10_000]], {}, "outside the vocabulary"),
        ([[5, -1]], {}, "outside the vocabulary"),
        ([[5, 6]], {"batch": 0}, "batch must be at least 1"),
        (["some text"], {}, "score takes a list of sequences"),
        ("some text", {}, "score takes a list of sequences"),
        ([[5, 6.5]], {}, "score takes a list of sequences"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    tiny: Any, sequences: list[list[int]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        score(tiny.model, sequences, **options)


def test_nothing_to_score_gives_nothing(tiny: Any) -> None:
    assert score(tiny.model, []) == []


def reference_losses(tiny: Any, ids: list[int], window: int, stride: int) -> list[np.ndarray]:
    """Each window's losses, labels that an earlier window had masked, as in transformers' guide to perplexity."""
    losses, done = [], 0
    for start in range(0, len(ids), stride):
        end = min(start + window, len(ids))
        labels = np.array(ids[start:end])
        labels[: len(labels) - (end - done)] = -100
        if end - start > 1:
            logprobs, _ = tiny.logprobs(ids[start:end])
            losses.append(-logprobs[labels[1:] != -100])
        done = end
        if end == len(ids):
            break
    return losses


@pytest.mark.parametrize(
    ("count", "window", "stride"),
    [(70, 32, None), (65, 32, None), (64, 32, 32), (70, 32, 8), (33, 32, 1), (20, 32, None)],
)
def test_perplexity_is_that_of_transformers(tiny: Any, count: int, window: int, stride: int | None) -> None:
    ids = draw(count, tiny.model.config.vocab_size)
    found = perplexity(tiny.model, ids, window=window, stride=stride, batch=2)
    losses = reference_losses(tiny, ids, window, stride or window)
    everything = np.concatenate(losses)
    assert found.value == pytest.approx(math.exp(everything.mean()), rel=1e-4)
    assert (found.tokens, found.windows, found.window) == (len(everything), len(losses), window)


def test_default_window_and_text(tiny: Any) -> None:
    text = "the quick brown fox jumps over the lazy dog\n" * 4
    found = perplexity(tiny.model, text)
    ids = [1, *tiny.model.tokenizer.encode(text)[1:]]
    losses = np.concatenate(reference_losses(tiny, ids, 128, 128))
    assert found.value == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert (found.window, found.windows, found.tokens) == (128, 2, len(ids) - 2)


def test_error_from_tokens_where_windows_are_few(tiny: Any) -> None:
    ids = draw(100, tiny.model.config.vocab_size)
    found = perplexity(tiny.model, ids, window=32, batch=2)
    losses = np.concatenate(reference_losses(tiny, ids, 32, 32))
    expected = math.exp(losses.mean()) * losses.std(ddof=1) / math.sqrt(len(losses))
    assert found.standard_error == pytest.approx(expected, rel=1e-3)


def test_error_from_windows_where_they_are_many(tiny: Any) -> None:
    ids = draw(8 * scoring.ENOUGH_WINDOWS, tiny.model.config.vocab_size)
    found = perplexity(tiny.model, ids, window=8, batch=2)
    means = np.array([loss.mean() for loss in reference_losses(tiny, ids, 8, 8)])
    expected = math.exp(means.mean()) * means.std(ddof=1) / math.sqrt(len(means))
    assert found.windows == scoring.ENOUGH_WINDOWS
    assert found.standard_error == pytest.approx(expected, rel=1e-3)


def test_a_short_last_window_compiles_nothing_of_its_own(tiny: Any) -> None:
    vocab = tiny.model.config.vocab_size
    perplexity(tiny.model, draw(32 * 5, vocab), window=32, batch=5)  # a batch size that no other test has
    with expect_no_compile():
        perplexity(tiny.model, draw(32 * 3 + 5, vocab), window=32, batch=5)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ([5, 6], {}, "has 2 tokens"),
        ([5] * 50, {"window": 1}, "window must be from 2 to 128"),
        ([5] * 50, {"window": 129}, "window must be from 2 to 128"),
        ([5] * 50, {"window": 8, "stride": 9}, "stride must be from 1"),
        ([5] * 50, {"window": 8, "stride": 0}, "stride must be from 1"),
        ([5] * 50, {"batch": -1}, "batch must be"),
        (["some", "texts"], {}, "that of one text"),
        (None, {}, "that of one text"),
        ("a\udcff", {}, "is not Unicode"),
    ],
)
def test_a_perplexity_that_cannot_be_had_is_refused(
    tiny: Any, text: list[int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        perplexity(tiny.model, text, **options)


def test_text_without_a_tokenizer_is_refused(tiny: Any) -> None:
    model = Model(tiny.model.config, tiny.model.weights)
    with pytest.raises(RequestError, match="without a tokenizer"):
        perplexity(model, "text")
