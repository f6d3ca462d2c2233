"""Norms: root-mean-square, alone or as what an op does first, and LayerNorm."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Norm:
    """A root-mean-square norm: ``scale`` [d] and the ``eps`` added to the mean square."""

    scale: jax.Array
    eps: float = dataclasses.field(metadata={"static": True})


def rms_norm(x: jax.Array, norm: Norm) -> jax.Array:
    """Root-mean-square norm over the last axis (Zhang and Sennrich 2019), statistics in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + norm.eps)
    return wide.astype(x.dtype) * norm.scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerNorm:
    """A LayerNorm: ``scale`` [d], ``bias`` [d] or None, and the ``eps`` added to the variance."""

    scale: jax.Array
    bias: jax.Array | None
    eps: float = dataclasses.field(metadata={"static": True})


def layer_norm(x: jax.Array, norm: LayerNorm) -> jax.Array:
    """LayerNorm over the last axis (Ba et al. 2016), in float32 up to the result, which has x's dtype."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + norm.eps)
    wide = wide * norm.scale.astype(jnp.float32)
    return (wide if norm.bias is None else wide + norm.bias.astype(jnp.float32)).astype(x.dtype)
