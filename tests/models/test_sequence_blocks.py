"""A pass in blocks of sequences gives what one over all gives, in the memory of a block."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_encoders import encoder_reference

from flashsvd_jax.models.encoder import hidden_states
from flashsvd_jax.models.encoder_weights import encoder_weights_from_params
from flashsvd_jax.models.sequence_blocks import block_size, in_blocks


@pytest.mark.parametrize(
    ("batch", "block_tokens", "size"),
    [(64, 8192, 16), (64, None, 64), (7, 2048, 4), (3, 10**6, 3), (5, 100, 1), (1, 1, 1)],
)
def test_blocks_are_even_and_hold_one_sequence_at_least(batch: int, block_tokens: int | None, size: int) -> None:
    assert block_size(batch, 512, block_tokens) == size


@pytest.mark.parametrize("block_tokens", [None, 1, 60, 100])
@pytest.mark.parametrize("mask", ["none", "lengths", "left"])
def test_hidden_states_do_not_depend_on_blocks(block_tokens: int | None, mask: str) -> None:
    pair = encoder_reference("bert", factorized=True)
    weights = jax.device_put(encoder_weights_from_params(pair.config, pair.params))
    rng = np.random.default_rng(0)
    tokens, types = rng.integers(0, 70, (7, 20)), rng.integers(0, 3, (7, 20))
    lengths = np.array([20, 3, 0, 7, 19, 1, 20])
    real = np.arange(20)[::-1] < lengths[:, None]
    given = {"none": None, "lengths": lengths, "left": real}[mask]
    run = partial(hidden_states, pair.config, weights)
    got = jax.jit(partial(in_blocks, run, block_tokens))(tokens, given, types)
    np.testing.assert_allclose(got, run(tokens, given, types), rtol=0, atol=1e-5)


def test_memory_is_that_of_a_block() -> None:
    pair = encoder_reference("bert", factorized=True)
    weights = jax.device_put(encoder_weights_from_params(pair.config, pair.params))
    tokens = jax.ShapeDtypeStruct((64, 32), jnp.int32)

    def temporary(block_tokens: int | None) -> int:
        run = partial(in_blocks, partial(hidden_states, pair.config, weights), block_tokens)
        return jax.jit(run).lower(tokens).compile().memory_analysis().temp_size_in_bytes

    whole, quarter, eighth = map(temporary, (None, 512, 256))
    assert quarter < 0.3 * whole and eighth < 0.6 * quarter
