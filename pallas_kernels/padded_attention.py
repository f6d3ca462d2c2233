"""The op `attend_padded`: attention of padded sequences over themselves, from what their queries, keys and values are made of.

It takes the input and the packed projections, not their products, so that an implementation may rebuild queries, keys and values
tile by tile from rank space and never hold them whole.
"""

from functools import partial
from typing import Any

import jax

from pallas_kernels.attention import Visible, attend, attend_reference, rotated_heads, split_heads
from pallas_kernels.products import project, project_reference
from pallas_kernels.projection import PackedProjection
from pallas_kernels.registry import Implementation, Op


def attend_padded_reference(
    x: jax.Array,
    qkv: PackedProjection,
    visible: Visible,
    *,
    head_dim: int,
    tables: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Attention of each sequence over its own tokens, usually in both directions.

    Args:
      x: [batch, tokens, width].
      qkv: three members; keys and values may have fewer heads than queries, see `attend`.
      visible: what each token sees. Padding may lie on either side or be all of a sequence; it is seen by nobody, and its own
        rows are zeros.
      head_dim: columns of a head.
      tables: cosines and sines, float32 [batch, tokens, head_dim // 2], to rotate queries and keys by; None leaves them.

    Returns:
      [batch, tokens, heads * head_dim] in x's dtype.
    """
    return attend_padded_by(project_reference, attend_reference, x, qkv, visible, head_dim=head_dim, tables=tables)


def attend_padded_by(
    product: Any, attention: Any, x: jax.Array, qkv: PackedProjection, visible: Visible, *, head_dim: int,
    tables: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:  # fmt: skip
    """The same by a product such as `project` and an attention such as `attend`."""
    q, k, v = product(x, qkv)
    if tables is None:
        q, k = split_heads(q, head_dim), split_heads(k, head_dim)
    else:
        q, k = rotated_heads(q, k, *tables, head_dim)
    return attention(q, k, split_heads(v, head_dim), visible)


attend_padded = Op("attend_padded", attend_padded_reference)
attend_padded.register(Implementation("products", partial(attend_padded_by, project, attend)))
