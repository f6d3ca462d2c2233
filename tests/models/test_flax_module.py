"""The Flax module: the canonical tree is its variables, and Flax's own tools work on it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization, traverse_util
from hf_encoders import encoder_reference
from hf_models import reference

from flashsvd_jax.factorization import Factorization
from flashsvd_jax.models.flax_module import Decoder, Encoder
from flashsvd_jax.schema import abstract_params, schema

TOKENS = np.arange(10, dtype=np.int32).reshape(2, 5)


@pytest.mark.parametrize(("architecture", "factorized"), [("llama_bias", False), ("llama_tied", True), ("qwen3", True)])
def test_init_makes_the_tree_that_the_schema_describes(architecture: str, factorized: bool) -> None:
    config = reference(architecture, factorized).config
    made = jax.eval_shape(Decoder(config, dtype=jnp.bfloat16).init, jax.random.key(0), TOKENS)
    assert jax.tree.structure(made) == jax.tree.structure(abstract_params(config))
    assert jax.tree.leaves(made) == jax.tree.leaves(abstract_params(config))
    names = {".".join(path[1:]) for path in traverse_util.flatten_dict(made)}
    assert names == schema(config).keys()


def test_init_draws_as_transformers_does_and_apply_takes_what_it_draws() -> None:
    pair = reference("llama_bias", factorized=True)
    low_rank_head = Factorization.of({"lm_head": 9})
    config = dataclasses.replace(pair.config, num_layers=1, windows=(None,), factorization=low_rank_head)
    variables = jax.jit(Decoder(config).init)(jax.random.key(0), TOKENS)
    drawn = []
    for name, value in traverse_util.flatten_dict(variables, sep=".").items():
        if name.endswith(".scale"):
            assert (np.asarray(value) == 1).all(), name
        elif name.endswith(".bias"):
            assert not np.asarray(value).any(), name
        else:
            drawn.append(np.ravel(value))
    together = np.concatenate(drawn)
    assert abs(together.std() - pair.model.config.initializer_range) < 0.001
    assert abs(together.mean()) < 0.001
    assert len(np.unique(together)) > 0.9 * together.size  # no two arrays were drawn alike
    logits = np.asarray(jax.jit(Decoder(config).apply)(variables, TOKENS))
    assert logits.shape == (*TOKENS.shape, config.vocab_size)
    assert np.isfinite(logits).all() and logits.std() > 0


@pytest.mark.parametrize("factorized", [False, True])
def test_apply_under_jit_gives_the_logits_of_transformers(factorized: bool) -> None:
    pair = reference("llama_bias", factorized)
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    module = Decoder(pair.config)
    got = np.asarray(jax.jit(module.apply)(jax.device_put(pair.params), TOKENS, mask))
    np.testing.assert_allclose(got[mask == 1], pair.logits(TOKENS, mask)[mask == 1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "llama_tied"])
def test_computes_in_the_dtype_of_its_parameters(architecture: str) -> None:
    pair = reference(architecture, factorized=True)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), pair.params)
    got = np.asarray(jax.jit(Decoder(pair.config).apply)(half, TOKENS))
    want = pair.logits(TOKENS)
    assert got.dtype == np.float32
    # Eight bits of mantissa, through two layers: near, yet not the float32 result. The logits themselves keep all their bits.
    assert 1e-4 < np.abs(got - want).max() < 0.1 * np.abs(want).max()
    assert (got != got.astype(jnp.bfloat16)).mean() > 0.9


def test_flax_flattens_and_serializes_the_tree() -> None:
    params = reference("qwen2", factorized=True).params
    flat = traverse_util.flatten_dict(params, sep="/")
    assert "params/layers_0/self_attn/q_proj/down" in flat
    again = traverse_util.unflatten_dict(flat, sep="/")
    restored = serialization.from_bytes(jax.tree.map(np.zeros_like, params), serialization.to_bytes(params))
    for tree in (again, restored):
        assert jax.tree.structure(tree) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, tree, params)


def test_an_encoder_is_drawn_and_applied() -> None:
    pair = encoder_reference("xlm_roberta", "ForMaskedLM", factorized=True)
    module, tokens = Encoder(pair.config), 5 + TOKENS
    made = jax.eval_shape(module.init, jax.random.key(0), tokens)
    assert made == abstract_params(pair.config, jnp.float32)
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    got = np.asarray(jax.jit(module.apply)(jax.device_put(pair.params), tokens, mask))
    np.testing.assert_allclose(got[mask == 1], pair.outputs(tokens, mask)[mask == 1], rtol=0, atol=1e-4)


def test_gradients_reach_every_parameter_of_an_encoder() -> None:
    pair = encoder_reference("xlm_roberta", "ForMaskedLM", factorized=True)
    module, tokens = Encoder(pair.config), 5 + TOKENS
    slopes = jax.jit(jax.grad(lambda params: (module.apply(params, tokens) ** 2).sum()))(jax.device_put(pair.params))
    # The bias of keys shifts all scores of a query alike: with k apart its slope is zero, save for rounding.
    flat = traverse_util.flatten_dict(slopes, sep=".")
    assert all(np.isfinite(slope).all() for slope in flat.values())
    assert all(np.any(slope) for name, slope in flat.items() if not name.endswith("k_proj.bias"))
