"""The op `attend_padded`: attention of padded sequences over themselves, from what their queries, keys and values are made of.

It takes the input and the packed projections, not their products, so that an implementation may rebuild queries, keys and values
tile by tile from rank space and never hold them whole.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import attend, attend_reference, rotated_heads, split_heads
from pallas_kernels.products import project, project_reference
from pallas_kernels.projection import PackedProjection
from pallas_kernels.registry import Implementation, Op


def attend_padded_reference(
    x: jax.Array,
    qkv: PackedProjection,
    real: jax.Array,
    *,
    head_dim: int,
    tables: tuple[jax.Array, jax.Array] | None = None,
    window: int | None = None,
) -> jax.Array:
    """Bidirectional attention of each sequence over its own tokens.

    Args:
      x: [batch, tokens, width].
      qkv: three members; keys and values may have fewer heads than queries, see `attend`.
      real: bool [batch, tokens], False where a token is padding; on either side, or all of a sequence. Padding is seen by
        nobody, and its own rows are zeros.
      head_dim: columns of a head.
      tables: cosines and sines, float32 [batch, tokens, head_dim // 2], to rotate queries and keys by; None leaves them.
      window: a token sees so many to either side; all if None.

    Returns:
      [batch, tokens, heads * head_dim] in x's dtype.
    """
    return _attend(project_reference, attend_reference, x, qkv, real, head_dim=head_dim, tables=tables, window=window)


def _attend(
    product: Any, attention: Any, x: jax.Array, qkv: PackedProjection, real: jax.Array, *, head_dim: int,
    tables: tuple[jax.Array, jax.Array] | None = None, window: int | None = None,
) -> jax.Array:  # fmt: skip
    q, k, v = product(x, qkv)
    if tables is None:
        q, k = split_heads(q, head_dim), split_heads(k, head_dim)
    else:
        q, k = rotated_heads(q, k, *tables, head_dim)
    return attention(q, k, split_heads(v, head_dim), _mask(real, window))


def _mask(real: jax.Array, window: int | None) -> jax.Array:
    """bool [batch, queries, keys]: real tokens and what they see."""
    mask = real[:, :, None] & real[:, None, :]
    if window is None:
        return mask
    places = jnp.arange(real.shape[1], dtype=jnp.int32)
    return mask & (jnp.abs(places[:, None] - places[None, :]) <= window)


attend_padded = Op("attend_padded", attend_padded_reference)
attend_padded.register(Implementation("products", partial(_attend, project, attend)))
