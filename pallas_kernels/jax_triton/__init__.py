"""The matrix-vector product of decoding through jax-triton, the successor of the Pallas-Triton lowering: an example, and a way out.

Nothing here is used unless asked for: `register` adds it to the op `project`, and even then it serves only the calls that name it,
``project(x, packed, implementation="jax_triton")`` or those inside ``prefer("jax_triton")``. Importing this needs no jax-triton.
"""

from pallas_kernels.jax_triton.implementation import NAME, register
from pallas_kernels.jax_triton.matrix_vector import matrix_vector, missing

__all__ = ["NAME", "matrix_vector", "missing", "register"]
