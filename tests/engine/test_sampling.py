"""Sampling on the device against transformers' logits processors, formulas in numpy, and the distributions they stand for."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flashsvd_jax.sampling import SamplingParams
from flashsvd_jax.sampling.counts import TokenCounts
from flashsvd_jax.sampling.device import (
    Sampled,
    SamplingArrays,
    best_token,
    filter_logits,
    sample,
    sampling_arrays,
)
from flashsvd_jax.sampling.params import MAX_LOGPROBS

VOCAB, ROWS, DRAWS = 96, 64, 4096
PROBABILITY_TOLERANCE = 1e-5
# Where a cumulative or relative probability is this near to its limit, rounding decides, in transformers as here.
TIE = 1e-6

filtered = jax.jit(filter_logits)
sampled = jax.jit(sample)
best = jax.jit(best_token)
many = settings(max_examples=10, deadline=None, derandomize=True)  # of ROWS rows each
seeds = st.integers(0, 2**32 - 1)


def options(params: Sequence[SamplingParams], vocab: int = VOCAB) -> SamplingArrays:
    return sampling_arrays(params, (), vocab, [0] * len(params))


def draw(
    logits: np.ndarray, params: Sequence[SamplingParams], prompts: Sequence[Sequence[int]] = (),
    outputs: Sequence[Sequence[int]] = (), step: int | np.ndarray = 0,
) -> Sampled:  # fmt: skip
    """One token a row, in numpy arrays; ``prompts`` and ``outputs`` are the tokens that each row has seen."""
    rows, vocab = logits.shape
    count = lambda ids: np.bincount(np.asarray(ids, int), minlength=vocab)  # noqa: E731
    in_prompt = np.stack([count(ids) > 0 for ids in (prompts or [[]] * rows)])
    in_output = np.stack([count(ids) for ids in (outputs or [[]] * rows)]).astype(np.int32)
    steps = np.broadcast_to(np.int32(step), (rows,))
    arrays = sampled(logits, options(params, vocab), TokenCounts(in_prompt, in_output), steps)  # type: ignore[arg-type]
    return jax.tree.map(np.asarray, arrays)


def processors(p: SamplingParams) -> LogitsProcessorList:
    """The processors that transformers' `generate` makes of these options, in its order."""
    chosen: list[Any] = []
    if p.repetition_penalty != 1.0:
        chosen.append(RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    if p.temperature != 1.0:
        chosen.append(TemperatureLogitsWarper(float(p.temperature)))
    if p.top_k > 0:
        chosen.append(TopKLogitsWarper(p.top_k))
    if p.top_p < 1.0:
        chosen.append(TopPLogitsWarper(p.top_p))
    if p.min_p > 0:
        chosen.append(MinPLogitsWarper(p.min_p))
    return LogitsProcessorList(chosen)


def transformers_logits(logits: np.ndarray, p: SamplingParams, seen: Sequence[int] = ()) -> np.ndarray:
    ids = torch.tensor([list(seen)], dtype=torch.long)
    return processors(p)(ids, torch.tensor(logits)[None].clone())[0].numpy()


def rounding_decides(logits: np.ndarray, p: SamplingParams) -> bool:
    cut = transformers_logits(logits, dataclasses.replace(p, top_p=1.0, min_p=0.0)).astype(np.float64)
    probabilities = np.sort(scipy.special.softmax(cut))[::-1]
    before = np.cumsum(probabilities) - probabilities
    near_top_p = p.top_p < 1 and np.abs(before - p.top_p).min() < TIE
    return near_top_p or (p.min_p > 0 and np.abs(probabilities / probabilities[0] - p.min_p).min() < TIE)


def random_logits(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """From nearly flat to peaked."""
    return (rng.normal(size=shape) * rng.choice([0.3, 1.0, 3.0, 8.0])).astype(np.float32)


def random_filters(rng: np.random.Generator, only: str | None) -> SamplingParams:
    values = {
        "temperature": float(np.exp(rng.uniform(-2, 2))),
        "top_k": int(rng.integers(1, VOCAB + 30)),
        "top_p": float(rng.uniform(0.01, 1)),
        "min_p": float(rng.uniform(0.001, 1)),
    }
    return SamplingParams(
        **{name: values[name] for name in values if name == only or (not only and rng.random() < 0.6)}
    )


@pytest.mark.parametrize("only", ["temperature", "top_k", "top_p", "min_p", None])
@many
@given(seed=seeds)
def test_filters_keep_what_transformers_keeps(only: str | None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, (ROWS, VOCAB))
    params = [random_filters(rng, only) for _ in range(ROWS)]
    ours = np.asarray(filtered(logits, options(params)))
    for row, p in enumerate(params):
        if rounding_decides(logits[row], p):
            continue
        theirs = transformers_logits(logits[row], p)
        assert np.array_equal(np.isfinite(ours[row]), np.isfinite(theirs)), p
        difference = scipy.special.softmax(ours[row]) - scipy.special.softmax(theirs)
        assert np.abs(difference).max() < PROBABILITY_TOLERANCE, p


def test_disabled_options_change_nothing_even_beside_rows_that_use_them() -> None:
    rng = np.random.default_rng(0)
    logits = random_logits(rng, (ROWS, VOCAB))
    logits[1] = rng.normal(size=VOCAB)
    logits[1, 3] = 20.0  # the others together are lost in the rounding of a sum
    users = [SamplingParams(top_k=3), SamplingParams(top_p=0.5), SamplingParams(min_p=0.5)] * ROWS
    for params in ([SamplingParams()] * ROWS, [SamplingParams(), SamplingParams(), *users][:ROWS]):
        got = np.asarray(filtered(logits, options(params)))
        assert np.array_equal(got[:2], logits[:2])
    only_top_k = np.asarray(filtered(logits, options([SamplingParams(top_k=5)] * ROWS)))
    assert (np.isfinite(only_top_k).sum(1) == 5).all()


@many
@given(seed=seeds)
def test_a_row_is_the_same_whatever_stands_beside_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, (ROWS, VOCAB))
    params = [random_request(rng) for _ in range(ROWS)]
    histories = [rng.integers(0, VOCAB, (2, 10)).tolist() for _ in range(ROWS)]
    order = rng.permutation(ROWS)
    order[rng.random(ROWS) < 0.3] = order[0]

    def run(rows: Sequence[int]) -> tuple[np.ndarray, Sampled]:
        chosen = [params[i] for i in rows]
        prompts, outputs = [histories[i][0] for i in rows], [histories[i][1] for i in rows]
        kept = np.asarray(filtered(logits[list(rows)], options(chosen)))
        return kept, draw(logits[list(rows)], chosen, prompts, outputs, step=np.array(rows, np.int32))

    kept, tokens = run(range(ROWS))
    kept_elsewhere, tokens_elsewhere = run(order.tolist())
    assert np.array_equal(kept_elsewhere, kept[order])
    assert np.array_equal(tokens_elsewhere.token, tokens.token[order])
    for place, row in enumerate(order):
        if params[row].logprobs is not None:
            ours = [getattr(tokens_elsewhere, f.name)[place] for f in dataclasses.fields(Sampled)]
            assert all(map(np.array_equal, ours, [getattr(tokens, f.name)[row] for f in dataclasses.fields(Sampled)]))


def random_request(rng: np.random.Generator) -> SamplingParams:
    return dataclasses.replace(
        random_filters(rng, None),
        **({"temperature": 0.0} if rng.random() < 0.3 else {}),
        **({"repetition_penalty": float(rng.uniform(0.5, 2))} if rng.random() < 0.5 else {}),
        **({"presence_penalty": float(rng.uniform(-2, 2))} if rng.random() < 0.5 else {}),
        **({"frequency_penalty": float(rng.uniform(-2, 2))} if rng.random() < 0.5 else {}),
        seed=int(rng.integers(2**63)),
        logprobs=3 if rng.random() < 0.5 else None,
    )


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(top_k=1), 1),
        (SamplingParams(top_p=1e-6), 1),
        (SamplingParams(top_p=1e-300), 1),
        (SamplingParams(top_k=2**31), VOCAB),
        (SamplingParams(min_p=1.0), 1),
        (SamplingParams(top_k=VOCAB), VOCAB),
        (SamplingParams(top_k=10**6), VOCAB),
        (SamplingParams(top_k=-1), VOCAB),
        (SamplingParams(top_k=1, top_p=1e-6, min_p=1.0, temperature=1e-4), 1),
    ],
)
def test_filters_at_their_limits(params: SamplingParams, kept: int) -> None:
    logits = random_logits(np.random.default_rng(1), (ROWS, VOCAB))
    got = np.asarray(filtered(logits, options([params] * ROWS)))
    assert (np.isfinite(got).sum(1) == kept).all()
    assert np.array_equal(got.argmax(1), logits.argmax(1))


