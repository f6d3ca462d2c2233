"""The op `attend` by cuDNN for queries that come after others: over the keys before them, over their own, and both put together.

cuDNN's causal queries begin with the first key. What it computes of each part comes with the logarithm of the sum of exponentials,
which JAX's public interface rounds to bfloat16, too coarsely to weigh parts by; so this is a layer below (`test_jax_internals`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import cudnn
from pallas_kernels.attention import Visible, attend
from pallas_kernels.registry import Implementation

Part = tuple[jax.Array, jax.Array]
"""Attention over some of the keys [batch, heads, queries, head_dim], and the logarithm of the sum of exponentials of their scores,
float32 [batch, heads, queries]."""


def refuses(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: Visible,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> str | None:
    """Why it cannot serve a call."""
    if visible.start is None or not visible.causal or visible.padding != "ignored":
        return "queries that are all the tokens whose keys they see, that see what is behind them, or whose padding matters"
    if visible.window is not None or k.shape[2] < q.shape[2]:
        return "a window, or more queries than keys"
    return cudnn.refuses_arrays(q, k, v, visible, softcap)


def attend_in_parts(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: Visible, *, scale: float | None = None, softcap: None = None
) -> jax.Array:
    """As `pallas_kernels.attend`."""
    batch, heads, queries, head_dim = q.shape
    start, options = visible.starts, {"scale": head_dim**-0.5 if scale is None else scale}
    # Real tokens are before their padding, so that no key before a query is of padding.
    lengths = {"q_seqlen": jnp.full(batch, queries, jnp.int32), "kv_seqlen": start}
    out, log = _part(q, k, v, mask_type="PADDING", **lengths, **options)
    is_any = (start > 0)[:, None, None]
    before = jnp.where(is_any[..., None], out, 0), jnp.where(is_any, log, -jnp.inf)
    own_k, own_v = (jax.vmap(lambda a, at: lax.dynamic_slice_in_dim(a, at, queries, axis=1))(a, start) for a in (k, v))
    together = put_together(before, _part(q, own_k, own_v, mask_type="CAUSAL", **options))
    return together.swapaxes(1, 2).reshape(batch, queries, heads * head_dim)


def put_together(first: Part, second: Part) -> jax.Array:
    """Attention over the keys of two parts, of which the second has some: [batch, heads, queries, head_dim]."""
    share = jax.nn.sigmoid(first[1] - second[1])[..., None]
    return (first[0] * share + second[0] * (1 - share)).astype(first[0].dtype)


def _part(q: jax.Array, k: jax.Array, v: jax.Array, *, mask_type: str, **options: Any) -> Part:
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    options = {"mask_type": MaskType[mask_type], "qkv_layout": "BNTH", **options}
    found: Any = dot_product_attention(q, k, v, return_residual=True, **options)
    out, log = found
    return out, log


def register() -> None:
    """Makes it one that may be asked for; it has not been timed."""
    attend.register(Implementation("cudnn_parts", attend_in_parts, refuses, cudnn.unavailable), on_request=True)
