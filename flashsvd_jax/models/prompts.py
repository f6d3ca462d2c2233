"""Prompts through a decoder, chunk by chunk, and a chunk in runs of layers that a caller may compile and send one by one.

    tokens -> `begin` -> | layers 0 to 7 | layers 8 to 15 | ... | -> x + added, one token -> `decoder.head_logits`

The first chunk of a prompt attends over itself and fills a new cache (`first_chunk`), those behind it go on with the cache
(`next_chunk`). A device begins with a run while the host still prepares the next; and runs alike are compiled once. Behind the last
layer only a prompt's last token is wanted: there the others leave keys and values and go no further.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.kv_cache import KVCache, empty_cache, write
from flashsvd_jax.models.decoder_layers import Tables, heads_of, layers_of, reach_of, rotations_at, through_layers
from flashsvd_jax.models.embedding import embed
from flashsvd_jax.models.weights import DecoderWeights, LayerWeights
from pallas_kernels import DecoderLayer, Visible, attend, layer_kinds, project_heads

LAYERS_OF_A_RUN = 8
"""At most: few enough that sending the first takes little time, enough that the host stays ahead of the device."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerRun:
    """Neighbouring layers of a decoder.

    Attributes:
      weights: of each.
      windows: how far each looks back, None for all the way.
      kinds: how many kinds of layers the whole model has.
      is_last: whether no layer comes behind them.
    """

    weights: tuple[LayerWeights, ...]
    windows: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})
    kinds: int = dataclasses.field(metadata={"static": True})
    is_last: bool = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some tokens of each prompt on their way through the layers.

    Attributes:
      x: the residual stream, [batch, tokens, embed]; behind the last layer [batch, 1, embed], of each prompt's last token in the
        chunk, or of any where it has none there.
      added: what comes to it next, likewise.
      tables: of rotary embeddings.
      start: int32 [] or [batch], the position of the first token.
      lengths: int32 [batch], each prompt's whole length; it may end before the chunk does, or go on behind it.
    """

    x: jax.Array
    added: jax.Array
    tables: Tables
    start: jax.Array
    lengths: jax.Array

    def last_token(self, array: jax.Array) -> jax.Array:
        """Of [batch, tokens, columns] what belongs to prompts' last tokens, [batch, 1, columns]."""
        at = jnp.clip(self.lengths - 1 - self.start, 0, array.shape[1] - 1)
        return jnp.take_along_axis(array, at[:, None, None], axis=1)


def layer_runs(config: ModelConfig, layers: Sequence[LayerWeights]) -> list[LayerRun]:
    """A model's layers in runs of `LAYERS_OF_A_RUN` at most, of one length if they can be."""
    least = math.ceil(len(layers) / LAYERS_OF_A_RUN)
    count = next((n for n in range(least, 2 * least + 1) if len(layers) % n == 0), least)
    ends = [len(layers) * n // count for n in range(count + 1)]
    kinds = layer_kinds(layers)
    return [
        LayerRun(tuple(layers[a:b]), tuple(config.windows[a:b]), kinds, b == len(layers))
        for a, b in itertools.pairwise(ends)
    ]


def begin(
    config: ModelConfig, weights: DecoderWeights, tokens: jax.Array, start: jax.Array, lengths: jax.Array,
    max_tokens: jax.Array | None = None,
) -> Chunk:  # fmt: skip
    """A chunk of tokens int32 [batch, tokens] before the first layer; ``weights`` may come without layers.

    ``max_tokens``, int32 [batch], is what may follow the prompts; nothing if not given.
    """
    first = jnp.broadcast_to(start, tokens.shape[:1])
    positions = first[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    x = embed(config, weights.embedding, weights.positions, tokens, positions)
    reach = None if max_tokens is None else reach_of(lengths, max_tokens)
    return Chunk(x, jnp.zeros_like(x), rotations_at(config, positions, lengths, reach), start, lengths)


def first_chunk(config: ModelConfig, slots: int, run: LayerRun, chunk: Chunk) -> tuple[KVCache, Chunk]:
    """Prompts' first tokens through a run of layers, attending over themselves alone.

    Returns:
      Keys and values of these layers in a new cache of so many slots, and the chunk behind the layers.
    """
    batch, tokens, _ = chunk.x.shape
    cache = empty_cache(config, batch, slots, chunk.x.dtype, len(run.weights))
    layers, ends = layers_of(config, run.weights, run.windows), jnp.minimum(chunk.lengths, tokens)

    def attention(index: int, x: jax.Array) -> jax.Array:
        nonlocal cache
        layer = layers[index]
        q, k, v, keys, values = project_heads(x, *heads_of(config, layer, chunk.tables))
        cache = write(cache, index, keys, values, jnp.zeros((), jnp.int32))
        visible = Visible(ends, window=layer.window, padding="ignored")
        return attend(q, k, v, visible, scale=layer.scale, softcap=layer.softcap)

    chunk = _behind(run, layers, chunk, attention)  # which changes the cache
    return cache, chunk


def next_chunk(config: ModelConfig, run: LayerRun, cache: KVCache, chunk: Chunk) -> tuple[KVCache, Chunk]:
    """Prompts' further tokens through a run of layers; the cache is of these layers, and holds the positions before the chunk."""
    layers = layers_of(config, run.weights, run.windows)

    def attention(index: int, x: jax.Array) -> jax.Array:
        nonlocal cache
        layer = layers[index]
        q, _, _, keys, values = project_heads(x, *heads_of(config, layer, chunk.tables))
        written = write(cache, index, keys, values, chunk.start)
        # Without the barrier XLA's CPU backend fuses the update into the product that reads it too, and copies the cache for that.
        keys, values = lax.optimization_barrier((written.keys[index], written.values[index]))
        cache = written.replace(index, keys, values)
        visible = Visible(chunk.lengths, start=chunk.start, window=layer.window, padding="ignored")
        return attend(q, keys, values, visible, scale=layer.scale, softcap=layer.softcap)

    chunk = _behind(run, layers, chunk, attention)  # which changes the cache
    return cache, chunk


def _behind(
    run: LayerRun, layers: Sequence[DecoderLayer], chunk: Chunk, attention: Callable[[int, jax.Array], jax.Array]
) -> Chunk:
    """The chunk behind a run of layers."""
    kept = chunk.last_token if run.is_last else None
    x, added = through_layers(layers, run.kinds, chunk.x, chunk.added, attention, kept)
    return dataclasses.replace(chunk, x=x, added=added)
