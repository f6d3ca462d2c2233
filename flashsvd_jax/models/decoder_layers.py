"""The layers of a decoder as the operations take them, and the way through them that all uses but decoding share."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.models.weights import LayerWeights
from flashsvd_jax.rope import rotary_tables
from pallas_kernels import (
    DecoderLayer,
    LayerNorm,
    Norm,
    add_norm,
    adds_as_it_writes,
    feed_forward,
    normed,
    of_kinds,
    project,
)

Tables = list[tuple[jax.Array, jax.Array]]
"""Cosines and sines of each rotary embedding that occurs, float32 [batch, tokens, columns]."""


def reach_of(lengths: jax.Array, max_tokens: jax.Array) -> jax.Array:
    """Tokens that are in the cache once a request of a prompt of ``lengths`` has got its last token, int32 [batch]."""
    return lengths + jnp.maximum(max_tokens - 1, 0)


def rotations_at(
    config: ModelConfig, positions: jax.Array, lengths: jax.Array, reach: jax.Array | None = None
) -> Tables:
    """Tables of each rotary embedding; of no columns where nothing is rotated.

    Args:
      config: the model.
      positions: int32 [batch, tokens].
      lengths: of the sequences so far, int32 [batch].
      reach: to which they may grow; ``lengths`` if not given. It decides between LongRoPE's two sets of factors: as keys in the
        cache stay as they were rotated, a request has one of them from its first token on.
    """
    if not config.ropes:
        none = jnp.zeros((*positions.shape, 0), jnp.float32)
        return [(none, none)]
    farthest = lengths if reach is None else reach
    return [
        rotary_tables(rope, config.head_dim, positions, farthest if rope.kind == "longrope" else lengths)
        for rope in config.ropes
    ]


def layers_of(
    config: ModelConfig, weights: Sequence[LayerWeights], windows: Sequence[int | None]
) -> list[DecoderLayer]:
    """Layers as `pallas_kernels` takes them, from their weights and sliding windows."""
    return [layer_of(config, *pair) for pair in zip(weights, windows, strict=True)]


def layer_of(config: ModelConfig, weights: LayerWeights, window: int | None) -> DecoderLayer:
    """One of them."""
    return DecoderLayer(
        input_norm=weights.input_norm,
        qkv=weights.qkv,
        q_norm=weights.q_norm,
        k_norm=weights.k_norm,
        o=weights.o,
        mlp_norm=weights.mlp_norm,
        gate_up=weights.gate_up,
        down=weights.down,
        gate=config.activation,
        window=window,
        attention_out_norm=weights.attention_out_norm,
        mlp_out_norm=weights.mlp_out_norm,
        scale=config.attention_scale,
        softcap=config.attention_softcap,
        rotation=config.rotation(window),
        o_gate_up=weights.o_gate_up,
    )


def heads_of(config: ModelConfig, layer: DecoderLayer, tables: Tables) -> tuple[Any, ...]:
    """What `pallas_kernels.project_heads` takes beside its input."""
    return layer.qkv, *tables[layer.rotation], config.head_dim, layer.q_norm, layer.k_norm


def through_layers(
    layers: Sequence[DecoderLayer],
    kinds: int,
    x: jax.Array,
    added: jax.Array | None,
    attention: Callable[[int, jax.Array], jax.Array],
    kept: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The residual stream after some layers, in two parts: what the last one adds to it is not added yet.

    Args:
      layers: one after the other.
      kinds: how many kinds of layers the whole model has, see `pallas_kernels.of_kinds`.
      x: [batch, tokens, embed], the stream before them.
      added: what is to be added to it first, None for nothing.
      attention: called with the place of a layer among these and what is to be projected; gives [batch, tokens, heads * head_dim].
      kept: takes the tokens that are wanted behind the last layer, if not all are, of [batch, tokens, ...]. Others go no further
        than that layer's attention.
    """
    with of_kinds(kinds):
        for index, layer in enumerate(layers):
            with jax.named_scope("qkv"):
                if added is None:
                    inner = normed(x, layer.input_norm)
                else:
                    x, inner = add_norm(x, added, layer.input_norm)
            attended, is_last = attention(index, inner), index == len(layers) - 1
            if kept is not None and is_last:
                x, attended = kept(x), kept(attended)
            with jax.named_scope("attention_out"):
                in_product = layer.attention_out_norm is None and adds_as_it_writes(attended, layer.o)
                (attended,) = project(attended, layer.o, residual=x if in_product else None)
            with jax.named_scope("mlp"):
                if in_product:
                    x, inner = attended, normed(attended, layer.mlp_norm)
                else:
                    x, inner = add_norm(x, _out_norm(attended, layer.attention_out_norm), layer.mlp_norm)
                in_product = not is_last and layer.mlp_out_norm is None and adds_as_it_writes(inner, layer.down)
                given = layer.gate_up, layer.down
                inner = feed_forward(inner, *given, activation=layer.gate, residual=x if in_product else None)
                x, added = (inner, None) if in_product else (x, _out_norm(inner, layer.mlp_out_norm))
    assert added is not None  # there is a layer
    return x, added


def _out_norm(added: jax.Array, norm: Norm | LayerNorm | None) -> jax.Array:
    """What a layer adds to the residual stream, normed where the model does that."""
    return added if norm is None else normed(added, norm)
