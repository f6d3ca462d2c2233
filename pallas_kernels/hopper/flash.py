"""The op `attend` for queries that are, or come after, the tokens whose keys they see, on Hopper."""

import jax

from pallas_kernels.attention import HALF_DTYPES, Visible, unsuited_dtypes
from pallas_kernels.hopper import flash_program
from pallas_kernels.hopper.flash_sizes import FlashSizes
from pallas_kernels.hopper.ring import ROWS
from pallas_kernels.target import target


def refuses(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: Visible,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> str | None:
    """Why this kernel cannot serve a call."""
    if softcap is not None:
        return "bounded scores"
    if (reason := unsuited_dtypes(q, k, v, HALF_DTYPES)) is not None:
        return reason
    if q.shape[3] not in (64, 128):
        return f"head_dim {q.shape[3]}; it serves 64 and 128"
    if q.shape[2] % ROWS:
        return f"{q.shape[2]} queries; it serves multiples of {ROWS}"
    if visible.real is not None or visible.window is not None or not visible.causal:
        return "padding on the left, a window, or queries that see what is behind them"
    return None if visible.padding == "ignored" else "padding whose output matters"


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: Visible, *, scale: float | None = None, softcap: None = None
) -> jax.Array:
    """As `pallas_kernels.attend`; what padding sees is zeros, or any of the keys."""
    batch, heads, queries, head_dim = q.shape
    sizes = FlashSizes(
        target(), batch, heads, k.shape[1], queries, head_dim, head_dim**-0.5 if scale is None else scale
    )
    flat = q.swapaxes(1, 2).reshape(batch, queries, heads * head_dim)
    k, v = (a.reshape(-1, *a.shape[2:]) for a in (k, v))
    return flash_program.run(flat, k, v, visible.ends, visible.starts, sizes=sizes)
