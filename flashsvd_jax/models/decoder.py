"""The decoder of Llama 1-3, Mistral, Qwen2/2.5 and Qwen3, dense or factorized, as pure functions.

A step writes the new keys and values into the cache and attends over it; prompt processing from an empty cache attends over the
prompt alone; without a cache the same layers give the logits of whole sequences.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.kv_cache import KVCache, empty_cache, write
from flashsvd_jax.models.weights import DecoderWeights, LayerWeights
from flashsvd_jax.rope import rotary_tables
from pallas_kernels import (
    DecoderLayer,
    Norm,
    PackedProjection,
    Projection,
    Visible,
    add_norm,
    after_attention,
    attend,
    attend_cached,
    decode_layers,
    feed_forward,
    pack,
    project,
    rms_norm,
    rotated_heads,
    split_heads,
)


def full_logits(
    config: ModelConfig, weights: DecoderWeights, tokens: jax.Array, attention_mask: jax.Array | None = None
) -> jax.Array:
    """Logits of whole sequences, no cache.

    Args:
      config: the model.
      weights: its weights.
      tokens: int32 [batch, tokens].
      attention_mask: [batch, tokens], nonzero where a token is real; padding may lie on either side.

    Returns:
      float32 [batch, tokens, vocab]; rows of padding tokens mean nothing.
    """
    real = jnp.ones(tokens.shape, bool) if attention_mask is None else attention_mask.astype(bool)
    positions = jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)
    lengths = real.sum(axis=1, dtype=jnp.int32)
    seen = {w: Visible(jnp.full_like(lengths, tokens.shape[1]), real, window=w) for w in set(config.windows)}
    tables = rotary_tables(config.rope, config.head_dim, positions, lengths)
    x = weights.embedding[tokens]

    def attention(index: int, *projected: jax.Array) -> jax.Array:
        return attend(*_heads(config, weights.layers[index], tables, *projected), seen[config.windows[index]])

    return head_logits(config, weights, _through_layers(config, weights, x, attention))


def through_layer(
    config: ModelConfig,
    weights: LayerWeights,
    window: int | None,
    x: jax.Array,
    product: Callable[..., tuple[jax.Array, ...]] = project,
) -> jax.Array:
    """The residual stream x [batch, tokens, embed] of whole sequences, from position 0 on, after one layer.

    Args:
      config: the model.
      weights: of the layer.
      window: the layer's sliding window.
      x: the residual stream before it, without padding.
      product: in place of `project`, to see what goes into each packed projection; called with those of queries, keys and
        values, of the attention's output, of gate and up, and of down, in this order.
    """
    batch, tokens, _ = x.shape
    positions = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (batch, tokens))
    lengths = jnp.full(batch, tokens, jnp.int32)
    tables = rotary_tables(config.rope, config.head_dim, positions, lengths)
    layer = _layer(config, weights, window)
    heads = _heads(config, weights, tables, *product(x, layer.qkv, norm=layer.input_norm))
    return after_attention(product, x, attend(*heads, Visible(lengths, window=window)), layer)


def prefill(
    config: ModelConfig, weights: DecoderWeights, cache: KVCache, tokens: jax.Array, lengths: jax.Array
) -> tuple[KVCache, jax.Array]:
    """Processes prompts from position 0 into an empty cache, attending over the prompts alone.

    Args:
      config: the model.
      weights: its weights.
      cache: written from slot 0 on; what it holds is ignored.
      tokens: int32 [batch, tokens], padded on the right.
      lengths: int32 [batch], each prompt's whole length; it may go on beyond these tokens.

    Returns:
      The cache and the hidden states [batch, tokens, embed] before the final norm.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    tables = rotary_tables(config.rope, config.head_dim, positions, lengths)
    x, start = weights.embedding[tokens], jnp.zeros((), jnp.int32)

    def attention(index: int, *projected: jax.Array) -> jax.Array:
        nonlocal cache
        q, k, v = _heads(config, weights.layers[index], tables, *projected)
        cache = write(cache, index, k, v, start)
        ends = jnp.minimum(lengths, tokens.shape[1])
        return attend(q, k, v, Visible(ends, window=config.windows[index], padding="ignored"))

    x = _through_layers(config, weights, x, attention)
    return cache, x


