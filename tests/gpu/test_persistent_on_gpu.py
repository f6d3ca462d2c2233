"""The persistent kernel on a Hopper GPU: the op against float32, repeats bit for bit, a wait in vain, whole models.

A kernel that spins ends by itself after seconds, but run this under `timeout` all the same.
"""

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cut_models import first_layers
from decoder_cases import DecoderCase
from kernel_cases import relative_error
from near_ties import shortfalls
from persistent_faults import forgetting, skip_unless_hopper

from flashsvd_jax import SamplingParams, batch_generate
from flashsvd_jax.errors import KernelError
from flashsvd_jax.model import Model
from flashsvd_jax.random_weights import random_weights
from flashsvd_jax.shapes import shape_config
from pallas_kernels import Decoded, begin_decoding, decode_layers, prefer, stall_reason
from pallas_kernels.persistent import tensor_maps

pytestmark = pytest.mark.gpu

NORM = 0  # number of an operand: the first layer's norm

CASES = {
    "one layer": DecoderCase(1, 512, 1024, 4, 2, (128, 256), (3, 200), slots=256),
    "low rank": DecoderCase(3, 512, 1160, 4, 4, (136, 200), (200,)),
    "7b": DecoderCase(4, 4096, 11008, 32, 32, (1024, 1488), (511,), slots=576, vocab=32000),
    "first token": DecoderCase(2, 512, 1024, 4, 2, (128, 256), (0, 255), qk_norm=True),
    "ranks that differ": DecoderCase(3, 1024, 2048, 8, 2, (256, 400), (63, 64), qk_norm=True, biases=True, varied=True),
    "dense with a window": DecoderCase(2, 1024, 2048, 8, 1, (None, None), (0, 99, 640, 1023), slots=1024, window=100),
    "heads of 64": DecoderCase(2, 896, 2432, 14, 2, (None, 304), (300,), slots=512, biases=True, head_dim=64),
    "heads of 32": DecoderCase(2, 256, 704, 8, 4, (72, 120), (9, 127), slots=128, head_dim=32),
    "some dense": DecoderCase(
        3,
        1024,
        2048,
        8,
        2,
        (256, 400),
        (63, 64),
        slots=128,
        qk_norm=True,
        dense=("0.q", "0.down", "1.k", "1.gate", "1.up", "2.o", "2.up", "2.v"),
    ),
    "a dense layer among low-rank ones": DecoderCase(
        4,
        512,
        1160,
        4,
        4,
        (136, 200),
        (200,),
        varied=True,
        biases=True,
        more_biases=True,
        dense=("1.q", "1.k", "1.v", "1.o", "1.gate", "1.up", "1.down"),
    ),
    "7b, some dense": DecoderCase(
        3,
        4096,
        11008,
        32,
        32,
        (1024, 1488),
        (511,),
        slots=576,
        vocab=32000,
        dense=("0.v", "0.down", "1.q", "1.k", "1.v", "2.o", "2.gate"),
    ),
    "gelu and biases everywhere": DecoderCase(
        2, 512, 1024, 4, 2, (None, None), (5, 100, 255), biases=True, more_biases=True, gate="gelu"
    ),
    "tanh gelu and biases of low rank": DecoderCase(
        3, 512, 1024, 4, 2, (128, 256), (5,), biases=True, more_biases=True, gate="gelu_tanh"
    ),
    "eight sequences": DecoderCase(
        2, 1024, 2048, 8, 2, (256, 400), (0, 1, 63, 64, 100, 255, 3, 127), qk_norm=True, biases=True
    ),
    "five sequences, ranks that differ": DecoderCase(
        3, 1024, 2048, 8, 2, (256, 400), (63, 64, 0, 5, 127), slots=128, varied=True, dense=("0.q", "1.down", "2.v")
    ),
    "7b, eight sequences": DecoderCase(2, 4096, 11008, 32, 32, (1024, 1488), (511,) * 8, slots=576, vocab=32000),
    "absorbed": DecoderCase(3, 512, 1160, 4, 4, (136, 200), (200,), absorbed=True),
    "absorbed, ranks that differ": DecoderCase(
        3, 1032, 2048, 8, 2, (256, 400), (63, 64, 5), qk_norm=True, biases=True, varied=True, absorbed=True, gate="gelu"
    ),
    "absorbed, eight sequences": DecoderCase(
        2, 2048, 2048, 8, 2, (256, 400), (0, 1, 63, 64, 100, 255, 3, 127), absorbed=True
    ),
    "7b, absorbed": DecoderCase(4, 4096, 11008, 32, 32, (832, 1200), (511,), slots=576, vocab=32000, absorbed=True),
    "dense attention": DecoderCase(
        3, 2048, 5632, 16, 8, (None, 800), (4000, 17, 4095), slots=4096, varied=True, biases=True
    ),
}


@pytest.fixture(autouse=True)
def hopper() -> None:
    skip_unless_hopper()


@pytest.mark.parametrize("name", CASES)
def test_layers_against_float32(name: str) -> None:
    arguments = CASES[name].arguments()
    run = jax.jit(lambda *arguments: decode_layers(*arguments, implementation="persistent"))
    wide = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, arguments)
    with jax.default_matmul_precision("highest"):
        want = decode_layers.reference(*wide)
    got = run(*arguments)
    assert not np.asarray(got.carried.stall).any()
    for ours, theirs in zip(results(got), results(want), strict=True):
        assert relative_error(ours, np.asarray(theirs, np.float64)) < 1e-2
    assert all(bool(same(results(got), results(run(*arguments)))) for _ in range(20))


