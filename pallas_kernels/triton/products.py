"""The op `project` in Pallas-Triton: one kernel for dense members, two for low-rank ones, norm and epilogues folded in."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.norm import LayerNorm, Norm, norm_reference, rms_norm_reference
from pallas_kernels.products import rows as rows_of
from pallas_kernels.products import unsuited
from pallas_kernels.projection import PackedProjection
from pallas_kernels.target import target
from pallas_kernels.triton.blocks import MATVEC_BATCH, product_blocks
from pallas_kernels.triton.call import Launch
from pallas_kernels.triton.matmul import matmul_program
from pallas_kernels.triton.matvec import matvec_program
from pallas_kernels.triton.plan import Member, ProductPlan, dense_members, latent_members, second_members

LARGEST_BATCH = 32


def refuses(x: jax.Array, packed: PackedProjection, **options: Any) -> str | None:
    """Why these kernels cannot serve a call."""
    if rows_of(x) > LARGEST_BATCH:
        return f"{rows_of(x)} rows; it serves up to {LARGEST_BATCH}"
    return unsuited(x.dtype, [weight for weight in (packed.first, *packed.ups) if weight is not None])


def project(
    x: jax.Array,
    packed: PackedProjection,
    *,
    dtype: jnp.dtype | None = None,
    norm: Norm | LayerNorm | None = None,
    gate: str | None = None,
    residual: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """As `pallas_kernels.project`; sums stay in float32 up to the output, and latents are rounded to x's dtype."""
    leading = x.shape[:-1]
    x = x.reshape(-1, x.shape[-1])
    if isinstance(norm, LayerNorm) or (norm is not None and norm.offset):
        x, norm = norm_reference(x, norm), None  # by XLA: the programs fold in plain root-mean-square norms alone
    biases = tuple(b for b in packed.biases if b is not None)
    flat_residual = None if residual is None else residual.reshape(x.shape[0], -1)
    finish = Epilogue(dtype or x.dtype, gate, flat_residual)
    if all(up is None for up in packed.ups):
        outputs = _Product(x, dense_members(packed), (packed.first,), biases, norm, finish).run("project_dense")
    else:
        first = _Product(x, latent_members(packed), (packed.first,), (), norm, Epilogue(x.dtype))
        (latent,) = first.run("project_down")
        ups = tuple(up for up in packed.ups if up is not None)
        outputs = _Product(latent, second_members(packed), ups, biases, None, finish).run("project_up")
    return tuple(y.reshape(*leading, -1) for y in outputs)


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What is done with the outputs: their dtype, the gate's activation, and what they are added to [batch, d_out]."""

    dtype: jnp.dtype
    gate: str | None = None
    residual: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class _Product:
    """One kernel's work: x [batch, d_in], normed or not, times the members' weights."""

    x: jax.Array
    members: tuple[Member, ...]
    weights: tuple[jax.Array, ...]
    biases: tuple[jax.Array, ...]
    norm: Norm | None
    finish: Epilogue

    @property
    def plan(self) -> ProductPlan:
        eps = None if self.norm is None else self.norm.eps
        is_added = self.finish.residual is not None
        return ProductPlan(
            self.members, self.x.shape[0], len(self.weights), len(self.biases), eps, self.finish.gate, is_added
        )

    def run(self, name: str) -> tuple[jax.Array, ...]:
        """By multiply-and-add, or for more rows on tensor cores."""
        if self.x.shape[0] <= MATVEC_BATCH:
            return self._launch(matvec_program, name)
        if self.norm is None:
            return self._launch(matmul_program, f"{name}_batch")
        # Apart from the product: inside, every program would norm all rows again, between loading and multiplying them.
        normed = dataclasses.replace(self, x=rms_norm_reference(self.x, self.norm), norm=None)
        return normed._launch(matmul_program, f"{name}_batch")

    def _launch(self, program: Callable[..., None], name: str) -> tuple[jax.Array, ...]:
        plan, dtype = self.plan, self.finish.dtype
        blocks = product_blocks(plan, target(), self.x.dtype.itemsize)
        is_split, programs = blocks.splits > 1, sum(plan.tiles(blocks.rows))
        shapes = [(plan.batch, m.rows) for m in plan.outputs]
        given = [None if self.norm is None else self.norm.scale, *self.weights, *self.biases, self.finish.residual]
        results = Launch(
            program,
            (("plan", plan), ("blocks", blocks)),
            name=name,
            grid=(programs,) if program is matvec_program else (programs, blocks.splits),
            outputs=tuple(
                jax.ShapeDtypeStruct((blocks.splits, *s), jnp.float32) if is_split else jax.ShapeDtypeStruct(s, dtype)
                for s in shapes
            ),
            warps=blocks.warps,
            stages=blocks.stages,
        )(self.x, *(operand for operand in given if operand is not None))
        return tuple(y.sum(0).astype(dtype) for y in results) if is_split else results
