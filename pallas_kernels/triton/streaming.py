"""The op `attend_padded` in Pallas-Triton, from rank space: only latents are read and only the result is written."""

import jax

from pallas_kernels.attention import Visible
from pallas_kernels.products import SUPPORTED_DTYPES, project
from pallas_kernels.projection import PackedProjection, groups_of
from pallas_kernels.target import target
from pallas_kernels.triton import stream_costs
from pallas_kernels.triton.call import Launch
from pallas_kernels.triton.flash import flash_plan, visibility
from pallas_kernels.triton.flash_programs import pieces
from pallas_kernels.triton.stream_costs import AttentionCall
from pallas_kernels.triton.streaming_programs import Latent, StreamingPlan, streaming_program

LARGEST_RANK = 128
"""Of a head. Beyond, a tile of rank space is no smaller than one of the head, and a program's registers no longer hold its sums."""

Tables = tuple[jax.Array, jax.Array]


def refuses(
    x: jax.Array, qkv: PackedProjection, visible: Visible, *, head_dim: int, tables: Tables | None = None
) -> str | None:
    """Why this kernel cannot serve a call."""
    if any(up is None for up in qkv.ups):
        return "a dense projection, which has no rank space"
    if x.dtype not in SUPPORTED_DTYPES or any(a.dtype != x.dtype for a in (qkv.first, *qkv.ups) if a is not None):
        return f"x is {x.dtype} and a weight {qkv.first.dtype}; it serves one of bfloat16, float16, float32"
    ranks = [latent.rank for latent in _latents(qkv)]
    if max(ranks) > LARGEST_RANK:
        return f"ranks {', '.join(map(str, ranks))} of a head; it streams up to {LARGEST_RANK}"
    if visible.causal and visible.start is not None:
        return "queries that are not the first tokens"
    if head_dim > 128 or (tables is not None and len(pieces(head_dim // 2)) > 1):
        return f"head_dim {head_dim}; it serves up to 128, and powers of two where heads are rotated"
    heads = [d_out // head_dim for d_out in qkv.d_outs]
    for up, count in zip(qkv.ups, heads, strict=True):
        if up is not None and up.ndim == 3 and groups_of(up) != count:
            return f"a second factor of {groups_of(up)} groups for {count} heads"
    return None


def slower(
    x: jax.Array, qkv: PackedProjection, visible: Visible, *, head_dim: int, tables: Tables | None = None
) -> str | None:
    """Why products would serve a call sooner, or None."""
    batch, tokens, width = x.shape
    call = AttentionCall.of((batch, tokens, width), qkv, visible, head_dim, tables is not None)
    return stream_costs.slower(call) if x.dtype.itemsize == 2 else None


def attend_padded(
    x: jax.Array, qkv: PackedProjection, visible: Visible, *, head_dim: int, tables: Tables | None = None
) -> jax.Array:
    """As `pallas_kernels.attend_padded`."""
    (latents,) = project(x, PackedProjection(qkv.first, (None,), (None,), (0,), (qkv.first.shape[0],)))
    batch, tokens, _ = x.shape
    heads, kv_heads, _ = (d_out // head_dim for d_out in qkv.d_outs)
    q, k, v = _latents(qkv)
    query_tile, key_tile, warps, stages = _sizes(max(q.rank, k.rank, v.rank), x.dtype.itemsize, tables is not None)
    flash = flash_plan(visible, heads, kv_heads, head_dim, tokens, tokens, query_tile, key_tile)
    plan = StreamingPlan(flash, q, k, v, tables is not None)
    ups = [up.reshape(-1, head_dim, up.shape[-1]) for up in qkv.ups if up is not None]
    q_bias, k_bias, v_bias = qkv.biases
    # Without rotation the keys' bias adds the same to all scores of a query.
    biases = [b for b in (q_bias, None if tables is None else k_bias, v_bias) if b is not None]
    (out,) = Launch(
        streaming_program,
        (("plan", plan),),
        name="stream",
        grid=(flash.query_tiles * heads * batch,),
        outputs=(jax.ShapeDtypeStruct((batch, tokens, heads * head_dim), x.dtype),),
        warps=warps,
        stages=stages,
    )(latents, *ups, *visibility(visible), *biases, *(tables or ()))
    return out


def _latents(qkv: PackedProjection) -> list[Latent]:
    return [
        Latent(start, up.shape[-1], up.ndim == 3, bias is not None)
        for up, start, bias in zip(qkv.ups, qkv.starts, qkv.biases, strict=True)
        if up is not None
    ]


def _sizes(rank: int, itemsize: int, rotary: bool) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps, and tiles of keys in flight: the best of a sweep on an H200, see bench/NOTES.md."""
    query_tile, key_tile, warps, stages = (32, 32, 4, 1) if itemsize == 4 else (64, 64, 4, 2 if rotary else 3)
    while stages > 1 and itemsize * 2 * rank * (query_tile + 2 * stages * key_tile) > target().shared_memory:
        stages -= 1
    return query_tile, key_tile, warps, stages
