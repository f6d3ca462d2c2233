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
from flashsvd_jax.models import decoder_layers, prompts
from flashsvd_jax.models.prompts import LAYERS_OF_A_RUN, begin, first_chunk, layer_runs, next_chunk
from flashsvd_jax.random_weights import random_weights
from flashsvd_jax.sampling import SamplingParams
from flashsvd_jax.shapes import shape_config
from pallas_kernels import PackedProjection, Projection, adds_as_it_writes, assume_target, pack
from pallas_kernels.target import H200


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
    assert [run.is_last for run in runs] == [False] * (len(runs) - 1) + [True]


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three layers at most, so that a model need not be deep to have several."""
    monkeypatch.setattr(prompts, "LAYERS_OF_A_RUN", 3)


@pytest.mark.parametrize("windows", [(None,), (None, 5)])
@pytest.mark.usefixtures("short_runs")
def test_several_runs_give_what_the_whole_gives(windows: tuple[int | None, ...]) -> None:
    """A prompt, and its continuation, in runs of two layers and of three, against all layers at once without a cache."""
    config = deep(7, *windows)
    weights = random_weights(config, dtype="float32")
    assert [len(run.weights) for run in layer_runs(config, weights.layers)] == [2, 2, 3]
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24)).astype(np.int32)
    want = np.asarray(full(config, weights, tokens))
    lengths = np.array([24, 20], np.int32)
    cache, first = prefill_logits(config, weights, used_cache(config, 2, 32), tokens[:, :16], lengths)
    _, rest = extend_logits(config, weights, cache, tokens[:, 16:], np.int32(16), lengths)
    got = np.concatenate([first, rest], axis=1)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(got[row, :length], want[row, :length], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("short_runs")
def test_runs_alike_are_compiled_once_and_decoding_finds_all_of_the_cache() -> None:
    """Three runs: two alike, and the last, which keeps one token."""
    config = deep(9)
    weights = random_weights(config, dtype="float32")
    engine = Engine(config, weights, max_length=64, decode_chunk=4, prefill_chunk=16)
    prompt, greedy = [1 + n % 50 for n in range(20)], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    found = [token for block in engine.generate([prompt], [greedy]) for token in block.tokens[:, 0].tolist()][:8]
    steps = engine._prompts
    assert [len(of) for of in (steps._first, steps._first_of_last, steps._next, steps._next_of_last)] == [1] * 4
    text = [*prompt]
    for token in found:
        logits = np.asarray(full(config, weights, np.array([text], np.int32)))[0, -1]
        assert logits[token] >= logits.max() - 1e-3
        text.append(token)


@pytest.mark.parametrize("start", [0, 8])
def test_behind_the_last_layer_is_the_last_token_of_each_prompt(start: int) -> None:
    """One that ends in the chunk, one at its end, one that goes on behind it, and one that ended before."""
    config = deep(2)
    weights = random_weights(config, dtype="float32")
    lengths = np.array([3, 8, 11, 1], np.int32) + start
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (4, start + 8)).astype(np.int32)
    (run,) = layer_runs(config, weights.layers)
    found = []
    for is_last in (True, False):
        of = dataclasses.replace(run, is_last=is_last)
        chunk = begin(config, weights, tokens[:, -8:], jnp.int32(start), jnp.asarray(lengths))
        if start:
            before = begin(config, weights, tokens[:, :start], jnp.int32(0), jnp.asarray(lengths))
            cache, _ = first_chunk(config, 16, dataclasses.replace(run, is_last=False), before)
            found.append(next_chunk(config, of, cache, chunk))
        else:
            found.append(first_chunk(config, 16, of, chunk))
    (last_cache, last), (whole_cache, whole) = found
    assert last.x.shape == last.added.shape == (4, 1, config.hidden_size)
    jax.tree.map(np.testing.assert_array_equal, last_cache, whole_cache)
    assert all(np.asarray(a)[:, :, : start + 8].any(axis=(1, 3)).all() for a in jax.tree.leaves(last_cache))
    at = np.clip(lengths - 1 - start, 0, 7)
    for row in range(4):
        want = (whole.x + whole.added)[row, at[row]]
        np.testing.assert_allclose((last.x + last.added)[row, 0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("short_runs")
def test_products_that_add_give_what_norms_that_add_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, what serves products decides which of them adds to the residual stream."""
    config = deep(4)
    weights = random_weights(config, dtype="float32")
    tokens, lengths = np.arange(24, dtype=np.int32)[None], np.array([20], np.int32)

    def logits() -> np.ndarray:
        return np.asarray(prefill_logits(config, weights, used_cache(config, 1, 32), tokens, lengths)[1])

    want, asked = logits(), list[tuple[int, ...]]()

    def adds(x: jax.Array, packed: PackedProjection) -> bool:
        asked.append((*x.shape, packed.first.shape[1]))
        return True

    monkeypatch.setattr(decoder_layers, "adds_as_it_writes", adds)
    jax.clear_caches()  # of what was traced without it, and of what is traced with it
    got = logits()
    jax.clear_caches()
    np.testing.assert_allclose(got[:, :20], want[:, :20], rtol=1e-5, atol=1e-5)
    # Of two runs of two layers: each attention's output, and down of all but the last of a run.
    assert len(asked) == 4 + 2


def test_what_adds_to_the_residual_stream_on_a_gpu() -> None:
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)  # noqa: E731
    low = jax.eval_shape(lambda down, up: pack([Projection(down=down, up=up)]), shape(1024, 4096), shape(4096, 1024))
    dense = jax.eval_shape(lambda weight: pack([Projection(weight=weight)]), shape(4096, 11008))
    for rows, packed, adds in ((8192, low, True), (512, low, False), (512, dense, True), (1, dense, False)):
        with assume_target(H200):
            assert adds_as_it_writes(shape(1, rows, 4096), packed) == adds
        assert not adds_as_it_writes(shape(1, rows, 4096), packed)
