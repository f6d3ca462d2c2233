"""The decoder against transformers, for every architecture dense and factorized: whole sequences, and step by step."""

import numpy as np
import pytest
import torch
from compiled_decoder import decode_logits, device_weights, extend_logits, full, prefill_logits, used_cache
from hf_models import ARCHITECTURES, Reference, reference

TOLERANCE = 1e-4
BATCH, LENGTH, SLOTS = 3, 17, 40
PROMPTS = np.array([5, 2, 4], np.int32)  # shorter than every sliding window; the sequences outgrow all of them
NEW_TOKENS = 32


@pytest.fixture(params=["dense", "factorized"])
def factorized(request: pytest.FixtureRequest) -> bool:
    return request.param == "factorized"


@pytest.fixture(params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest, factorized: bool) -> Reference:
    return reference(request.param, factorized)


def draw_tokens(pair: Reference, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(0).integers(0, pair.config.vocab_size, (BATCH, length)).astype(np.int32)


def test_full_logits_of_unpadded_left_padded_and_right_padded_sequences(pair: Reference) -> None:
    tokens = draw_tokens(pair)
    mask = np.ones_like(tokens)
    mask[1, :4] = 0
    mask[2, -3:] = 0
    got = np.asarray(full(pair.config, device_weights(pair), tokens, mask))
    want = pair.logits(tokens, mask)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[mask == 1], want[mask == 1], rtol=0, atol=TOLERANCE)


def test_prompts_of_different_lengths_decode_greedily_as_transformers_generates(
    pair: Reference, factorized: bool
) -> None:
    """Dense models by the step that generation takes, factorized ones by appending one token."""
    tokens = draw_tokens(pair, int(PROMPTS.max()))
    generated = _generate(pair, [row[:prompt] for row, prompt in zip(tokens, PROMPTS, strict=True)])
    whole = np.zeros((BATCH, PROMPTS.max() + NEW_TOKENS), np.int32)
    for row, prompt in enumerate(PROMPTS):
        whole[row, : prompt + NEW_TOKENS] = [*tokens[row, :prompt], *generated[row]]
    want = pair.logits(whole, np.arange(whole.shape[1]) < PROMPTS[:, None] + NEW_TOKENS)

    weights, cache, rows = device_weights(pair), used_cache(pair.config, BATCH, SLOTS), np.arange(BATCH)
    cache, logits = prefill_logits(pair.config, weights, cache, tokens, PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_allclose(np.asarray(logits)[row, :prompt], want[row, :prompt], rtol=0, atol=TOLERANCE)
    token = np.asarray(logits)[rows, PROMPTS - 1].argmax(-1).astype(np.int32)
    for step in range(NEW_TOKENS - 1):
        assert np.array_equal(token, generated[:, step]), step
        start = PROMPTS + np.int32(step)
        if factorized:
            cache, logits = extend_logits(pair.config, weights, cache, token[:, None], start, start + 1)
            logits = logits[:, 0]
        else:
            cache, logits = decode_logits(pair.config, weights, cache, token, start)
        np.testing.assert_allclose(np.asarray(logits), want[rows, start], rtol=0, atol=TOLERANCE)
        token = np.asarray(logits).argmax(-1).astype(np.int32)
    assert np.array_equal(token, generated[:, -1])


@pytest.mark.parametrize(
    ("architecture", "factorized", "chunks", "per_sequence_start"),
    [
        ("llama", True, (1,) * 12, False),
        ("llama_tied", False, (7, 5), False),
        ("mistral", True, (3, 3, 3, 3), False),
        ("mistral", True, (3, 3, 3, 3), True),
        ("qwen2", True, (1, 1, 7, 3), True),
        ("gemma3", True, (5, 5), True),
        ("opt", True, (4, 4), True),
    ],
)
def test_long_prompt_in_chunks(
    architecture: str, factorized: bool, chunks: tuple[int, ...], per_sequence_start: bool
) -> None:
    pair = reference(architecture, factorized)
    tokens, weights, lengths = draw_tokens(pair), device_weights(pair), np.full(BATCH, LENGTH, np.int32)
    want, first = pair.logits(tokens), LENGTH - sum(chunks)
    cache = used_cache(pair.config, BATCH, SLOTS)
    cache, got = prefill_logits(pair.config, weights, cache, tokens[:, :first], lengths)
    np.testing.assert_allclose(got, want[:, :first], rtol=0, atol=TOLERANCE)
    start = first
    for chunk in chunks:
        at = np.full(BATCH if per_sequence_start else (), start, np.int32)
        part = tokens[:, start : start + chunk]
        cache, got = extend_logits(pair.config, weights, cache, part, at, lengths)
        np.testing.assert_allclose(got, want[:, start : start + chunk], rtol=0, atol=TOLERANCE)
        start += chunk


def _generate(pair: Reference, prompts: list[np.ndarray]) -> np.ndarray:
    """What transformers goes on with after each prompt, padded on the left as it wants them: [batch, NEW_TOKENS]."""
    longest = max(map(len, prompts))
    tokens = torch.tensor(np.stack([np.pad(p, (longest - len(p), 0)) for p in prompts])).long()
    mask = torch.tensor(np.stack([np.arange(longest) >= longest - len(p) for p in prompts])).long()
    whole = pair.model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS)
    return whole[:, longest:].numpy()
