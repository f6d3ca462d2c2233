"""Prompts through runs of layers: how models are cut, and that the cuts change nothing."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_decoder import extend_logits, full, prefill_logits, used_cache

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.engine import Engine
from flashsvd_jax.models.prompts import LAYERS_OF_A_RUN, layer_runs
from flashsvd_jax.random_weights import random_weights
from flashsvd_jax.sampling import SamplingParams
from flashsvd_jax.shapes import shape_config


def deep(layers: int, *windows: int | None) -> ModelConfig:
    """The tiny model with so many layers, whose windows come in turn."""
    config = shape_config("tiny", 1.0)
    turns = windows or (None,)
    return dataclasses.replace(config, num_layers=layers, windows=tuple(turns[n % len(turns)] for n in range(layers)))


@pytest.mark.parametrize(
    ("layers", "lengths"),
    [(1, [1]), (8, [8]), (12, [6, 6]), (22, [7, 7, 8]), (28, [7] * 4), (32, [8] * 4), (36, [6] * 6), (42, [7] * 6)],
)
def test_runs_are_of_one_length_where_they_can_be(layers: int, lengths: list[int]) -> None:
    config = SimpleNamespace(windows=(None,) * layers)
    runs = layer_runs(config, [jax.ShapeDtypeStruct((n,), jnp.float32) for n in range(layers)])  # type: ignore[arg-type]
    assert [len(run.weights) for run in runs] == lengths and max(lengths) <= LAYERS_OF_A_RUN
    assert [leaf.shape[0] for run in runs for leaf in run.weights] == list(range(layers))
    assert {run.kinds for run in runs} == {layers}


@pytest.mark.parametrize("windows", [(None,), (None, 5)])
def test_several_runs_give_what_the_whole_gives(windows: tuple[int | None, ...]) -> None:
    """A prompt, and its continuation, in three runs of two lengths, against all layers at once without a cache."""
    config = deep(22, *windows)
    weights = random_weights(config, dtype="float32")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24)).astype(np.int32)
    want = np.asarray(full(config, weights, tokens))
    lengths = np.array([24, 20], np.int32)
    cache, first = prefill_logits(config, weights, used_cache(config, 2, 32), tokens[:, :16], lengths)
    _, rest = extend_logits(config, weights, cache, tokens[:, 16:], np.int32(16), lengths)
    got = np.concatenate([first, rest], axis=1)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(got[row, :length], want[row, :length], rtol=1e-4, atol=1e-4)


def test_runs_alike_are_compiled_once_and_decoding_finds_all_of_the_cache() -> None:
    config = deep(16)
    weights = random_weights(config, dtype="float32")
    engine = Engine(config, weights, max_length=64, decode_chunk=4, prefill_chunk=16)
    prompt, greedy = [1 + n % 50 for n in range(20)], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    found = [token for block in engine.generate([prompt], [greedy]) for token in block.tokens[:, 0].tolist()][:8]
    assert len(engine._greedy_steps.prompts._first) == len(engine._greedy_steps.prompts._next) == 1
    text = [*prompt]
    for token in found:
        logits = np.asarray(full(config, weights, np.array([text], np.int32)))[0, -1]
        assert logits[token] >= logits.max() - 1e-3
        text.append(token)
