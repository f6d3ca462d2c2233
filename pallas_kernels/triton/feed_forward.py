"""The op `feed_forward` in Pallas-Triton: low-rank layers, with nothing of the inner width in memory."""

import jax

from pallas_kernels.products import SUPPORTED_DTYPES, project, rows, unsuited
from pallas_kernels.projection import PackedProjection
from pallas_kernels.target import target
from pallas_kernels.triton.call import Launch
from pallas_kernels.triton.feed_forward_program import FeedForwardPlan, Inner, feed_forward_program
from pallas_kernels.triton.flash_programs import pieces

TOKENS = 128
"""Of a program. With fewer, it waits for the factors more than it multiplies: 0.76 and 1.0 ms with 64, 0.47 with 128 (BERT-base,
64 x 512 tokens, rank 307, H200); so ranks that need more registers or shared memory are left to products."""

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
        grid=(-(-plan.tokens // plan.token_tile),),
        outputs=(jax.ShapeDtypeStruct((plan.tokens, plan.rank), x.dtype),),
        warps=warps,
        stages=stages,
    )(latents.reshape(plan.tokens, -1), *ups, first, *(b for b in up.biases if b is not None))
    assert down.ups[0] is not None
    last = PackedProjection(down.ups[0], (None,), (bias,), (0,), (down.ups[0].shape[0],))
    return project(sums.reshape(*x.shape[:-1], -1), last, residual=residual)[0]


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
    plan = FeedForwardPlan(members, activation, rows(x), up.d_outs[0], down.widths[0], TOKENS, inner_tile)
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
