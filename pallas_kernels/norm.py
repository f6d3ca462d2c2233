"""Norms over the last axis, as ops: root-mean-square, alone or as what another op does first, and LayerNorm."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.registry import Op


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Norm:
    """A root-mean-square norm: ``scale`` [d], the ``eps`` added to the mean square, and an ``offset`` added to the scale.

    With an offset, as Gemma's norms have, scaling is in float32 too: 1 + a small weight does not fit into 16 bits.
    """

    scale: jax.Array
    eps: float = dataclasses.field(metadata={"static": True})
    offset: float = dataclasses.field(default=0.0, metadata={"static": True})


def rms_norm_reference(x: jax.Array, norm: Norm) -> jax.Array:
    """Root-mean-square norm over the last axis (Zhang and Sennrich 2019), statistics in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + norm.eps)
    if norm.offset:
        return (wide * (norm.scale.astype(jnp.float32) + norm.offset)).astype(x.dtype)
    return wide.astype(x.dtype) * norm.scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerNorm:
    """A LayerNorm: ``scale`` [d], ``bias`` [d] or None, and the ``eps`` added to the variance."""

    scale: jax.Array
    bias: jax.Array | None
    eps: float = dataclasses.field(metadata={"static": True})


def layer_norm_reference(x: jax.Array, norm: LayerNorm) -> jax.Array:
    """LayerNorm over the last axis (Ba et al. 2016), in float32 up to the result, which has x's dtype."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + norm.eps)
    wide = wide * norm.scale.astype(jnp.float32)
    return (wide if norm.bias is None else wide + norm.bias.astype(jnp.float32)).astype(x.dtype)


def add_norm_reference(
    x: jax.Array, added: jax.Array, norm: Norm | LayerNorm, *, keep_sum: bool = True
) -> tuple[jax.Array | None, jax.Array]:
    """A residual stream and its norm after something is added to it.

    Args:
      x: [..., d], the residual stream.
      added: [..., d], what a layer adds to it.
      norm: of the sum.
      keep_sum: whether the sum is wanted; it is not where the norm takes its place in the stream.

    Returns:
      The sum, rounded to x's dtype, or None; and its norm.
    """
    x = x + added
    return x if keep_sum else None, norm_reference(x, norm)


def norm_reference(x: jax.Array, norm: Norm | LayerNorm) -> jax.Array:
    """Either norm, by its kind."""
    return rms_norm_reference(x, norm) if isinstance(norm, Norm) else layer_norm_reference(x, norm)


rms_norm = Op("rms_norm", rms_norm_reference)
layer_norm = Op("layer_norm", layer_norm_reference)
add_norm = Op("add_norm", add_norm_reference)


def normed(x: jax.Array, norm: Norm | LayerNorm) -> jax.Array:
    """x after a norm of either kind, by its op."""
    return layer_norm(x, norm) if isinstance(norm, LayerNorm) else rms_norm(x, norm)