def test_a_temperature_near_zero_takes_the_best_token() -> None:
    logits = random_logits(np.random.default_rng(2), (ROWS, VOCAB))
    for seed in range(20):
        got = draw(logits, [SamplingParams(temperature=1e-4, seed=seed)] * ROWS, step=seed)
        assert np.array_equal(got.token, logits.argmax(1))


def test_top_k_keeps_ties_with_the_last_one() -> None:
    logits = np.zeros((ROWS, VOCAB), np.float32)
    logits[:, :2] = 3.0, 2.0
    logits[:, 10:14] = 1.0
    got = np.isfinite(np.asarray(filtered(logits, options([SamplingParams(top_k=4)] * ROWS))))
    assert (np.flatnonzero(got[0]) == [0, 1, 10, 11, 12, 13]).all()
    assert np.array_equal(got[0], np.isfinite(transformers_logits(logits[0], SamplingParams(top_k=4))))


def penalised(logits: np.ndarray, p: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> np.ndarray:
    """Repetition penalty as transformers has it, over prompt and output; then OpenAI's penalties, over the output."""
    only_repetition = SamplingParams(repetition_penalty=p.repetition_penalty)
    logits = transformers_logits(logits, only_repetition, [*prompt, *output]).astype(np.float64)
    counts = np.bincount(np.asarray(output, int), minlength=VOCAB)
    return logits - counts * p.frequency_penalty - (counts > 0) * p.presence_penalty


@many
@given(seed=seeds)
def test_greedy_takes_the_best_token_after_penalties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, (ROWS, VOCAB))
    prompts, outputs = (rng.integers(0, VOCAB, (ROWS, n)).tolist() for n in (20, 60))
    params = [dataclasses.replace(random_request(rng), temperature=0.0) for _ in range(ROWS)]
    got = draw(logits, params, prompts, outputs)
    for row, p in enumerate(params):
        want = penalised(logits[row], p, prompts[row], outputs[row])
        first, second = np.sort(want)[:-3:-1]
        if first - second > TIE * max(1, abs(first)):
            assert got.token[row] == want.argmax(), p


