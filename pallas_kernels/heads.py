"""The op `project_heads`: queries, keys and values of new tokens from their projections to what attention and the cache want."""

from collections.abc import Callable
from functools import partial

import jax

from pallas_kernels.attention import rotated_heads, split_heads
from pallas_kernels.norm import Norm
from pallas_kernels.products import project, project_reference
from pallas_kernels.projection import PackedProjection
from pallas_kernels.registry import Implementation, Op

Heads = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def project_heads_reference(
    x: jax.Array,
    qkv: PackedProjection,
    cos: jax.Array,
    sin: jax.Array,
    head_dim: int,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
) -> Heads:
    """Projects, norms and rotates.

    Args:
      x: [batch, tokens, width].
      qkv: three members.
      cos, sin: float32 [batch, tokens, columns], to rotate queries and keys by, as for `rotate`.
      head_dim: columns of a head.
      q_norm, k_norm: over head_dim, before rotation.

    Returns:
      Queries [batch, heads, tokens, head_dim], keys and values [batch, kv_heads, tokens, head_dim], and these two once more, for
      the cache: the same numbers, which an implementation may hold in two orders in memory.
    """
    return project_heads_by(project_reference, x, qkv, cos, sin, head_dim, q_norm, k_norm)


def project_heads_by(
    product: Callable[..., tuple[jax.Array, ...]], x: jax.Array, qkv: PackedProjection, cos: jax.Array, sin: jax.Array,
    head_dim: int, q_norm: Norm | None = None, k_norm: Norm | None = None,
) -> Heads:  # fmt: skip
    """The same by a product such as `project`."""
    q, k, v = product(x, qkv)
    q, k = rotated_heads(q, k, cos, sin, head_dim, q_norm, k_norm)
    v = split_heads(v, head_dim)
    return q, k, v, k, v


project_heads = Op("project_heads", project_heads_reference)
project_heads.register(Implementation("separate", partial(project_heads_by, project)))