def results(decoded: Decoded) -> list[jax.Array]:
    return [decoded.logits, *decoded.keys, *decoded.values]


@jax.jit
def same(a: Any, b: Any) -> jax.Array:
    return jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda x, y: (x == y).all(), a, b))


@pytest.mark.parametrize("name", ["one layer", "ranks that differ", "absorbed, eight sequences", "dense with a window"])
def test_steps_that_hand_on_their_words_are_as_those_that_do_not(name: str) -> None:
    """To the bit if they begin anew after any even number of steps, each with other tokens at other positions."""
    at_once, often, alone = (stepped(CASES[name].arguments(), steps) for steps in (120, 10, 1))
    assert not any(np.asarray(stalls).any() for *_, stalls in (at_once, often, alone))
    assert bool(same(at_once[:3], often[:3])) and not bool(same(at_once[0][0], at_once[0][1]))
    for ours, theirs in zip(jax.tree.leaves(at_once[:3]), jax.tree.leaves(alone[:3]), strict=True):
        assert relative_error(ours, np.asarray(theirs, np.float64)) < 1e-2


def stepped(arguments: tuple[Any, ...], steps: int) -> tuple[jax.Array, ...]:
    """Logits, keys, values and stalls of 120 steps, so many of which hand on their words."""
    x, keys = arguments[0], arguments[4]
    rng, groups = np.random.default_rng(0), 120 // steps
    xs = rng.standard_normal((120, *x.shape)).astype(x.dtype).reshape(groups, steps, *x.shape)
    starts = rng.integers(0, keys[0].shape[2], (groups, steps, x.shape[0])).astype(np.int32)

    @jax.jit
    def run(arguments: tuple[Any, ...], xs: jax.Array, starts: jax.Array) -> Any:
        _, layers, norm, head, keys, values, *tables, _ = arguments

        def step(carry: Any, given: Any) -> Any:
            (keys, values, carried), (x, start) = carry, given
            done = decode_layers(x, layers, norm, head, keys, values, *tables, start, carried=carried)
            return (done.keys, done.values, done.carried), done.logits

        def group(caches: Any, given: Any) -> Any:
            carried, *caches = begin_decoding(given[0][0], layers, norm, head, *caches, *tables, given[1][0])
            (*caches, carried), logits = jax.lax.scan(step, (*caches, carried), given)
            return tuple(caches), (logits, carried.stall)

        return jax.lax.scan(group, (keys, values), (xs, starts))

    with prefer("persistent"):
        (keys, values), (logits, stalls) = run(arguments, xs, starts)
    return logits.reshape(120, -1), keys, values, stalls


def test_a_wait_in_vain_ends_and_says_so() -> None:
    arguments = CASES["low rank"].arguments()
    with forgetting(3):
        got = jax.jit(lambda *arguments: decode_layers(*arguments, implementation="persistent"))(*arguments)
    # Step 3 is the first product of the output projection, whose words the second misses in every layer.
    assert "gave up waiting for the input of 'o up' in layer 0, block" in str(stall_reason(got.carried.stall.tolist()))
    assert np.isnan(np.asarray(got.logits)).any()


def test_words_of_the_step_before_are_not_taken_for_missing_ones() -> None:
    @jax.jit
    def two_steps(*arguments: Any) -> tuple[jax.Array, Decoded]:
        carried, keys, values = begin_decoding(*arguments)
        first = decode_layers(*arguments[:4], keys, values, *arguments[6:], carried=carried)
        with forgetting(3):
            given = *arguments[:4], first.keys, first.values, *arguments[6:]
            return first.logits, decode_layers(*given, carried=first.carried)

    logits, second = two_steps(*CASES["low rank"].arguments())
    assert not np.isnan(np.asarray(logits)).any()
    assert "the input of 'o up' in layer 0, block" in str(stall_reason(second.carried.stall.tolist()))
    assert np.isnan(np.asarray(second.logits)).any()


def test_an_operand_that_is_elsewhere_is_told() -> None:
    describe = tensor_maps.describe

    def misplaced(*arguments: Any) -> Any:
        maps, addresses = describe(*arguments)
        return maps, addresses.at[NORM, 0].add(256)  # of a vector: nothing is copied from there

    with mock.patch.object(tensor_maps, "describe", misplaced):
        arguments = CASES["low rank"].arguments()
        got = jax.jit(lambda *arguments: decode_layers(*arguments, implementation="persistent"))(*arguments)
    assert f"operand {NORM}" in str(stall_reason(got.carried.stall.tolist()))


def test_a_model_says_the_most_likely_tokens_and_a_stall_is_an_error() -> None:
    config = first_layers(shape_config("llama-2-7b", 0.5), 2, vocab_size=2048)
    weights = random_weights(config)
    params = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
    prompts = [[1, 2, 3], list(range(70))]
    model = Model(config, weights, max_length=192, kernels="persistent")
    texts = [c.token_ids for c in batch_generate(model, prompts, params)]
    assert set(model.engine(2).kernels_used["decode_layers"]) == {"persistent"}
    for prompt, text in zip(prompts, texts, strict=True):
        short, rounding = shortfalls(config, weights, prompt, text)
        assert len(text) == 48 and (short <= rounding).all()
        assert (short == 0).mean() > 0.8
    with forgetting(None), pytest.raises(KernelError, match="gave up waiting"):
        batch_generate(Model(config, weights, max_length=192, kernels="persistent"), prompts, params)