def test_greedy_without_penalties_ignores_what_was_seen_and_every_filter() -> None:
    rng = np.random.default_rng(3)
    logits = random_logits(rng, (ROWS, VOCAB))
    seen = [[int(best)] * 5 for best in logits.argmax(1)]
    params = [SamplingParams(temperature=0.0, top_k=3, top_p=0.1, min_p=0.9, seed=row) for row in range(ROWS)]
    assert np.array_equal(draw(logits, params, seen, seen).token, logits.argmax(1))


@many
@given(seed=seeds)
def test_the_best_token_is_the_first_of_the_largest_logits(seed: int) -> None:
    """Also where equal ones are far from each other, or are NaN: vocabularies of less than a tile to a few."""
    rng = np.random.default_rng(seed)
    for vocab in (1, 100, 8192, 8193, 20_011):
        logits = rng.normal(size=(6, vocab)).astype(np.float32)
        for row, value in zip(logits[1:], (9.0, np.nan, -np.inf, np.inf), strict=False):
            row[rng.integers(0, vocab, 3)] = value
        logits[2, rng.integers(0, vocab)] = np.inf
        logits[5] = -np.inf
        assert np.array_equal(best(logits), logits.argmax(1)), vocab


@pytest.mark.parametrize("by_seed", [True, False], ids=["seeds", "steps"])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=1.7, top_k=12),
        SamplingParams(temperature=0.7, top_p=0.8, repetition_penalty=1.4),
        SamplingParams(
            top_k=30, top_p=0.95, min_p=0.05, repetition_penalty=0.8, presence_penalty=0.9, frequency_penalty=0.4
        ),
    ],
    ids=["plain", "top_k", "top_p", "all"],
)
def test_draws_follow_the_filtered_probabilities(params: SamplingParams, by_seed: bool) -> None:
    """Draws of different seeds, and of one seed's steps, are as good as independent."""
    rng = np.random.default_rng(4)
    logits = (rng.normal(size=VOCAB) * 1.5).astype(np.float32)
    prompt = logits.argsort()[::-3][:8].tolist()
    output = [int(logits.argmax())] * 2 + rng.integers(0, VOCAB, 9).tolist()
    after = penalised(logits, params, prompt, output).astype(np.float32)
    want = scipy.special.softmax(transformers_logits(after, dataclasses.replace(params, repetition_penalty=1.0)))
    got = []
    for first in range(0, DRAWS, ROWS):
        everyone = [dataclasses.replace(params, seed=first + row if by_seed else 11) for row in range(ROWS)]
        step = 5 if by_seed else np.arange(first, first + ROWS, dtype=np.int32)
        got += draw(np.tile(logits, (ROWS, 1)), everyone, [prompt] * ROWS, [output] * ROWS, step).token.tolist()
    counts = np.bincount(got, minlength=VOCAB)
    assert (counts[want == 0] == 0).all()
    common = want * DRAWS >= 5
    observed, expected = ([*x[common], x[~common].sum()] for x in (counts, want * DRAWS))
    keep = np.asarray(expected) > 0
    assert scipy.stats.chisquare(np.asarray(observed)[keep], np.asarray(expected)[keep], sum_check=False).pvalue > 1e-3


