"""The op `feed_forward` in Pallas-Triton: low-rank layers, with nothing of the inner width in memory."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.products import SUPPORTED_DTYPES, project, rows, unsuited
from pallas_kernels.projection import PackedProjection
from pallas_kernels.target import target
from pallas_kernels.triton import stream_costs
from pallas_kernels.triton.call import Launch
from pallas_kernels.triton.feed_forward_program import (
    TOKENS,
    FeedForwardPlan,
    Inner,
    feed_forward_program,
    inner_splits,
)
from pallas_kernels.triton.flash_programs import pieces
from pallas_kernels.triton.stream_costs import FeedForwardCall

WARPS = 8


def refuses(
    x: jax.Array, up: PackedProjection, down: PackedProjection, *, activation: str, residual: jax.Array | None = None
) -> str | None:
    """Why this kernel cannot serve a call."""
    if any(u is None for u in (*up.ups, *down.ups)):
        return "a dense projection, which has no rank space"
    weights = [up.first, down.first, *(u for u in (*up.ups, *down.ups) if u is not None)]
    if x.dtype not in SUPPORTED_DTYPES or (reason := unsuited(x.dtype, weights)) is not None:
        return reason or f"x is {x.dtype}"
    if rows(x) < TOKENS:
        return f"{rows(x)} tokens; it serves {TOKENS} and more"
    if _sizes(up, down, x.dtype.itemsize) is None:
        return f"ranks {', '.join(map(str, (*up.widths, *down.widths)))} are more than a block of this device can hold"
    return None


def slower(x: jax.Array, up: PackedProjection, down: PackedProjection, **options: Any) -> str | None:
    """Why products would serve a call sooner, or None."""
    return stream_costs.slower(FeedForwardCall.of(rows(x), up, down)) if x.dtype.itemsize == 2 else None


def feed_forward(
    x: jax.Array, up: PackedProjection, down: PackedProjection, *, activation: str, residual: jax.Array | None = None
) -> jax.Array:
    """As `pallas_kernels.feed_forward`."""
    (latents,) = project(x, PackedProjection(up.first, (None,), (None,), (0,), (up.first.shape[0],)))
    plan, warps, stages = _plan(x, up, down, activation)
    first, bias = down.first, down.biases[0]
    ups = [u for u in up.ups if u is not None]
    (sums,) = Launch(
        feed_forward_program,
        (("plan", plan),),
        name="feed_forward",
        grid=(-(-plan.tokens // plan.token_tile), plan.splits),
        outputs=(
            jax.ShapeDtypeStruct((plan.splits, plan.tokens, plan.rank), jnp.float32 if plan.splits > 1 else x.dtype),
        ),
        warps=warps,
        stages=stages,
    )(latents.reshape(plan.tokens, -1), *ups, first, *(b for b in up.biases if b is not None))
    assert down.ups[0] is not None
    last = PackedProjection(down.ups[0], (None,), (bias,), (0,), (down.ups[0].shape[0],))
    whole = sums[0] if plan.splits == 1 else sums.sum(0).astype(x.dtype)
    return project(whole.reshape(*x.shape[:-1], -1), last, residual=residual)[0]


def _plan(
    x: jax.Array, up: PackedProjection, down: PackedProjection, activation: str
) -> tuple[FeedForwardPlan, int, int]:
    members = tuple(
        Inner(start, width, bias is not None)
        for start, width, bias in zip(up.starts, up.widths, up.biases, strict=True)
    )
    sizes = _sizes(up, down, x.dtype.itemsize)
    assert sizes is not None
    inner_tile, stages = sizes
    tokens, inner = rows(x), up.d_outs[0]
    splits = inner_splits(tokens, inner, target().cores)
    plan = FeedForwardPlan(members, activation, tokens, inner, down.widths[0], TOKENS, inner_tile, splits)
    return plan, WARPS, stages


def _sizes(up: PackedProjection, down: PackedProjection, itemsize: int) -> tuple[int, int] | None:
    """Inner columns of a step, and steps in flight; None if the ranks do not fit."""
    read = sum(piece.tile for width in up.widths for piece in pieces(width))
    added = sum(piece.tile for piece in pieces(down.widths[0]))
    if added > (384 if itemsize == 2 else 256):  # sums of a thread, in registers
        return None
    # Shared memory holds the latents, and a step's tiles of the factors as often as there are steps in flight.
    room = target().shared_memory - itemsize * TOKENS * read
    for inner_tile, fewest in ((64, 3), (32, 2)) if itemsize == 2 else ((16, 1),):
        stages = min(3, room // (itemsize * inner_tile * (read + added)))
        if stages >= fewest:
            return inner_tile, stages
    return None
