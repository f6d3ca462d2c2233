"""Tile program: a few rows of x times a weight whose rows are contiguous, by multiply and add. Needs triton to import.

A program owns BLOCK_N rows of the weight and walks the contraction axis in steps of BLOCK_K. It keeps one float32 sum for each
element of a step and each row of x, and adds them up once at the end, so that nothing in the loop waits for another thread.
"""

import triton
import triton.language as tl


@triton.jit
def matrix_vector_program(
    x_ptr,
    w_ptr,
    y_ptr,
    B: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[b, n] = sum over k of x[b, k] * w[n, k], for x [B, K] with B up to 4, w [N, K], y [B, N], each row-major.

    Offsets are 64 bits wide: an output head times its width passes 2**31 elements in large vocabularies.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = w_ptr + n.to(tl.int64)[:, None] * K
    inside_n = n < N
    sum0 = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    sum1 = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    sum2 = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    sum3 = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside_k = k < K
        mask = inside_n[:, None] & inside_k[None, :]
        w = tl.load(row + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        sum0 += w * tl.load(x_ptr + k, mask=inside_k, other=0.0).to(tl.float32)[None, :]
        if B > 1:
            sum1 += w * tl.load(x_ptr + K + k, mask=inside_k, other=0.0).to(tl.float32)[None, :]
        if B > 2:
            sum2 += w * tl.load(x_ptr + 2 * K + k, mask=inside_k, other=0.0).to(tl.float32)[None, :]
        if B > 3:
            sum3 += w * tl.load(x_ptr + 3 * K + k, mask=inside_k, other=0.0).to(tl.float32)[None, :]
    y = y_ptr + n
    out = y_ptr.dtype.element_ty
    tl.store(y, tl.sum(sum0, axis=1).to(out), mask=inside_n)
    if B > 1:
        tl.store(y + N, tl.sum(sum1, axis=1).to(out), mask=inside_n)
    if B > 2:
        tl.store(y + 2 * N, tl.sum(sum2, axis=1).to(out), mask=inside_n)
    if B > 3:
        tl.store(y + 3 * N, tl.sum(sum3, axis=1).to(out), mask=inside_n)
