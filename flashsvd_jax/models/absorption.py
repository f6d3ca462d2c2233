"""What a decoder's output projections add to the latents of the MLPs behind them, as one matrix a layer, made of its weights.

A kernel that runs whole layers then has gate and up's first factors, of the stream before attention, to multiply while it waits for
attention, and waits for one input less a layer. See `pallas_kernels.DecoderLayer.o_gate_up`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.models.decoder import decode_kernel
from flashsvd_jax.models.decoder_layers import layers_of
from flashsvd_jax.models.weights import DecoderWeights, LayerWeights
from pallas_kernels import Norm, gains_by_absorbing


def weights_for_decoding(config: ModelConfig, weights: DecoderWeights, batch: int, slots: int) -> DecoderWeights:
    """The weights as `decode` is fastest with them: with ``o_gate_up`` in every layer where that is faster here, else as they are.

    Args:
      config: the model.
      weights: its weights, or shapes, which give shapes.
      batch: sequences.
      slots: of the cache.
    """
    shapes = jax.eval_shape(with_absorbed, weights)
    if not gains_by_absorbing(layers_of(config, shapes.layers, config.windows), batch):
        return weights
    if decode_kernel(config, shapes, batch, slots)[0] != "persistent":
        return weights
    return with_absorbed(weights)


def with_absorbed(weights: DecoderWeights) -> DecoderWeights:
    """The weights with ``o_gate_up`` in every layer; as they are where a layer has none: its output projection, gate or up is
    dense, or more lies between them than a norm."""
    if not all(map(_can_absorb, weights.layers)):
        return weights
    return dataclasses.replace(weights, layers=tuple(map(_layer_with_absorbed, weights.layers)))


def _can_absorb(layer: LayerWeights) -> bool:
    """Whether nothing but a product and a norm's scale lies between the latents of o and those of gate and up."""
    factors = [up for packed in (layer.o, layer.gate_up) for up in packed.ups]
    plain = isinstance(layer.mlp_norm, Norm) and not layer.mlp_norm.offset and layer.attention_out_norm is None
    return plain and layer.o.biases == (None,) and all(up is not None and up.ndim == 2 for up in factors)


def _layer_with_absorbed(layer: LayerWeights) -> LayerWeights:
    first, scale, up = layer.gate_up.first, layer.mlp_norm.scale, layer.o.ups[0]
    assert up is not None
    if isinstance(first, jax.ShapeDtypeStruct):
        shape = (first.shape[0], up.shape[1])
        found = jax.ShapeDtypeStruct(shape, first.dtype, sharding=first.sharding)
    else:
        found = _product(first, scale, up)
    return dataclasses.replace(layer, o_gate_up=found)


@jax.jit
def _product(first: jax.Array, scale: jax.Array, up: jax.Array) -> jax.Array:
    """In float32, rounded once."""
    wide = [array.astype(jnp.float32) for array in (first, scale, up)]
    return jnp.dot(wide[0] * wide[1], wide[2], precision="highest").astype(first.dtype)