def extend(
    config: ModelConfig,
    weights: DecoderWeights,
    cache: KVCache,
    tokens: jax.Array,
    start: jax.Array,
    lengths: jax.Array,
) -> tuple[KVCache, jax.Array]:
    """Appends tokens to sequences already in the cache, to go on with a long prompt.

    Args:
      config: the model.
      weights: its weights.
      cache: holds positions below ``start``.
      tokens: int32 [batch, tokens].
      start: int32 [] or [batch], the position of the first token.
      lengths: int32 [batch], each prompt's whole length.

    Returns:
      The cache and the hidden states [batch, tokens, embed] before the final norm.
    """
    first = jnp.broadcast_to(start, tokens.shape[:1])
    positions = first[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    tables = rotary_tables(config.rope, config.head_dim, positions, lengths)
    x = weights.embedding[tokens]

    layers = _layers(config, weights)

    def attention(index: int, *projected: jax.Array) -> jax.Array:
        nonlocal cache
        layer = layers[index]
        with jax.named_scope("attention"):
            attended, keys, values = attend_cached(
                *projected, cache.keys[index], cache.values[index], *tables, start, lengths, window=layer.window,
                q_norm=layer.q_norm, k_norm=layer.k_norm,
            )  # fmt: skip
        cache = cache.replace(index, keys, values)
        return attended

    x = _through_layers(config, weights, x, attention)
    return cache, x


def rotations_ahead(config: ModelConfig, positions: jax.Array, steps: int) -> jax.Array:
    """What `decode` takes as ``rotations`` at ``steps`` positions one after the other, the first int32 [batch]: [steps, ...]."""
    ahead = (positions + jnp.arange(steps, dtype=jnp.int32)[:, None]).reshape(-1)
    cos, sin = rotary_tables(config.rope, config.head_dim, ahead[:, None], ahead + 1)
    return jax.lax.complex(cos, sin).reshape(steps, positions.shape[0], 1, -1)


def decode(
    config: ModelConfig, weights: DecoderWeights, cache: KVCache, tokens: jax.Array, positions: jax.Array,
    rotations: jax.Array | None = None,
) -> tuple[KVCache, jax.Array, jax.Array]:  # fmt: skip
    """One more token of each sequence.

    Args:
      config: the model.
      weights: its weights.
      cache: holds the positions before.
      tokens: int32 [batch].
      positions: int32 [batch], of these tokens.
      rotations: of `rotations_ahead`, complex64 [batch, 1, head_dim // 2]; computed if not given.

    Returns:
      The cache, float32 logits [batch, vocab], and what `pallas_kernels.Decoded` calls the stall.
    """
    done = decode_layers(*_decode_arguments(config, weights, cache, tokens, positions, rotations))
    return KVCache(done.keys, done.values), done.logits, done.stall


def decode_kernel(
    config: ModelConfig, weights: DecoderWeights, batch: int, slots: int
) -> tuple[str, dict[str, str], int | None]:
    """What `decode` would use here.

    Args:
      config: the model.
      weights: its weights; shapes suffice.
      batch: sequences.
      slots: of the cache.

    Returns:
      The name of the implementation of the op `decode_layers`, the reasons for which others refuse, and the bytes of GPU memory
      that it takes for itself, None if nobody has counted them.
    """
    cache = jax.eval_shape(lambda: empty_cache(config, batch, slots, weights.embedding.dtype))
    numbers = jax.ShapeDtypeStruct((batch,), jnp.int32)
    arguments = jax.eval_shape(partial(_decode_arguments, config), weights, cache, numbers, numbers)
    chosen, refusals = decode_layers.choose(*arguments)
    return chosen.name, refusals, chosen.workspace and chosen.workspace(*arguments)


def _decode_arguments(
    config: ModelConfig, weights: DecoderWeights, cache: KVCache, tokens: jax.Array, positions: jax.Array,
    rotations: jax.Array | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """Of the op `decode_layers`; see `decode`."""
    if rotations is None:
        rotations = rotations_ahead(config, positions, 1)[0]
    x, norm = weights.embedding[tokens[:, None]], Norm(weights.norm, config.rms_norm_eps)
    layers, head = _layers(config, weights), _head(weights)
    return x, layers, norm, head, cache.keys, cache.values, rotations.real, rotations.imag, positions


def head_logits(config: ModelConfig, weights: DecoderWeights, x: jax.Array) -> jax.Array:
    """Final norm and output head: x [..., embed] -> float32 [..., vocab]."""
    with jax.named_scope("head"):
        return project(x, _head(weights), dtype=jnp.float32, norm=Norm(weights.norm, config.rms_norm_eps))[0]


def _head(weights: DecoderWeights) -> PackedProjection:
    return pack([Projection(weight=weights.embedding)]) if weights.head is None else weights.head


def _norm(config: ModelConfig, scale: jax.Array | None) -> Norm | None:
    return None if scale is None else Norm(scale, config.rms_norm_eps)


def _through_layers(
    config: ModelConfig, weights: DecoderWeights, x: jax.Array, attention: Callable[..., jax.Array]
) -> jax.Array:
    """The residual stream x [batch, tokens, embed] after all layers.

    ``attention(index, q, k, v)`` takes what is projected, each [batch, tokens, heads * head_dim], and gives q's shape.
    """
    added = jnp.zeros((), x.dtype)
    for index, layer in enumerate(_layers(config, weights)):
        with jax.named_scope("qkv"):
            x, normed = (x, rms_norm(x, layer.input_norm)) if index == 0 else add_norm(x, added, layer.input_norm)
            projected = project(normed, layer.qkv)
        attended = attention(index, *projected)
        with jax.named_scope("attention_out"):
            (added,) = project(attended, layer.o)
        with jax.named_scope("mlp"):
            x, normed = add_norm(x, added, layer.mlp_norm)
            added = feed_forward(normed, layer.gate_up, layer.down, activation=layer.gate)
    return x + added


def _layers(config: ModelConfig, weights: DecoderWeights) -> list[DecoderLayer]:
    """The layers as `pallas_kernels` takes them."""
    return [_layer(config, *pair) for pair in zip(weights.layers, config.windows, strict=True)]


def _layer(config: ModelConfig, weights: LayerWeights, window: int | None) -> DecoderLayer:
    return DecoderLayer(
        input_norm=Norm(weights.input_norm, config.rms_norm_eps),
        qkv=weights.qkv,
        q_norm=_norm(config, weights.q_norm),
        k_norm=_norm(config, weights.k_norm),
        o=weights.o,
        mlp_norm=Norm(weights.post_attention_norm, config.rms_norm_eps),
        gate_up=weights.gate_up,
        down=weights.down,
        gate="silu",
        window=window,
    )


def _heads(
    config: ModelConfig,
    layer: LayerWeights,
    tables: tuple[jax.Array, jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What is projected as heads [batch, heads, tokens, head_dim], q and k normed if the model does that, and rotated."""
    norms = _norm(config, layer.q_norm), _norm(config, layer.k_norm)
    return *rotated_heads(q, k, *tables, config.head_dim, *norms), split_heads(v, config.head_dim)
