"""The op `attend` by cuDNN's flash attention, which JAX brings along on NVIDIA GPUs."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import HALF_DTYPES, Visible, attend, unsuited_dtypes
from pallas_kernels.registry import Implementation
from pallas_kernels.target import Target, is_assumed, not_nvidia, target

FEWEST = 128
"""Queries, a tile of it. With fewer it has no advantage, and has been tried less."""


def unavailable(device: Target) -> str | None:
    """Why cuDNN can serve no call on a device, or None."""
    if (reason := not_nvidia(device)) is not None:
        return reason
    if is_assumed():
        return "compiled on the GPU itself, and this one is only assumed"
    if device.capability < (8, 0):
        return f"needs compute capability 8.0 (Ampere) or newer, not {device.capability[0]}.{device.capability[1]}"
    return None


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
    if softcap is not None:
        return "bounded scores"
    if (reason := unsuited_dtypes(q, k, v, HALF_DTYPES)) is not None:
        return reason
    widest = 256 if target().capability >= (9, 0) else 128
    if q.shape[3] % 8 or q.shape[3] > widest:
        return f"head_dim {q.shape[3]}; it serves multiples of 8 up to {widest}"
    if q.shape[2] < FEWEST:
        return f"{q.shape[2]} queries; it is for {FEWEST} and more"
    if visible.real is not None:
        return "padding elsewhere than on the right"
    if (visible.causal or visible.padding == "blind") and (visible.start is not None or q.shape[2] != k.shape[2]):
        return "queries that are not all the tokens whose keys they see"
    if visible.causal and visible.padding == "sighted":
        return "padding that sees what is before it"
    if visible.window is not None and not visible.causal:
        return "a window to both sides"
    return None


def cudnn_attend(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: Visible, *, scale: float | None = None, softcap: None = None
) -> jax.Array:
    """As `pallas_kernels.attend`."""
    batch, _, queries, _ = q.shape
    # Causal queries see no padding, as it is on the right.
    lengths = None if visible.causal else visible.ends
    window = None if visible.window is None else (visible.window - 1, 0)
    out = jax.nn.dot_product_attention(
        *(a.swapaxes(1, 2) for a in (q, k, v)), scale=scale, is_causal=visible.causal, local_window_size=window,
        key_value_seq_lengths=lengths, implementation="cudnn",
    ).reshape(batch, queries, -1)  # fmt: skip
    if visible.padding == "ignored" and visible.causal:
        return out
    # cuDNN does not say what it leaves in rows of a sequence without a key.
    seen = (jnp.arange(queries) if visible.padding == "blind" else jnp.zeros(queries, jnp.int32)) < visible.ends[
        :, None
    ]
    return jnp.where(seen[..., None], out, jnp.zeros((), out.dtype))


def register() -> None:
    """Makes it the first choice among the implementations that are registered by now."""
    attend.register(Implementation("cudnn", cudnn_attend, refuses, unavailable))
