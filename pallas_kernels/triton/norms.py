"""The ops `rms_norm`, `layer_norm` and `add_norm` in Pallas-Triton: each row is read once and written once.

XLA reads rows once for their statistics and once more to scale them: 57 us for 32768 rows of 768, whose bytes take 24 (H200).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.norm import LayerNorm, Norm
from pallas_kernels.products import SUPPORTED_DTYPES, rows
from pallas_kernels.rounding import power_of_two_within
from pallas_kernels.triton.call import Launch, load, store
from pallas_kernels.triton.flash_programs import pieces, tile_mask

FEWEST = 64
"""Rows from which on a kernel of its own pays; for fewer, the norm is part of what comes next."""
WIDEST = 8192
_ELEMENTS = 4096  # of a program


@dataclasses.dataclass(frozen=True)
class NormPlan:
    """Sizes, and what is done: ``centred`` subtracts the mean, as LayerNorm does.

    Attributes:
      rows, width: in all.
      tile: rows of a program.
      eps, centred, has_bias, offset: of the norm.
      is_sum: a second operand is added to the rows first.
      keeps_sum: that sum is an output too, the first.
    """

    rows: int
    width: int
    tile: int
    eps: float
    centred: bool
    has_bias: bool
    is_sum: bool = False
    keeps_sum: bool = False
    offset: float = 0.0


def norm_program(*refs: Any, plan: NormPlan) -> None:
    """Norms some rows; for `Launch` with one program for each ``plan.tile`` of them."""
    x_ref, scale_ref, *rest = refs
    bias_ref = rest.pop(0) if plan.has_bias else None
    added_ref = rest.pop(0) if plan.is_sum else None
    sum_ref = rest.pop(0) if plan.keeps_sum else None
    (out,) = rest
    at = pl.program_id(0) * plan.tile + jnp.arange(plan.tile)
    existing = at < plan.rows if plan.rows % plan.tile else None
    of = pieces(plan.width)

    def read(ref: Any, piece: Any) -> jax.Array:
        return load(ref, piece.columns, mask=piece.inside).astype(jnp.float32)[None]

    masks = [tile_mask(existing, p.inside, (plan.tile, p.tile)) for p in of]

    def tiles(ref: Any) -> list[jax.Array]:
        return [load(ref, at[:, None], p.columns[None], mask=m, once=True) for p, m in zip(of, masks, strict=True)]

    given = tiles(x_ref)
    if added_ref is not None:
        sums = (a.astype(jnp.float32) + b.astype(jnp.float32) for a, b in zip(given, tiles(added_ref), strict=True))
        given = [total.astype(out.dtype) for total in sums]
    if sum_ref is not None:
        for total, p, mask in zip(given, of, masks, strict=True):
            store(sum_ref, total, at[:, None], p.columns[None], mask=mask)
    wide = [t.astype(jnp.float32) for t in given]

    def mean(tiles: list[jax.Array]) -> jax.Array:
        total = sum((jnp.sum(t, axis=1) for t in tiles[1:]), start=jnp.sum(tiles[0], axis=1))
        return (total / plan.width)[:, None]

    if plan.centred:
        middle = mean(wide)
        wide = [w - middle for w in wide]
        # What is beyond the width must not count.
        wide = [w if p.inside is None else jnp.where(p.inside[None], w, 0.0) for w, p in zip(wide, of, strict=True)]
    divisor = lax.rsqrt(mean([w * w for w in wide]) + plan.eps)
    for w, p, mask in zip(wide, of, masks, strict=True):
        y = w * divisor
        if not plan.centred and not plan.offset:
            y = y.astype(out.dtype).astype(jnp.float32)  # rounded where the reference rounds
        y = y * (read(scale_ref, p) + plan.offset)
        store(out, y if bias_ref is None else y + read(bias_ref, p), at[:, None], p.columns[None], mask=mask)


def refuses(x: jax.Array, norm: Norm | LayerNorm) -> str | None:
    """Why these kernels cannot serve a norm alone."""
    if x.dtype not in SUPPORTED_DTYPES or norm.scale.dtype != x.dtype:
        return f"x is {x.dtype} and its scale {norm.scale.dtype}; it serves one of bfloat16, float16, float32"
    if rows(x) < FEWEST or not 16 <= x.shape[-1] <= WIDEST:
        return f"{rows(x)} rows of {x.shape[-1]}; it serves {FEWEST} and more, of 16 to {WIDEST}"
    return None


def refuses_sum(x: jax.Array, added: jax.Array, norm: Norm | LayerNorm, *, keep_sum: bool = True) -> str | None:
    """Why they cannot serve a norm of a sum."""
    return f"x is {x.dtype} and what is added {added.dtype}" if added.dtype != x.dtype else refuses(x, norm)


def run(x: jax.Array, norm: Norm | LayerNorm) -> jax.Array:
    """As `pallas_kernels.rms_norm` or `pallas_kernels.layer_norm`, by the kind of the norm."""
    return _launch(x, norm, None, False)[0]


def run_sum(
    x: jax.Array, added: jax.Array, norm: Norm | LayerNorm, *, keep_sum: bool = True
) -> tuple[jax.Array | None, jax.Array]:
    """As `pallas_kernels.add_norm`."""
    *total, normed = _launch(x, norm, added, keep_sum)
    return total[0] if keep_sum else None, normed


def _launch(x: jax.Array, norm: Norm | LayerNorm, added: jax.Array | None, keeps_sum: bool) -> tuple[jax.Array, ...]:
    width = x.shape[-1]
    bias = norm.bias if isinstance(norm, LayerNorm) else None
    tile = power_of_two_within(max(1, _ELEMENTS // sum(p.tile for p in pieces(width))))
    plan = NormPlan(
        rows(x), width, tile, norm.eps, isinstance(norm, LayerNorm), bias is not None, added is not None, keeps_sum,
        0.0 if isinstance(norm, LayerNorm) else norm.offset,
    )  # fmt: skip
    shape = jax.ShapeDtypeStruct((plan.rows, width), x.dtype)
    name = "layer_norm" if plan.centred else "rms_norm"
    results = Launch(
        norm_program,
        (("plan", plan),),
        name=f"add_{name}" if plan.is_sum else name,
        grid=(-(-plan.rows // tile),),
        outputs=(shape,) * (1 + keeps_sum),
        warps=4,
    )(*(a.reshape(-1, width) if a.ndim > 1 else a for a in (x, norm.scale, bias, added) if a is not None))
    return tuple(result.reshape(x.shape) for result in results)