def test_the_draw_depends_on_the_whole_seed_and_on_the_step() -> None:
    logits = np.zeros((ROWS, VOCAB), np.float32)
    given = [7, 8, 7 + 2**32, 7 + 2**63, 2**64 - 1, 0, 1, 2**32]
    params = [SamplingParams(seed=given[row % len(given)]) for row in range(ROWS)]
    drawn = np.stack([draw(logits, params, step=step).token for step in range(20)])  # [steps, rows]
    assert len({tuple(column) for column in drawn.T.tolist()}) == len(given)
    assert np.array_equal(drawn[:, : len(given)], drawn[:, -len(given) :])
    assert len(set(drawn[:, 0].tolist())) > 10


def test_seeds_that_were_not_given_come_from_the_caller() -> None:
    params = [SamplingParams(), SamplingParams(seed=5)]
    arrays = sampling_arrays(params, (), VOCAB, [2**40 + 3, 9])
    assert np.asarray(arrays.seed).tolist() == [[2**8, 3], [0, 5]]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    rng = np.random.default_rng(5)
    logits = random_logits(rng, (ROWS, VOCAB))
    params = [dataclasses.replace(random_request(rng), logprobs=5) for _ in range(ROWS)]
    seen = rng.integers(0, VOCAB, (ROWS, 30)).tolist()
    got = draw(logits, params, seen, seen)
    want = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
    np.testing.assert_allclose(got.logprob, want[np.arange(ROWS), got.token], atol=1e-5, rtol=0)
    assert np.array_equal(got.top_ids, (-logits).argsort(axis=1)[:, :MAX_LOGPROBS])
    np.testing.assert_allclose(got.top_logprobs, np.take_along_axis(want, got.top_ids, 1), atol=1e-5, rtol=0)


def test_logprobs_are_zeros_where_nobody_asked() -> None:
    got = draw(random_logits(np.random.default_rng(6), (ROWS, VOCAB)), [SamplingParams(seed=1)] * ROWS)
    assert not got.logprob.any() and not got.top_ids.any() and not got.top_logprobs.any()
