"""The decoder of every base model in `flashsvd_jax.base_models`, dense or factorized, as pure functions.

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
from flashsvd_jax.models.embedding import embed
from flashsvd_jax.models.weights import DecoderWeights, LayerWeights
from flashsvd_jax.rope import rotary_tables
from pallas_kernels import (
    DecoderLayer,
    LayerNorm,
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
    layer_kinds,
    normed,
    of_kinds,
    pack,
    project,
    project_heads,
    project_heads_by,
    soft_cap,
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

    Raises:
      ValueError: the model has a table of positions, and the sequences are longer than it.
    """
    if config.learned_positions and tokens.shape[1] > config.max_position:
        raise ValueError(f"sequences of {tokens.shape[1]} tokens; the model knows {config.max_position} positions")
    real = jnp.ones(tokens.shape, bool) if attention_mask is None else attention_mask.astype(bool)
    positions = jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)
    lengths = real.sum(axis=1, dtype=jnp.int32)
    padded = None if attention_mask is None else real
    seen = {w: Visible(jnp.full_like(lengths, tokens.shape[1]), padded, window=w) for w in set(config.windows)}
    tables = _tables(config, positions, lengths)
    x = embed(config, weights.embedding, weights.positions, tokens, positions)

    def attention(index: int, x: jax.Array) -> jax.Array:
        window = config.windows[index]
        q, k, v, *_ = project_heads(x, *_heads(config, weights.layers[index], window, tables))
        return _attend(config, q, k, v, seen[window])

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
    tables = _tables(config, positions, lengths)
    layer = _layer(config, weights, window)
    of = _heads(config, weights, window, tables)
    q, k, v, *_ = project_heads_by(partial(product, norm=layer.input_norm), x, *of)
    return after_attention(product, x, _attend(config, q, k, v, Visible(lengths, window=window)), layer)


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
    tables, start = _tables(config, positions, lengths), jnp.zeros((), jnp.int32)
    ends = jnp.minimum(lengths, tokens.shape[1])
    x = embed(config, weights.embedding, weights.positions, tokens, positions)

    def attention(index: int, x: jax.Array) -> jax.Array:
        nonlocal cache
        window = config.windows[index]
        q, k, v, keys, values = project_heads(x, *_heads(config, weights.layers[index], window, tables))
        cache = write(cache, index, keys, values, start)
        return _attend(config, q, k, v, Visible(ends, window=window, padding="ignored"))

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
    tables = _tables(config, positions, lengths)
    x = embed(config, weights.embedding, weights.positions, tokens, positions)

    layers = _layers(config, weights)

    def attention(index: int, x: jax.Array) -> jax.Array:
        nonlocal cache
        layer = layers[index]
        projected = project(x, layer.qkv)
        with jax.named_scope("attention"):
            attended, keys, values = attend_cached(
                *projected, cache.keys[index], cache.values[index], *tables[layer.rotation], start, lengths,
                window=layer.window, q_norm=layer.q_norm, k_norm=layer.k_norm, scale=layer.scale, softcap=layer.softcap,
            )  # fmt: skip
        cache = cache.replace(index, keys, values)
        return attended

    x = _through_layers(config, weights, x, attention)
    return cache, x


def rotations_ahead(config: ModelConfig, positions: jax.Array, steps: int) -> jax.Array:
    """What `decode` takes as ``rotations`` at ``steps`` positions one after the other, the first int32 [batch]: [steps, ...].

    Of several rotary embeddings the columns stand side by side; without any there are none.
    """
    ahead = (positions + jnp.arange(steps, dtype=jnp.int32)[:, None]).reshape(-1)
    tables = _tables(config, ahead[:, None], ahead + 1)
    cos, sin = (jnp.concatenate(columns, axis=-1) for columns in zip(*tables, strict=True))
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
      rotations: of `rotations_ahead`, complex64 [batch, 1, columns]; computed if not given.

    Returns:
      The cache, float32 logits [batch, vocab], and what `pallas_kernels.Decoded` calls the stall.
    """
    done = decode_layers(*_decode_arguments(config, weights, cache, tokens, positions, rotations))
    return KVCache(done.keys, done.values), soft_cap(done.logits, config.logit_softcap), done.stall


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
    x = embed(config, weights.embedding, weights.positions, tokens[:, None], positions[:, None])
    layers, head = _layers(config, weights), _head(weights)
    return x, layers, weights.norm, head, cache.keys, cache.values, rotations.real, rotations.imag, positions


def head_logits(config: ModelConfig, weights: DecoderWeights, x: jax.Array) -> jax.Array:
    """Final norm and output head: x [..., embed] -> float32 [..., vocab]."""
    with jax.named_scope("head"):
        return soft_cap(project(x, _head(weights), dtype=jnp.float32, norm=weights.norm)[0], config.logit_softcap)


def _head(weights: DecoderWeights) -> PackedProjection:
    return pack([Projection(weight=weights.embedding)]) if weights.head is None else weights.head


def _tables(config: ModelConfig, positions: jax.Array, lengths: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Cosines and sines of each rotary embedding that occurs; of no columns where nothing is rotated."""
    if not config.ropes:
        none = jnp.zeros((*positions.shape, 0), jnp.float32)
        return [(none, none)]
    return [rotary_tables(rope, config.head_dim, positions, lengths) for rope in config.ropes]


def _through_layers(
    config: ModelConfig, weights: DecoderWeights, x: jax.Array, attention: Callable[..., jax.Array]
) -> jax.Array:
    """The residual stream x [batch, tokens, embed] after all layers.

    ``attention(index, x)`` takes what is to be projected, and gives [batch, tokens, heads * head_dim].
    """
    added = jnp.zeros((), x.dtype)
    with of_kinds(layer_kinds(weights.layers)):
        for index, layer in enumerate(_layers(config, weights)):
            with jax.named_scope("qkv"):
                x, inner = (x, normed(x, layer.input_norm)) if index == 0 else add_norm(x, added, layer.input_norm)
            attended = attention(index, inner)
            with jax.named_scope("attention_out"):
                added = _out_norm(project(attended, layer.o)[0], layer.attention_out_norm)
            with jax.named_scope("mlp"):
                x, inner = add_norm(x, added, layer.mlp_norm)
                added = feed_forward(inner, layer.gate_up, layer.down, activation=layer.gate)
                added = _out_norm(added, layer.mlp_out_norm)
    return x + added


def _out_norm(added: jax.Array, norm: Norm | LayerNorm | None) -> jax.Array:
    """What a layer adds to the residual stream, normed where the model does that."""
    return added if norm is None else normed(added, norm)


def _layers(config: ModelConfig, weights: DecoderWeights) -> list[DecoderLayer]:
    """The layers as `pallas_kernels` takes them."""
    return [_layer(config, *pair) for pair in zip(weights.layers, config.windows, strict=True)]


def _layer(config: ModelConfig, weights: LayerWeights, window: int | None) -> DecoderLayer:
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
    )


def _heads(
    config: ModelConfig, layer: LayerWeights, window: int | None, tables: list[tuple[jax.Array, jax.Array]]
) -> tuple[Any, ...]:
    """What `project_heads` takes beside its input."""
    return layer.qkv, *tables[config.rotation(window)], config.head_dim, layer.q_norm, layer.k_norm


def _attend(config: ModelConfig, q: jax.Array, k: jax.Array, v: jax.Array, visible: Visible) -> jax.Array:
    return attend(q, k, v, visible, scale=config.attention_scale, softcap=config.attention_softcap)
