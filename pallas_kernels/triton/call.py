"""How a tile program becomes a kernel: the only file that calls Pallas-Triton's lowering.

A tile program is a function of references and program ids, made of loads, stores, dots and elementwise arithmetic on tiles whose
sides are powers of two. JAX deprecates this lowering in favour of Mosaic GPU and jax-triton: what takes its place replaces this
file, not the tile programs.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.rounding import power_of_two
from pallas_kernels.target import Target, not_nvidia, target

BLACKWELL = ((10, 0), (12, 0), (12, 1))
"""Compute capabilities beyond Hopper that the tests compile the kernels for. Another may need what XLA's Triton does not know."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a tile program is run: ``program(*operand_refs, *output_refs, **constants)``, once for every point of the grid.

    Attributes:
      program: the tile program; it reads whole operands and computes its own indices.
      constants: names and values of its static arguments.
      name: of the kernel, in profiles and in compiled code.
      grid: number of programs along each axis.
      outputs: shape and dtype of each output.
      warps: of a program.
      stages: loads in flight of a loop with dots.
      aliases: pairs of an operand's number and that of the output that takes its memory.
    """

    program: Callable[..., None]
    constants: tuple[tuple[str, Any], ...]
    name: str
    grid: tuple[int, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    warps: int
    stages: int = 1
    aliases: tuple[tuple[int, int], ...] = ()

    def __call__(self, *operands: jax.Array) -> tuple[jax.Array, ...]:
        """Runs the kernel, or has it interpreted if that is the target."""
        return _run(operands, self, target().interpret)


@partial(jax.jit, static_argnums=(1, 2))
def _run(operands: tuple[jax.Array, ...], launch: Launch, interpret: bool) -> tuple[jax.Array, ...]:
    """Compiled by itself so that the layers of a model, all alike, are traced and lowered once: 0.6 s in place of 8.7."""
    call = pl.pallas_call(
        partial(launch.program, **dict(launch.constants)),
        out_shape=launch.outputs,
        grid=launch.grid,
        input_output_aliases=dict(launch.aliases),
        compiler_params=plt.CompilerParams(num_warps=launch.warps, num_stages=launch.stages),
        interpret=interpret,
        name=launch.name,
    )
    return tuple(call(*operands))


def load(ref: Any, *indices: Any, mask: jax.Array | None = None, once: bool = False) -> jax.Array:
    """A tile of a reference, by index arrays that broadcast against each other; zeros where the mask is False.

    ``once`` says that no other program reads the tile: it need not stay in the cache.
    """
    view = ref.at[_broadcast(indices)]
    other = None if mask is None else 0.0
    return plt.load(view, mask=mask, other=other, eviction_policy="evict_first" if once else None)


def store(ref: Any, value: jax.Array, *indices: Any, mask: jax.Array | None = None) -> None:
    """Writes a tile by index arrays, where the mask is True."""
    plt.store(ref.at[_broadcast(indices)], value.astype(ref.dtype), mask=mask)


def _broadcast(indices: tuple[Any, ...]) -> tuple[jax.Array, ...]:
    arrays = [jnp.asarray(i, jnp.int32) for i in indices]
    shape = jnp.broadcast_shapes(*(a.shape for a in arrays))
    return tuple(jnp.broadcast_to(a, shape) for a in arrays)


def unavailable(device: Target) -> str | None:
    """Why Pallas-Triton kernels cannot run on a device at all."""
    if (reason := not_nvidia(device)) is not None:
        return reason
    if device.capability < (8, 0):
        return f"needs compute capability 8.0 (Ampere) or newer, not {device.capability[0]}.{device.capability[1]}"
    if device.capability >= (10, 0) and device.capability not in BLACKWELL:
        listed = ", ".join(f"{major}.{minor}" for major, minor in BLACKWELL)
        return f"beyond Hopper compiled for {listed} alone; this is {device.capability[0]}.{device.capability[1]}"
    return None


def padded_batch(batch: int) -> int:
    """The batch side of a tile: a power of two that tensor cores take."""
    return max(16, power_of_two(batch))
