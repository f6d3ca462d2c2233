"""Root-mean-square norms, alone or as what an op does first."""

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
