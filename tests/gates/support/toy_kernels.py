"""Small Pallas kernels with known faults, to see that the gates notice them."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.jax_triton import matrix_vector


def double(x: jax.Array) -> jax.Array:
    """2 * x [rows, columns] of bfloat16, four rows a block of 64 threads: nothing is wrong with it."""
    rows, columns = x.shape

    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] * 2

    block = pl.BlockSpec((4, columns), lambda i: (i, 0))
    options = plt.CompilerParams(num_warps=2, num_stages=1)
    return pl.pallas_call(
        kernel,
        out_shape=x,
        grid=(rows // 4,),
        in_specs=[block],
        out_specs=block,
        compiler_params=options,
        name="double",
    )(x)


def multiply(a: jax.Array, b: jax.Array, *, tile: int, warps: int = 4) -> jax.Array:
    """a @ b of bfloat16 squares in one tile a block: large tiles ask for more shared memory or registers than there are."""
    size = a.shape[0]

    def kernel(a_ref, b_ref, c_ref):
        def step(i, total):
            part = pl.ds(i * tile, tile)
            return total + jnp.dot(a_ref[:, part], b_ref[part, :], preferred_element_type=jnp.float32)

        zeros = jnp.zeros((tile, tile), jnp.float32)
        c_ref[...] = jax.lax.fori_loop(0, size // tile, step, zeros).astype(c_ref.dtype)

    return pl.pallas_call(
        kernel,
        out_shape=a,
        grid=(size // tile, size // tile),
        in_specs=[pl.BlockSpec((tile, size), lambda i, j: (i, 0)), pl.BlockSpec((size, tile), lambda i, j: (0, j))],
        out_specs=pl.BlockSpec((tile, tile), lambda i, j: (i, j)),
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=2),
        name="multiply",
    )(a, b)


def double_in_a_loop(x: jax.Array, steps: jax.Array) -> jax.Array:
    """Several kernels a turn of a loop, so that XLA forms a command buffer of them."""

    def turn(_, x):
        for _ in range(6):
            x = double(x)
        return x

    return jax.lax.fori_loop(0, steps, turn, x)


def search_in_a_loop(x: jax.Array, steps: jax.Array) -> jax.Array:
    """An inner loop, which no command buffer takes, between kernels: a turn is more than one thing for the host to do."""

    def turn(_, x):
        x = double(x)
        x = jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: double(x) + jnp.sum(x), x)
        return double(x)

    return jax.lax.fori_loop(0, steps, turn, x)


def low_rank_in_a_loop(x: jax.Array, down: jax.Array, up: jax.Array, steps: jax.Array) -> jax.Array:
    """Three low-rank products a turn through jax-triton, whose kernels are calls of a library to XLA."""

    def turn(_, x):
        return functools.reduce(lambda x, _: matrix_vector(matrix_vector(x, down), up), range(3), x)

    return jax.lax.fori_loop(0, steps, turn, x)
