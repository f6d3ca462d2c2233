"""Encoders, BERT and its kin, dense or factorized, as pure functions: hidden states, their pooling, and the heads.

Positions count real tokens alone, so padding, on whichever side, changes nothing. Padding is seen by nobody; what the rows of
padding hold means nothing, but is finite.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from flashsvd_jax.encoder_config import EncoderConfig
from flashsvd_jax.models.encoder_weights import EncoderLayerWeights, EncoderWeights
from flashsvd_jax.rope import rotary_tables
from flashsvd_jax.rope_config import RopeConfig
from pallas_kernels import (
    ACTIVATIONS,
    PackedProjection,
    Projection,
    Visible,
    add_norm,
    attend,
    attend_padded,
    attend_padded_by,
    feed_forward,
    feed_forward_by,
    layer_kinds,
    layer_norm,
    of_kinds,
    pack,
    project,
    record,
)
from pallas_kernels.registry import Record

POOLINGS = ("mean", "cls")
Tables = tuple[jax.Array, jax.Array]


def hidden_states(
    config: EncoderConfig,
    weights: EncoderWeights,
    tokens: jax.Array,
    attention_mask: jax.Array | None = None,
    token_types: jax.Array | None = None,
) -> jax.Array:
    """What the last layer makes of each token.

    Args:
      config: the model.
      weights: its weights.
      tokens: int32 [batch, tokens].
      attention_mask: [batch, tokens], nonzero where a token is real; padding may lie on either side. Or [batch]: how many
        tokens of each sequence are real, padding being on the right, which more kernels serve.
      token_types: int32 [batch, tokens], for models that have them; zeros if not given.

    Returns:
      [batch, tokens, embed] in the weights' dtype; rows of padding tokens mean nothing.

    Raises:
      ValueError: the sequences are longer than the model knows positions.
    """
    if tokens.shape[1] > config.max_position:
        raise ValueError(f"sequences of {tokens.shape[1]} tokens; the model knows {config.max_position} positions")
    real = real_tokens(tokens, attention_mask)
    # Without the barrier XLA counts anew for every number of an embedding: 0.98 ms where that takes 0.06 (64 x 512 tokens, H200).
    positions = jax.lax.optimization_barrier(jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0))
    with jax.named_scope("embedding"):
        x = _embed(config, weights, tokens, positions, token_types)
    lengths = real.sum(axis=1, dtype=jnp.int32)
    tables: dict[RopeConfig | None, Tables | None] = {
        rope: None if rope is None else rotary_tables(rope, config.head_dim, positions, lengths)
        for rope in set(config.ropes)
    }
    visible = {window: _visible(real, attention_mask, window) for window in set(config.windows)}
    with of_kinds(layer_kinds(weights.layers)):
        for layer, window, rope in zip(weights.layers, config.windows, config.ropes, strict=True):
            x = _layer(config, layer, x, visible[window], tables[rope])
    return x if weights.norm is None else layer_norm(x, weights.norm)


def pass_kernels(config: EncoderConfig, weights: EncoderWeights, batch: int, tokens: int) -> Record:
    """How `hidden_states` would compute its layers here: op -> implementation -> why others refuse; shapes suffice as weights."""
    used: Record = {}
    shapes = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, tokens), (batch,)))
    with record(used):
        jax.eval_shape(partial(hidden_states, config), weights, *shapes)
    return {op: used[op] for op in ("attend_padded", "feed_forward")}


def through_layer(
    config: EncoderConfig,
    layer: EncoderLayerWeights,
    window: int | None,
    rope: RopeConfig | None,
    x: jax.Array,
    product: Callable[..., tuple[jax.Array, ...]] = project,
) -> jax.Array:
    """The residual stream x [batch, tokens, embed] of whole sequences after one layer.

    Args:
      config: the model.
      layer: its weights.
      window: how far the layer's tokens see to either side.
      rope: the layer's rotary embedding.
      x: the residual stream before it, without padding.
      product: in place of `project`, to see what goes into each packed projection; called with those of queries, keys and
        values, of the attention's output, of up (and the gate), and of down, in this order.
    """
    batch, tokens, _ = x.shape
    positions = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (batch, tokens))
    tables = None if rope is None else rotary_tables(rope, config.head_dim, positions, jnp.full(batch, tokens))
    visible = _visible(jnp.ones((batch, tokens), bool), None, window)
    attention, mlp = partial(attend_padded_by, product, attend), partial(feed_forward_by, product)
    return _layer(config, layer, x, visible, tables, attention, product, mlp)


def real_tokens(tokens: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
    """bool [batch, tokens]: a mask as `hidden_states` takes it, all tokens where there is none."""
    if attention_mask is None:
        return jnp.ones(tokens.shape, bool)
    if attention_mask.ndim == 1:
        return jnp.arange(tokens.shape[1], dtype=jnp.int32) < attention_mask[:, None]
    return attention_mask.astype(bool)


def _visible(real: jax.Array, attention_mask: jax.Array | None, window: int | None) -> Visible:
    """What tokens see of each other; ``window`` is how far they see to either side."""
    after = jnp.arange(1, real.shape[1] + 1, dtype=jnp.int32)
    on_the_right = attention_mask is None or attention_mask.ndim == 1
    return Visible(
        ends=jnp.where(real, after, 0).max(axis=1),
        real=None if on_the_right else real,
        causal=False,
        window=None if window is None else window + 1,
    )


def pooled(x: jax.Array, real: jax.Array, pooling: str) -> jax.Array:
    """One vector a sequence from hidden states.

    Args:
      x: [batch, tokens, embed].
      real: bool [batch, tokens].
      pooling: "mean" over the real tokens, or "cls" for the first of them.

    Returns:
      float32 [batch, embed]; zeros for a sequence of padding alone.
    """
    if pooling == "cls":
        chosen = real & (jnp.cumsum(real, axis=1) == 1)
        return jnp.where(chosen[..., None], x.astype(jnp.float32), 0.0).sum(1)
    if pooling != "mean":
        raise ValueError(f"pooling {pooling!r} is not one of {', '.join(POOLINGS)}")
    total = jnp.where(real[..., None], x.astype(jnp.float32), 0.0).sum(1)
    return total / jnp.maximum(real.sum(1, keepdims=True), 1).astype(jnp.float32)


def masked_lm_logits(config: EncoderConfig, weights: EncoderWeights, x: jax.Array) -> jax.Array:
    """Logits of every token over the vocabulary: x [..., embed] -> float32 [..., vocab]."""
    _check_head(config, "masked_lm")
    return _head_logits(config, weights, x)


def classification_logits(config: EncoderConfig, weights: EncoderWeights, x: jax.Array, real: jax.Array) -> jax.Array:
    """Logits of sequences over labels: x [batch, tokens, embed], real [batch, tokens] -> float32 [batch, labels]."""
    _check_head(config, "classification")
    assert config.head is not None
    return _head_logits(config, weights, pooled(x, real, config.head.pooling).astype(x.dtype))


def outputs(
    config: EncoderConfig,
    weights: EncoderWeights,
    tokens: jax.Array,
    attention_mask: jax.Array | None = None,
    token_types: jax.Array | None = None,
) -> jax.Array:
    """What the head gives, or the hidden states where there is none: the first output of transformers' class."""
    x = hidden_states(config, weights, tokens, attention_mask, token_types)
    if config.head is None:
        return x
    if config.head.kind == "masked_lm":
        return masked_lm_logits(config, weights, x)
    return classification_logits(config, weights, x, real_tokens(tokens, attention_mask))


