"""Attention of new queries over keys and values held in a cache, or over a sequence's own."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.norm import Norm, rms_norm_reference
from pallas_kernels.registry import Op
from pallas_kernels.target import target


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visible:
    """Which keys each query sees, told without a mask of all pairs, so that kernels can pass over what nobody sees.

    Every query has a place among the keys: it is one of the tokens whose keys they are.

    Attributes:
      ends: int32 [batch]; a sequence's places from there on hold no real token.
      real: bool [batch, keys], False where a place before that holds none either, as in padding on the left; None where all do.
      start: int32 [] or [batch], the place of the first query.
      causal: a query sees nothing behind its own place.
      window: a query sees what is less than this many places away; all if None.
      padding: of queries whose own place holds no real token: "blind" ones see nothing, "sighted" ones see what others do, and
        where what comes out for them does not matter, they are "ignored", as long as it is finite.
    """

    ends: jax.Array
    real: jax.Array | None = None
    start: jax.Array | None = None
    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    padding: Literal["blind", "sighted", "ignored"] = dataclasses.field(default="blind", metadata={"static": True})

    @property
    def starts(self) -> jax.Array:
        """int32 [batch]."""
        return jnp.broadcast_to(jnp.int32(0) if self.start is None else self.start, self.ends.shape)

    def mask(self, queries: int, keys: int) -> jax.Array:
        """bool [batch, queries, keys], True where a query sees a key."""
        own = self.starts[:, None] + jnp.arange(queries, dtype=jnp.int32)
        places = jnp.arange(keys, dtype=jnp.int32)[None]
        distance = own[:, :, None] - places[:, None, :]
        mask = jnp.broadcast_to(self._are_real(places)[:, None, :], distance.shape)
        if self.padding == "blind":
            mask = mask & self._are_real(own)[:, :, None]
        if self.causal:
            mask = mask & (distance >= 0)
        return mask if self.window is None else mask & (jnp.abs(distance) < self.window)

    def _are_real(self, places: jax.Array) -> jax.Array:
        within = places < self.ends[:, None]
        if self.real is None:
            return within
        last = self.real.shape[1] - 1
        return within & jnp.take_along_axis(
            self.real, jnp.broadcast_to(jnp.minimum(places, last), within.shape), axis=1
        )


def attend_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: Visible,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Softmax attention with grouped heads, scores and softmax in float32.

    Args:
      q: [batch, heads, queries, head_dim].
      k, v: [batch, kv_heads, keys, head_dim]; head h reads kv head ``h // (heads // kv_heads)``.
      visible: what each query sees; one that sees nothing gives zeros.
      scale: what scores are multiplied with; 1 / sqrt(head_dim) if not given.
      softcap: a bound that scores approach then, by a hyperbolic tangent.

    Returns:
      [batch, queries, heads * head_dim] in q's dtype.
    """
    return masked_attention(q, k, v, visible.mask(q.shape[2], k.shape[2]), scale, softcap)


def masked_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float | None = None, softcap: float | None = None
) -> jax.Array:
    """`attend_reference` with any mask, bool [batch, queries, keys]."""
    batch, heads, queries, head_dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, queries, head_dim)
    scores = jnp.einsum("bkgth,bksh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    scores = soft_cap(scores / math.sqrt(head_dim) if scale is None else scores * scale, softcap)
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


def soft_cap(x: jax.Array, bound: float | None) -> jax.Array:
    """x, or what approaches a bound on either side where there is one."""
    return x if bound is None else jnp.tanh(x / bound) * bound


def split_heads(x: jax.Array, head_dim: int) -> jax.Array:
    """[batch, tokens, heads * head_dim] -> [batch, heads, tokens, head_dim]."""
    return x.reshape(*x.shape[:2], -1, head_dim).swapaxes(1, 2)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates heads x [batch, heads, tokens, head_dim] by tables [batch, tokens, head_dim // 2], in float32.

    Element i of a head is paired with element i + head_dim // 2 (the Llama convention of RoPE, Su et al. 2021). Tables of fewer
    columns rotate the first columns of a head alone, twice as many, and tables of none leave all as it is.
    """
    half = cos.shape[-1]
    if not half:
        return x
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    first, second = jnp.split(rotated.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*(part.astype(x.dtype) for part in turned), rest], axis=-1)


def rotated_heads(
    q: jax.Array,
    k: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    head_dim: int,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Projected queries and keys [batch, tokens, heads * head_dim] as heads, normed if the model does that, and rotated."""
    q, k = split_heads(q, head_dim), split_heads(k, head_dim)
    q = q if q_norm is None else rms_norm_reference(q, q_norm)
    k = k if k_norm is None else rms_norm_reference(k, k_norm)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def attend_cached_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    start: jax.Array,
    lengths: jax.Array,
    *,
    window: int | None = None,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """New tokens of sequences in a cache: norm and rotation of their queries and keys, the cache's update, attention over it.

    Args:
      q: [batch, tokens, heads * head_dim], as projected; k, v: [batch, tokens, kv_heads * head_dim].
      keys, values: the cache, [batch, kv_heads, slots, head_dim]; slot i holds position i.
      cos, sin: float32 [batch, tokens, head_dim // 2], of the new tokens' positions; of fewer columns as for `rotate`.
      start: int32 [] or [batch], position of the first new token; with the tokens after it, within the cache.
      lengths: int32 [batch]; slots from there on are seen by nobody.
      window: a query sees this many positions, itself included; all before it if None.
      q_norm, k_norm: over head_dim, before rotation.
      scale, softcap: as for `attend`.

    Returns:
      Attention [batch, tokens, heads * head_dim], and the cache with the new tokens in it.
    """
    head_dim = keys.shape[-1]
    q, k = rotated_heads(q, k, cos, sin, head_dim, q_norm, k_norm)
    keys = write_slots(keys, k, start)
    values = write_slots(values, split_heads(v, head_dim), start)
    # Without the barrier XLA's CPU backend fuses the update into the product that reads it too, and copies the cache for that.
    keys, values = lax.optimization_barrier((keys, values))
    visible = Visible(lengths, start=start, window=window, padding="sighted")
    return attend(q, keys, values, visible, scale=scale, softcap=softcap), keys, values


def write_slots(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Writes new [batch, kv_heads, tokens, head_dim] into cache [batch, kv_heads, slots, head_dim] from slot ``start`` on.

    ``start`` is [] where all sequences are at the same position, else [batch].
    """
    if start.ndim == 0 or cache.shape[0] == 1:
        return lax.dynamic_update_slice_in_dim(cache, new, start.reshape(()), axis=2)
    put = jax.vmap(lambda old, rows, first: lax.dynamic_update_slice_in_dim(old, rows, first, axis=1))
    return put(cache, new, start)


HALF_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
"""What tensor cores multiply at their full rate, and libraries serve."""


def unsuited_dtypes(q: jax.Array, k: jax.Array, v: jax.Array, served: Sequence[jnp.dtype]) -> str | None:
    """Why a kernel that serves these dtypes cannot serve the arrays, or None."""
    if q.dtype == k.dtype == v.dtype and q.dtype in served:
        return None
    return f"q is {q.dtype}, k {k.dtype} and v {v.dtype}; it serves one of {', '.join(map(str, served))}"


attend = Op("attend", attend_reference)


def keeps_scores() -> bool:
    """Whether attention of prompts holds its scores in memory here: no kernel of the device does without them."""
    return all(i.run is attend.reference or i.unavailable(target()) is not None for i in attend.implementations)


attend_cached = Op("attend_cached", attend_cached_reference)
