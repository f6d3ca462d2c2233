"""The call of the tile program: what it takes, its tiles, and how it is launched through jax-triton."""

import importlib.util
from importlib import metadata

import jax
import jax.numpy as jnp

from pallas_kernels.products import unsuited

LARGEST_BATCH = 4
_OLDEST_TRITON = (3, 7)


def missing() -> str | None:
    """Why jax-triton cannot be used here, or None where it can."""
    if importlib.util.find_spec("jax_triton") is None:
        return "jax-triton is not installed: pip install 'flashsvd-jax[jax-triton]'"
    if importlib.util.find_spec("triton") is None:
        return "triton, which jax-triton needs, is not installed"
    version = metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_TRITON:
        return f"jax-triton needs triton {'.'.join(map(str, _OLDEST_TRITON))} or newer, not {version}"
    return None


def refusal(batch: int, x_dtype: jnp.dtype, weight: jax.Array) -> str | None:
    """Why the kernel cannot multiply ``batch`` rows by a weight [n, k], or None where it can."""
    if not 1 <= batch <= LARGEST_BATCH:
        return f"{batch} rows; it serves 1 to {LARGEST_BATCH}"
    return unsuited(x_dtype, [weight])


def matrix_vector(x: jax.Array, weight: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """y[b, n] = sum over k of x[b, k] * weight[n, k], accumulated in float32.

    Args:
      x: [batch, k], batch from 1 to 4, k a multiple of 8.
      weight: [n, k] of x's dtype, row-major.
      dtype: of the output; x's own if not given.

    Returns:
      [batch, n].

    Raises:
      ValueError: jax-triton is not installed, or the kernel does not take these shapes.
    """
    reason = missing() or refusal(x.shape[0], x.dtype, weight)
    if reason is not None:
        raise ValueError(f"matrix_vector: {reason}")
    from jax_triton import triton_call  # pyright: ignore[reportAttributeAccessIssue]  (it takes this folder for it)

    from pallas_kernels.jax_triton.tile_program import matrix_vector_program

    (batch, k), n = x.shape, weight.shape[0]
    block_n, block_k, warps = tiles(batch, k, x.dtype.itemsize)
    return triton_call(
        x,
        weight,
        kernel=matrix_vector_program,
        out_type=jax.ShapeDtypeStruct((batch, n), dtype or x.dtype),
        grid=(-(-n // block_n),),
        num_warps=warps,
        num_stages=1,
        B=batch,
        N=n,
        K=k,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
    )


def tiles(batch: int, k: int, itemsize: int) -> tuple[int, int, int]:
    """Weight rows of a program, elements of a step, and warps.

    A step is 16 bytes a thread, so that x meets the weight in registers, of 4 warps or of fewer where k is short.
    """
    warp_step = 32 * 16 // itemsize
    warps = next((count for count in (4, 2) if count * warp_step <= k), 1)
    return 4 if batch == 1 else 2, warps * warp_step, warps
