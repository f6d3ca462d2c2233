"""What output projections add to the latents of the MLPs behind them: when it is made, and what it is."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cut_models import first_layers

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.models.absorption import weights_for_decoding, with_absorbed
from flashsvd_jax.models.weights import DecoderWeights, build_weights
from flashsvd_jax.random_weights import random_weights
from flashsvd_jax.schema import abstract_params, flatten
from flashsvd_jax.shapes import shape_config
from pallas_kernels import assume_target, hardware_rank, prefer
from pallas_kernels.target import H200

SLOTS = 768


def two_layers(ratio: float, dense: tuple[str, ...] = (), name: str = "llama-2-7b") -> ModelConfig:
    return first_layers(shape_config(name, ratio), 2, dense)


def shapes_of(config: ModelConfig) -> DecoderWeights:
    build = lambda params: build_weights(config, flatten(params).__getitem__, hardware_rank)  # noqa: E731
    return jax.eval_shape(build, abstract_params(config))


def absorbed(weights: DecoderWeights) -> list[Any]:
    return [layer.o_gate_up for layer in weights.layers]


def test_it_is_the_product_of_what_lies_between() -> None:
    weights = random_weights(shape_config("tiny", 0.5), "float32")
    layer = weights.layers[0]
    scaled = dataclasses.replace(layer.mlp_norm, scale=jnp.linspace(0.5, 2, layer.gate_up.first.shape[1]))
    layers = (dataclasses.replace(layer, mlp_norm=scaled), *weights.layers[1:])
    (got, *_) = absorbed(with_absorbed(dataclasses.replace(weights, layers=layers)))
    first, scale, up = (np.asarray(a, np.float64) for a in (layer.gate_up.first, scaled.scale, layer.o.ups[0]))
    np.testing.assert_allclose(got, first * scale @ up, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dense", ["layers_1.self_attn.o_proj", "layers_0.mlp.up_proj"])
def test_layers_with_a_dense_site_there_have_none(dense: str) -> None:
    assert absorbed(with_absorbed(shapes_of(two_layers(0.4, (dense,))))) == [None, None]
    assert None not in absorbed(with_absorbed(shapes_of(two_layers(0.4, ("layers_0.mlp.down_proj",)))))


def test_layers_where_more_lies_between_have_none() -> None:
    weights = shapes_of(two_layers(0.4))
    layer = weights.layers[0]
    bias = jax.ShapeDtypeStruct(layer.o.d_outs, jnp.bfloat16)
    for other in (
        dataclasses.replace(layer, o=dataclasses.replace(layer.o, biases=(bias,))),
        dataclasses.replace(layer, attention_out_norm=layer.mlp_norm),
        dataclasses.replace(layer, mlp_norm=dataclasses.replace(layer.mlp_norm, offset=1.0)),
    ):
        changed = dataclasses.replace(weights, layers=(other, *weights.layers[1:]))
        assert absorbed(with_absorbed(changed)) == [None, None]


def test_decoding_has_it_where_that_was_measured_to_be_faster() -> None:
    def decoded_with(ratio: float, batch: int = 1, kernels: str | None = None, dense: tuple[str, ...] = ()) -> bool:
        config = two_layers(ratio, dense)
        weights = shapes_of(config)
        with assume_target(H200), prefer(kernels):
            found = weights_for_decoding(config, weights, batch, SLOTS)
        made = [array is not None for array in absorbed(found)]
        assert made == [made[0]] * 2 and (made[0] or found is weights)
        return made[0]

    assert decoded_with(0.4) and decoded_with(0.3)
    assert not decoded_with(0.5) and not decoded_with(1.0)  # too large; nothing to absorb
    assert not decoded_with(0.4, batch=2)
    assert not decoded_with(0.4, kernels="products")
    assert not decoded_with(0.4, dense=("layers_0.self_attn.q_proj",))  # layers that differ
    config = two_layers(0.4)
    weights = shapes_of(config)
    assert weights_for_decoding(config, weights, 1, SLOTS) is weights  # a CPU
