"""Encoders against transformers, every architecture dense and factorized, with every head: padding on either side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_encoders import ARCHITECTURES, EncoderReference, encoder_reference

from flashsvd_jax.models import encoder
from flashsvd_jax.models.encoder import hidden_states, masked_lm_logits, pooled
from flashsvd_jax.models.encoder_weights import EncoderWeights, encoder_weights_from_params
from flashsvd_jax.schema import check_shapes, flatten

TOLERANCE = 1e-4
BATCH, LENGTH = 5, 19


@pytest.fixture(params=["dense", "factorized"])
def factorized(request: pytest.FixtureRequest) -> bool:
    return request.param == "factorized"


outputs = jax.jit(encoder.outputs, static_argnums=0)


def weights_of(pair: EncoderReference) -> EncoderWeights:
    return jax.device_put(encoder_weights_from_params(pair.config, pair.params))


def inputs(pair: EncoderReference, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask: whole, padded on the right, padded on the left, one token alone, and one alone behind padding."""
    rng, pad = np.random.default_rng(seed), pair.model.config.pad_token_id
    tokens = rng.integers(5, pair.config.vocab_size, (BATCH, LENGTH)).astype(np.int32)
    mask = np.ones((BATCH, LENGTH), np.int32)
    mask[1, -4:], mask[2, :7], mask[3, 1:], mask[4, :-1] = 0, 0, 0, 0
    tokens[mask == 0] = pad
    return tokens, mask


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states(architecture: str, factorized: bool) -> None:
    pair = encoder_reference(architecture, factorized=factorized)
    check_shapes(pair.config, {name: a.shape for name, a in flatten(pair.params).items()}, architecture)
    tokens, mask = inputs(pair)
    got, want = np.asarray(outputs(pair.config, weights_of(pair), tokens, mask)), pair.outputs(tokens, mask)
    np.testing.assert_allclose(got[mask == 1], want[mask == 1], rtol=0, atol=TOLERANCE)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForSequenceClassification"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_heads(architecture: str, head: str, factorized: bool) -> None:
    pair = encoder_reference(architecture, head, factorized)
    check_shapes(pair.config, {name: a.shape for name, a in flatten(pair.params).items()}, architecture)
    tokens, mask = inputs(pair)
    if head == "ForSequenceClassification":  # transformers takes the first token, be it padding
        tokens, mask = tokens[[0, 1, 3]], mask[[0, 1, 3]]
    got, want = np.asarray(outputs(pair.config, weights_of(pair), tokens, mask)), pair.outputs(tokens, mask)
    assert got.dtype == np.float32 and got.shape == want.shape
    real = mask == 1 if head == "ForMaskedLM" else slice(None)
    np.testing.assert_allclose(got[real], want[real], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "modernbert"])
def test_padding_on_either_side_changes_nothing(architecture: str, head: str) -> None:
    pair = encoder_reference(architecture, head, factorized=True)
    tokens, length = inputs(pair)[0][:1, :6], 16
    rows, masks = np.zeros((3, length), np.int32), np.zeros((3, length), np.int32)
    for row, start in enumerate((0, 10, 4)):  # behind, before, on both sides
        rows[row, start : start + 6], masks[row, start : start + 6] = tokens, 1
    got = np.asarray(outputs(pair.config, weights_of(pair), rows, masks))
    want = pair.outputs(tokens, np.ones_like(tokens))
    for row in range(3):
        one = got[row] if head != "Model" else got[row, masks[row] == 1]
        np.testing.assert_allclose(one, want[0], rtol=0, atol=TOLERANCE)


def test_token_types() -> None:
    pair = encoder_reference("bert", factorized=True)
    tokens, mask = inputs(pair)
    types = np.random.default_rng(1).integers(0, 3, tokens.shape).astype(np.int32)
    got = np.asarray(outputs(pair.config, weights_of(pair), tokens, mask, types))
    want = pair.outputs(tokens, mask, types)
    np.testing.assert_allclose(got[mask == 1], want[mask == 1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM", "ForSequenceClassification"])
def test_a_sequence_of_padding_alone_is_finite_and_disturbs_no_other(head: str) -> None:
    pair = encoder_reference("bert", head)
    tokens, mask = inputs(pair)
    mask[1:4] = 0
    got = np.asarray(outputs(pair.config, weights_of(pair), tokens, mask))
    assert np.isfinite(got).all()
    want = pair.outputs(tokens[:1], mask[:1])
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=TOLERANCE)


def test_pooling() -> None:
    x = np.random.default_rng(0).standard_normal((BATCH, LENGTH, 7)).astype(np.float32)
    real = np.zeros((BATCH, LENGTH), bool)
    real[0], real[1, :9], real[2, 5:], real[3, 8] = True, True, True, True
    x[~real] = np.nan
    mean, first = (np.asarray(pooled(jnp.asarray(x), jnp.asarray(real), kind)) for kind in ("mean", "cls"))
    for row in range(4):
        np.testing.assert_allclose(mean[row], x[row, real[row]].astype(np.float64).mean(0), rtol=0, atol=1e-6)
        np.testing.assert_array_equal(first[row], x[row, real[row]][0])
    assert (mean[4] == 0).all() and (first[4] == 0).all()
    with pytest.raises(ValueError, match="pooling 'max' is not one of mean, cls"):
        pooled(jnp.asarray(x), jnp.asarray(real), "max")


def test_what_the_model_cannot_do_is_refused() -> None:
    pair = encoder_reference("bert")
    weights, tokens = weights_of(pair), np.zeros((1, 38), np.int32)
    with pytest.raises(ValueError, match="sequences of 38 tokens; the model knows 37 positions"):
        hidden_states(pair.config, weights, tokens)
    with pytest.raises(ValueError, match="this encoder has no masked_lm head, it has none"):
        masked_lm_logits(pair.config, weights, jnp.zeros((1, 40)))


def test_the_first_factor_of_a_fused_projection_is_held_once() -> None:
    pair = encoder_reference("modernbert", factorized=True)
    ranks, weights = pair.config.factorization, weights_of(pair)
    for index, layer in enumerate(weights.layers):
        for packed, site, parts in ((layer.qkv, "self_attn.qkv_proj", 3), (layer.up, "mlp.gate_up_proj", 2)):
            rank = ranks.rank(f"layers_{index}.{site}")
            if rank is not None:
                assert packed.first.shape == (rank, 40)
                assert (packed.starts, packed.widths) == ((0,) * parts, (rank,) * parts)
