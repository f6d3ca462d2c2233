"""Attention of new queries over keys and values held in a cache, or over a sequence's own."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.registry import Op


def attend_reference(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention with grouped heads, scores and softmax in float32.

    Args:
      q: [batch, heads, queries, head_dim].
      k, v: [batch, kv_heads, keys, head_dim]; head h reads kv head ``h // (heads // kv_heads)``.
      mask: bool [batch, queries, keys], True where a query may look. A query that may look nowhere gives zeros.

    Returns:
      [batch, queries, heads * head_dim] in q's dtype.
    """
    batch, heads, queries, head_dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, queries, head_dim)
    scores = jnp.einsum("bkgth,bksh->bkgts", grouped, k, preferred_element_type=jnp.float32) / math.sqrt(head_dim)
    visible = mask[:, None, None]
    # A finite floor: a row that sees nothing then has no inf - inf, and its weights are zeroed by the second `where`.
    scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    weights = jnp.where(visible, weights, 0.0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total == 0.0, 1.0, total)
    # Transposed after the product, not by it: XLA's CPU backend has no permuted product of bfloat16 into float32.
    out = jnp.einsum("bkgts,bksh->bkgth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads * head_dim).astype(q.dtype)


attend = Op("attend", attend_reference)
