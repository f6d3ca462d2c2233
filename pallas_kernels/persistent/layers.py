"""The op `decode_layers` as one persistent launch: its plan, and what it cannot serve."""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode import Decoded, DecoderLayer
from pallas_kernels.norm import Norm
from pallas_kernels.persistent.building import heads_of, plan_of
from pallas_kernels.persistent.plan import Plan
from pallas_kernels.persistent.steps import HEAD_DIMS, TILE_ROWS
from pallas_kernels.persistent.tensor_maps import described_bytes
from pallas_kernels.persistent.tuning import tuning_for
from pallas_kernels.products import BLOCK_DIAGONAL
from pallas_kernels.projection import PackedProjection
from pallas_kernels.target import Target, target

LARGEST_BATCH = 4
_MOST_QUERIES = 8  # of a kv head, as many as a tensor-core instruction takes


def unavailable(device: Target) -> str | None:
    """Why the kernel cannot run on a device at all."""
    if device.platform != "cuda" or device.capability != (9, 0):
        return f"written for Hopper (compute capability 9.0), not {device.kind or device.platform}"
    if any(name.startswith("CUDA_MPS_") for name in os.environ):
        return "under MPS (CUDA_MPS_* is set) nothing promises that all its blocks run at once"
    return "Mosaic GPU's interpreter has no words in GPU memory" if device.interpret else None


def refuses(
    x: jax.Array, layers: Sequence[DecoderLayer], norm: Norm, head: PackedProjection, keys: Sequence[jax.Array],
    values: Sequence[jax.Array], cos: jax.Array, sin: jax.Array, start: jax.Array,
) -> str | None:  # fmt: skip
    """Why the kernel cannot serve a call."""
    batch, tokens, _ = x.shape
    packed = [part for layer in layers for part in (layer.qkv, layer.o, layer.gate_up, layer.down)] + [head]
    biases = [layer.qkv.biases for layer in layers]
    if tokens != 1 or batch > LARGEST_BATCH:
        return f"{batch} sequences of {tokens} tokens; it serves up to {LARGEST_BATCH} of one"
    if any(a.dtype != jnp.bfloat16 for a in jax.tree.leaves((x, layers, norm, head, keys, values))):
        return "a dtype other than bfloat16"
    if keys[0].shape[-1] not in HEAD_DIMS:
        return f"heads of {keys[0].shape[-1]} columns; it serves {', '.join(map(str, HEAD_DIMS))}"
    if len({cache.shape for cache in (*keys, *values)}) > 1:
        return "caches of different shapes"
    if keys[0].shape[2] % TILE_ROWS:
        return f"a cache of {keys[0].shape[2]} slots, no multiple of {TILE_ROWS}"
    if heads_of(layers[0], keys)[0] > _MOST_QUERIES * keys[0].shape[1]:
        return f"more than {_MOST_QUERIES} queries a kv head"
    if any(layer.gate != "silu" for layer in layers):
        return "an activation other than silu"
    if any(b is not None for part in packed if not any(part is layer.qkv for layer in layers) for b in part.biases):
        return "biases of other projections than q, k and v"
    if len({tuple(b is None for b in each) for each in biases}) > 1 or len({b is None for b in biases[0]}) > 1:
        return "biases of some of q, k and v"
    if any(len({up is None for up in part.ups}) > 1 for part in packed):
        return "dense and low-rank members of one input"
    if any((layer.q_norm is None) != (layer.k_norm is None) for layer in layers):
        return "a norm of queries or of keys alone"
    if any(up is not None and up.ndim != 2 for part in packed for up in part.ups):
        return BLOCK_DIAGONAL
    norms = [
        n for layer in layers for n in (layer.input_norm, layer.mlp_norm, layer.q_norm, layer.k_norm) if n is not None
    ]
    if len({n.eps for n in [*norms, norm]}) > 1:
        return "norms of different eps"
    if len({_structure(layer) for layer in layers}) > 1:
        return "layers that differ in which sites are dense, in their outputs, or in having norms of queries and keys"
    weights = [weight for part in packed for weight in (part.first, *part.ups) if weight is not None]
    if any(weight.shape[1] % 8 for weight in weights):
        return "a contraction axis that is no multiple of 8"
    return _plan(x, layers, norm, head, keys, values)[0].problems()


def run(
    x: jax.Array, layers: Sequence[DecoderLayer], norm: Norm, head: PackedProjection, keys: tuple[jax.Array, ...],
    values: tuple[jax.Array, ...], cos: jax.Array, sin: jax.Array, start: jax.Array,
) -> Decoded:  # fmt: skip
    """As `pallas_kernels.decode_layers`. The residual stream is kept in nearly float32, and rounded nowhere."""
    from pallas_kernels.persistent.kernel import run_layers
    from pallas_kernels.persistent.tensor_maps import describe

    batch, _, width = x.shape
    plan, operands = _plan(x, layers, norm, head, keys, values)
    # One reference for both kernels, so that the cache of which the first tells the address is the one that the second changes.
    caches = [jax.new_ref(array) for array in (*keys, *values)]
    of_cache = {id(array): ref for array, ref in zip((*keys, *values), caches, strict=True)}
    given = [of_cache.get(id(array), array) for array in operands]
    maps, addresses = describe(given, [_as_matrix(a) for a in operands])
    tables = [table.reshape(batch, -1) for table in (cos, sin)]
    start = jnp.broadcast_to(start, (batch,))
    logits, stall = run_layers(plan, maps, addresses, x.reshape(batch, width), tables, start, given, norm.eps)
    new = [ref[...] for ref in caches]
    return Decoded(logits, tuple(new[: len(keys)]), tuple(new[len(keys) :]), stall)


def workspace(
    x: jax.Array, layers: Sequence[DecoderLayer], norm: Norm, head: PackedProjection, keys: Sequence[jax.Array],
    values: Sequence[jax.Array], cos: jax.Array, sin: jax.Array, start: jax.Array,
) -> int:  # fmt: skip
    """Bytes of the words, and of the operands' tensor maps and addresses. Weights and caches are used as they are."""
    plan, operands = _plan(x, layers, norm, head, keys, values)
    return 4 * plan.words + described_bytes(len(operands))


def _plan(
    x: jax.Array, layers: Sequence[DecoderLayer], norm: Norm, head: PackedProjection, keys: Sequence[jax.Array],
    values: Sequence[jax.Array],
) -> tuple[Plan, list[jax.Array]]:  # fmt: skip
    """For the GPU in use."""
    device = target()
    return plan_of(x, layers, norm, head, keys, values, device.cores, tuning_for(device.kind))


def _structure(layer: DecoderLayer) -> Any:
    parts = (layer.qkv, layer.o, layer.gate_up, layer.down)
    ups = tuple(tuple(up is None for up in part.ups) for part in parts)
    return ups, tuple(part.d_outs for part in parts), layer.q_norm is None


def _as_matrix(array: jax.Array) -> tuple[int, int]:
    return math.prod(array.shape[:-1]), array.shape[-1]
