"""Rotary position embedding, with the published frequency scalings of `ROPE_KINDS`.

Rotation pairs element i of a head with element i + head_dim/2 (the Llama convention). Frequencies follow the formulas of
"RoFormer" (Su et al. 2021), position interpolation (Chen et al. 2023), dynamic NTK, YaRN (Peng et al. 2023), LongRoPE
(Ding et al. 2024) and Llama 3.1's piecewise scaling; `transformers` is what the tests compare with.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from flashsvd_jax.rope_config import RopeConfig


def rotary_tables(
    rope: RopeConfig, head_dim: int, positions: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for positions.

    Args:
      rope: the scaling.
      head_dim: size of a head; half as many frequencies, or fewer where it is rotated in part.
      positions: int32 [batch, tokens].
      lengths: int32 [batch], length that each sequence has reached; only `dynamic` and `longrope` depend on it.

    Returns:
      (cos, sin), each float32 [batch, tokens, rotated columns // 2], scaled by the kind's attention factor.
    """
    inverse = _inverse_frequencies(rope, rope.columns(head_dim), lengths)
    angles = positions[..., None].astype(jnp.float32) * inverse[:, None]
    factor = _attention_factor(rope)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def _inverse_frequencies(rope: RopeConfig, columns: int, lengths: jax.Array) -> jax.Array:
    """float32 [batch, columns // 2] (or [1, columns // 2] where the length does not matter)."""
    exponents = np.arange(0, columns, 2, dtype=np.float32) / columns
    plain = (1.0 / rope.theta**exponents).astype(np.float32)
    match rope.kind:
        case "default":
            return jnp.asarray(plain)[None]
        case "linear":
            return jnp.asarray(plain / rope.factor)[None]
        case "llama3":
            return jnp.asarray(_llama3(rope, plain))[None]
        case "yarn":
            return jnp.asarray(_yarn(rope, columns, plain))[None]
        case "dynamic":
            length = jnp.maximum(lengths, rope.original_max_position).astype(jnp.float32)
            stretch = rope.factor * length / rope.original_max_position - (rope.factor - 1)
            theta = rope.theta * stretch ** (columns / (columns - 2))
            return 1.0 / theta[:, None] ** jnp.asarray(exponents)[None]
        case "longrope":
            long = lengths[:, None] > rope.original_max_position
            divisor = jnp.where(long, jnp.asarray(rope.long_factor)[None], jnp.asarray(rope.short_factor)[None])
            return jnp.asarray(plain)[None] / divisor.astype(jnp.float32)
    raise ValueError(f"unknown rope kind {rope.kind!r}")


def _llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended."""
    turns = rope.original_max_position * plain / (2 * math.pi)
    blend = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    return ((1 - blend) * plain / rope.factor + blend * plain).astype(np.float32)


def _yarn(rope: RopeConfig, columns: int, plain: np.ndarray) -> np.ndarray:
    """Blends interpolated and plain frequencies over the range of dimensions between beta_fast and beta_slow rotations."""

    def dimension(rotations: float) -> float:
        return columns * math.log(rope.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, columns - 1)
    span = (high - low) or 0.001
    interpolated = np.clip((np.arange(columns // 2, dtype=np.float32) - low) / span, 0.0, 1.0)
    return (plain / rope.factor * interpolated + plain * (1 - interpolated)).astype(np.float32)


def _attention_factor(rope: RopeConfig) -> float:
    """What cosines and sines are multiplied with, which scales attention scores by its square."""
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind == "longrope":
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position)) if rope.factor > 1 else 1.0
    if rope.mscale and rope.mscale_all_dim:
        return _yarn_mscale(rope.factor, rope.mscale) / _yarn_mscale(rope.factor, rope.mscale_all_dim)
    return _yarn_mscale(rope.factor, 1.0)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
