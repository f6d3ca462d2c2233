"""The op `project` in Pallas-Triton: one kernel for dense members, two for low-rank ones, norm and epilogues folded in."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.norm import Norm, rms_norm
from pallas_kernels.products import rows as rows_of
from pallas_kernels.projection import PackedProjection
from pallas_kernels.target import target
from pallas_kernels.triton.blocks import MATVEC_BATCH, product_blocks
from pallas_kernels.triton.call import SUPPORTED_DTYPES, Launch
from pallas_kernels.triton.matmul import matmul_program
from pallas_kernels.triton.matvec import matvec_program
from pallas_kernels.triton.plan import Blocks, Member, ProductPlan, dense_members, latent_members, second_members

LARGEST_BATCH = 32


def refuses(x: jax.Array, packed: PackedProjection, **options: Any) -> str | None:
    """Why these kernels cannot serve a call."""
    if rows_of(x) > LARGEST_BATCH:
        return f"{rows_of(x)} rows; it serves up to {LARGEST_BATCH}"
    if x.dtype not in SUPPORTED_DTYPES or packed.first.dtype != x.dtype:
        return f"x is {x.dtype} and the weights {packed.first.dtype}; it serves one of bfloat16, float16, float32"
    ragged = [w.shape for w in (packed.first, *packed.ups) if w is not None and w.shape[1] % 8]
    if ragged:
        return f"a weight of shape {ragged[0]}, whose rows are no whole multiple of 8 elements"
    return None


def project(
    x: jax.Array,
    packed: PackedProjection,
    *,
    dtype: jnp.dtype | None = None,
    norm: Norm | None = None,
    gate: str | None = None,
    residual: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """As `pallas_kernels.project`; sums stay in float32 up to the output, and latents are rounded to x's dtype."""
    leading = x.shape[:-1]
    x = x.reshape(-1, x.shape[-1])
    biases = tuple(b for b in packed.biases if b is not None)
    flat_residual = None if residual is None else residual.reshape(x.shape[0], -1)
    finish = Epilogue(dtype or x.dtype, gate, flat_residual)
    if all(up is None for up in packed.ups):
        plan = _plan(x, dense_members(packed), 1, len(biases), norm, finish)
        outputs = _run("project_dense", plan, x, norm, (packed.first,), biases, finish)
    else:
        plan = _plan(x, latent_members(packed), 1, 0, norm, Epilogue(x.dtype))
        (latent,) = _run("project_down", plan, x, norm, (packed.first,), (), Epilogue(x.dtype))
        ups = tuple(up for up in packed.ups if up is not None)
        plan = _plan(x, second_members(packed), len(ups), len(biases), None, finish)
        outputs = _run("project_up", plan, latent, None, ups, biases, finish)
    return tuple(y.reshape(*leading, -1) for y in outputs)


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What is done with the outputs: their dtype, the gate's activation, and what they are added to [batch, d_out]."""

    dtype: jnp.dtype
    gate: str | None = None
    residual: jax.Array | None = None


def _plan(
    x: jax.Array, members: tuple[Member, ...], weights: int, biases: int, norm: Norm | None, finish: Epilogue
) -> ProductPlan:
    return ProductPlan(
        members,
        x.shape[0],
        weights,
        biases,
        None if norm is None else norm.eps,
        finish.gate,
        finish.residual is not None,
    )


def _run(
    name: str,
    plan: ProductPlan,
    x: jax.Array,
    norm: Norm | None,
    weights: tuple[jax.Array, ...],
    biases: tuple[jax.Array, ...],
    finish: Epilogue,
) -> tuple[jax.Array, ...]:
    """One kernel, by multiply-and-add or on tensor cores."""
    if plan.batch <= MATVEC_BATCH:
        blocks = product_blocks(plan, target(), x.dtype.itemsize)
        return _launch(matvec_program, name, plan, blocks, x, norm, weights, biases, finish)
    if norm is not None:
        # Apart from the product: inside, every program would norm all rows again, between loading and multiplying them.
        plan, x = dataclasses.replace(plan, eps=None), rms_norm(x, norm)
    blocks = product_blocks(plan, target(), x.dtype.itemsize)
    return _launch(matmul_program, f"{name}_batch", plan, blocks, x, None, weights, biases, finish)


def _launch(
    program: Callable[..., None],
    name: str,
    plan: ProductPlan,
    blocks: Blocks,
    x: jax.Array,
    norm: Norm | None,
    weights: tuple[jax.Array, ...],
    biases: tuple[jax.Array, ...],
    finish: Epilogue,
) -> tuple[jax.Array, ...]:
    split = blocks.splits > 1
    members = plan.members[:1] if plan.gate else plan.members
    shapes = [(plan.batch, m.rows) for m in members]
    operands = [x, *([] if norm is None else [norm.scale]), *weights, *biases]
    operands += [] if finish.residual is None else [finish.residual]
    programs = sum(plan.tiles(blocks.rows))
    results = Launch(
        program,
        (("plan", plan), ("blocks", blocks)),
        name=name,
        grid=(programs,) if program is matvec_program else (programs, blocks.splits),
        outputs=tuple(
            jax.ShapeDtypeStruct((blocks.splits, *s), jnp.float32) if split else jax.ShapeDtypeStruct(s, finish.dtype)
            for s in shapes
        ),
        warps=blocks.warps,
        stages=blocks.stages,
    )(*operands)
    return tuple(y.sum(0).astype(finish.dtype) for y in results) if split else results