def _check_head(config: EncoderConfig, kind: str) -> None:
    if config.head is None or config.head.kind != kind:
        raise ValueError(f"this encoder has no {kind} head, it has {config.head.kind if config.head else 'none'}")


def _head_logits(config: EncoderConfig, weights: EncoderWeights, x: jax.Array) -> jax.Array:
    head, given = config.head, weights.head
    assert head is not None and given is not None
    with jax.named_scope("head"):
        (x,) = project(x, given.dense)
        x = ACTIVATIONS[head.activation](x)
        if given.norm is not None:
            x = layer_norm(x, given.norm)
        return project(x, _output_layer(weights), dtype=jnp.float32)[0]


def _output_layer(weights: EncoderWeights) -> PackedProjection:
    assert weights.head is not None
    tied = Projection(weight=weights.tokens, bias=weights.head.out_bias)
    return pack([tied]) if weights.head.out is None else weights.head.out


def _embed(
    config: EncoderConfig,
    weights: EncoderWeights,
    tokens: jax.Array,
    positions: jax.Array,
    token_types: jax.Array | None,
) -> jax.Array:
    x = weights.tokens[tokens]
    if weights.positions is not None:
        x = x + weights.positions[positions + config.first_position]
    if weights.types is not None:
        x = x + weights.types[jnp.zeros_like(tokens) if token_types is None else token_types]
    x = layer_norm(x, weights.embed_norm)
    return x if config.embedding_scale == 1 else x * jnp.asarray(config.embedding_scale, x.dtype)


def _layer(
    config: EncoderConfig,
    layer: EncoderLayerWeights,
    x: jax.Array,
    visible: Visible,
    tables: Tables | None,
    attention: Callable[..., jax.Array] = attend_padded,
    product: Callable[..., tuple[jax.Array, ...]] = project,
    mlp: Callable[..., jax.Array] = feed_forward,
) -> jax.Array:
    """One block: norms stand before attention and feed-forward, or behind each of them with its residual."""
    inner = x
    if config.pre_norm and layer.attention_norm is not None:
        inner = layer_norm(x, layer.attention_norm)
    with jax.named_scope("attention"):
        attended = attention(inner, layer.qkv, visible, head_dim=config.head_dim, tables=tables)
        (attended,) = product(attended, layer.o)
    # The norm before the feed-forward part, or the one behind attention.
    norm = layer.mlp_norm if config.pre_norm else layer.attention_norm
    total, inner = add_norm(x, attended, norm, keep_sum=config.pre_norm)
    x = inner if total is None else total
    with jax.named_scope("mlp"):
        if config.pre_norm:
            return mlp(inner, layer.up, layer.down, activation=config.activation, residual=x)
        inner = mlp(inner, layer.up, layer.down, activation=config.activation)
    return add_norm(x, inner, layer.mlp_norm, keep_sum=False)[1]
