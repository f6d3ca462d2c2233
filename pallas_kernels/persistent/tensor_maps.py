"""Tensor maps of all operands of a launch, made on the device: what bulk copies need to know of a matrix.

A launch can be given as many maps as fit its parameters, which the matrices of a whole model do not. So a small kernel before it
writes them into an array, with the addresses of the operands beside them. It takes a map that JAX has encoded for one matrix and
puts in the address and the sizes of each.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.persistent import code as w
from pallas_kernels.persistent import copies
from pallas_kernels.persistent.steps import THREADS


def described_bytes(count: int) -> int:
    """Of what `describe` makes for so many operands."""
    return _padded(count) * (copies.MAP_BYTES + 8)


def _padded(count: int) -> int:
    return -(-count // THREADS) * THREADS


def describe(operands: Sequence[Any], shapes: Sequence[tuple[int, int]]) -> tuple[jax.Array, jax.Array]:
    """Maps and addresses of operands.

    Args:
      operands: arrays in GPU memory, or references to them.
      shapes: (rows, columns) of each as a bfloat16 matrix.

    Returns:
      int32 [operands, 32], a tensor map each, with boxes of 64 rows by 64 columns; int32 [operands, 2], the addresses.
    """
    count = len(operands)
    programs = -(-count // copies.MAPS_A_PROGRAM)
    # A matrix that JAX encodes a map of, whose address and sizes are put in anew: one that is there, as another takes a launch.
    matrices = [number for number, operand in enumerate(operands) if len(operand.shape) == 2]
    template = max(matrices, key=lambda number: min(shapes[number]))

    def tensor_maps(*refs: Any) -> None:
        @w.emitted(*[plgpu.RefType()] * (count + 4))
        def emit(context: Any, *refs: Any) -> None:
            given, (sizes, maps, addresses, scratch) = refs[:count], refs[count:]
            copies.write_tensor_maps(context, given[template], given, sizes, maps, addresses, scratch)

        emit(*refs)

    padded = _padded(count)
    call = plgpu.kernel(
        tensor_maps,
        out_type=(
            jax.ShapeDtypeStruct((padded, copies.MAP_BYTES // 4), jnp.int32),
            jax.ShapeDtypeStruct((padded, 2), jnp.int32),
        ),
        grid=(programs,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        scratch_types=[plgpu.SMEM((THREADS * copies.MAP_BYTES // 4,), jnp.int32)],
    )
    sizes = np.zeros((padded, 2), np.int32)
    sizes[:count] = shapes
    return call(*operands, sizes)
