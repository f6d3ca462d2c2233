"""The decoder of every base model in `flashsvd_jax.base_models`, dense or factorized, as pure functions.

A step writes the new keys and values into the cache and attends over it; without a cache the same layers give the logits of whole
sequences. Prompts are in `flashsvd_jax.models.prompts`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.kv_cache import KVCache, empty_cache
from flashsvd_jax.models.decoder_layers import heads_of, layer_of, layers_of, rotations_at, through_layers
from flashsvd_jax.models.embedding import embed
from flashsvd_jax.models.weights import DecoderWeights, LayerWeights
from pallas_kernels import (
    Carried,
    PackedProjection,
    Projection,
    Visible,
    after_attention,
    attend,
    begin_decoding,
    decode_layers,
    layer_kinds,
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
    tables = rotations_at(config, positions, lengths)
    layers = layers_of(config, weights.layers, config.windows)
    x = embed(config, weights.embedding, weights.positions, tokens, positions)

    def attention(index: int, x: jax.Array) -> jax.Array:
        layer = layers[index]
        q, k, v, *_ = project_heads(x, *heads_of(config, layer, tables))
        return attend(q, k, v, seen[layer.window], scale=layer.scale, softcap=layer.softcap)

    x, added = through_layers(layers, layer_kinds(weights.layers), x, None, attention)
    return head_logits(config, weights, x + added)


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
    layer = layer_of(config, weights, window)
    of = heads_of(config, layer, rotations_at(config, positions, lengths))
    q, k, v, *_ = project_heads_by(partial(product, norm=layer.input_norm), x, *of)
    attended = attend(q, k, v, Visible(lengths, window=window), scale=layer.scale, softcap=layer.softcap)
    return after_attention(product, x, attended, layer)


def rotations_ahead(config: ModelConfig, positions: jax.Array, steps: int, reach: jax.Array | None = None) -> jax.Array:
    """What `decode` takes as ``rotations`` at ``steps`` positions one after the other, the first int32 [batch]: [steps, ...].

    Of several rotary embeddings the columns stand side by side; without any there are none. ``reach`` is as `rotations_at` has it.
    """
    ahead = (positions + jnp.arange(steps, dtype=jnp.int32)[:, None]).reshape(-1)
    tables = rotations_at(config, ahead[:, None], ahead + 1, None if reach is None else jnp.tile(reach, steps))
    cos, sin = (jnp.concatenate(columns, axis=-1) for columns in zip(*tables, strict=True))
    return jax.lax.complex(cos, sin).reshape(steps, positions.shape[0], 1, -1)


def decode(
    config: ModelConfig, weights: DecoderWeights, cache: KVCache, tokens: jax.Array, positions: jax.Array,
    rotations: jax.Array | None = None, carried: Carried | None = None,
) -> tuple[KVCache, jax.Array, Carried]:  # fmt: skip
    """One more token of each sequence.

    Args:
      config: the model.
      weights: its weights.
      cache: holds the positions before.
      tokens: int32 [batch].
      positions: int32 [batch], of these tokens.
      rotations: of `rotations_ahead`, complex64 [batch, 1, columns]; computed if not given.
      carried: of `begin` or the token before, where several follow each other; of its own if not given.

    Returns:
      The cache, float32 logits [batch, vocab], and what the next token is given as ``carried``.
    """
    done = decode_layers(*_decode_arguments(config, weights, cache, tokens, positions, rotations), carried=carried)
    return KVCache(done.keys, done.values), soft_cap(done.logits, config.logit_softcap), done.carried


def begin(
    config: ModelConfig, weights: DecoderWeights, cache: KVCache, tokens: jax.Array, positions: jax.Array
) -> tuple[KVCache, Carried]:
    """What `decode` is given by who decodes several tokens one after the other in one program: arguments are of the first.

    See `pallas_kernels.begin_decoding`.
    """
    carried, keys, values = begin_decoding(*_decode_arguments(config, weights, cache, tokens, positions))
    return KVCache(keys, values), carried


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
    layers, head = layers_of(config, weights.layers, config.windows), _head(weights)
    return x, layers, weights.norm, head, cache.keys, cache.values, rotations.real, rotations.imag, positions


def head_logits(config: ModelConfig, weights: DecoderWeights, x: jax.Array) -> jax.Array:
    """Final norm and output head: x [..., embed] -> float32 [..., vocab]."""
    with jax.named_scope("head"):
        return soft_cap(project(x, _head(weights), dtype=jnp.float32, norm=weights.norm)[0], config.logit_softcap)


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Minus the log-probability of each token of ``targets`` [...] by logits [..., vocab]: float32 [...]."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    # Not log_softmax: that would be a second array of the logits' size.
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def _head(weights: DecoderWeights) -> PackedProjection:
    return pack([Projection(weight=weights.embedding)]) if weights.head is None else weights.head
