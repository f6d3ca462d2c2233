"""The op `decode_layers` as one persistent launch: its plan, and what it cannot serve."""

import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode import Carried, Decoded, DecoderLayer, newly_carried
from pallas_kernels.norm import LayerNorm, Norm
from pallas_kernels.persistent.building import heads_of, plan_of
from pallas_kernels.persistent.gates import ACTIVATIONS
from pallas_kernels.persistent.kept import Kept
from pallas_kernels.persistent.plan import Plan
from pallas_kernels.persistent.steps import HEAD_DIMS, TILE_ROWS, Phase
from pallas_kernels.persistent.tensor_maps import described_bytes
from pallas_kernels.persistent.tuning import Tuning, tuning_for
from pallas_kernels.products import BLOCK_DIAGONAL
from pallas_kernels.projection import PackedProjection
from pallas_kernels.registry import layer_kinds
from pallas_kernels.target import Target, target

LARGEST_BATCH = 8  # sequences that one tensor-core instruction takes
MOST_FETCHED = 32 * 2**20  # bytes that are brought into the second-level cache for the next step
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
    values: Sequence[jax.Array], cos: jax.Array, sin: jax.Array, start: jax.Array, carried: Carried | None = None,
) -> str | None:  # fmt: skip
    """Why the kernel cannot serve a call."""
    batch, tokens, _ = x.shape
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
    other = _other_form(layers, norm, 2 * cos.shape[-1], keys[0].shape[-1])
    reason = other or _refused_structure(layers, norm, head)
    return reason or plan_here(x, layers, norm, head, keys, values)[0].problems()


def _refused_structure(layers: Sequence[DecoderLayer], norm: Norm, head: PackedProjection) -> str | None:
    """Why the kernel cannot serve layers that are built as these are."""
    packed = [part for layer in layers for part in _projections(layer)] + [head]
    gates = sorted({layer.gate for layer in layers})
    if not set(gates) <= ACTIVATIONS.keys():
        return f"a gate of {' and '.join(gates)}; it serves {', '.join(ACTIVATIONS)}"
    if len(gates) > 1:
        return f"layers of different gates: {' and '.join(gates)}"
    if head.biases != (None,):
        return "a bias of the head"
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
        return "layers that differ in their outputs, in having biases, or in having norms of queries and keys"
    weights = [weight for part in packed for weight in (part.first, *part.ups) if weight is not None]
    if any(weight.shape[1] % 8 for weight in weights):
        return "a contraction axis that is no multiple of 8"
    return None


def _other_form(layers: Sequence[DecoderLayer], norm: Norm, rotated: int, head_dim: int) -> str | None:
    """What a decoder has that one of Llama's form does not, or None."""
    given = [norm, *(n for layer in layers for n in (layer.input_norm, layer.mlp_norm, layer.q_norm, layer.k_norm))]
    norms = [n for n in given if n is not None]
    if any(isinstance(n, LayerNorm) for n in norms):
        return "LayerNorms"
    if any(n.offset for n in norms):
        return "norms with an offset to their scale"
    if any(layer.attention_out_norm is not None or layer.mlp_out_norm is not None for layer in layers):
        return "norms over what is added to the residual stream"
    if any(len(layer.gate_up.widths) != 2 for layer in layers):
        return "an MLP without a gate"
    if any(layer.scale is not None or layer.softcap is not None for layer in layers):
        return "scores scaled otherwise than by 1 / sqrt(head_dim), or bounded"
    if rotated != head_dim or any(layer.rotation for layer in layers):
        return "rotations that differ between layers, or of other than all columns of a head"
    return None


def begin(
    x: jax.Array, layers: Sequence[DecoderLayer], norm: Norm, head: PackedProjection, keys: tuple[jax.Array, ...],
    values: tuple[jax.Array, ...], cos: jax.Array, sin: jax.Array, start: jax.Array,
) -> tuple[Carried, tuple[jax.Array, ...], tuple[jax.Array, ...]]:  # fmt: skip
    """As `pallas_kernels.begin_decoding`: words of no epoch, and tensor maps of weights and caches where they are."""
    from pallas_kernels.persistent.tensor_maps import describe

    plan, operands = plan_here(x, layers, norm, head, keys, values)
    caches = _Caches(keys, values)
    maps, addresses = describe(caches.among(operands), [_as_matrix(a) for a in operands])
    kept = Kept(jnp.zeros((plan.kept_integers,), jnp.int32), maps, addresses)
    return newly_carried(kept), *caches.arrays()


def run(
    x: jax.Array, layers: Sequence[DecoderLayer], norm: Norm, head: PackedProjection, keys: tuple[jax.Array, ...],
    values: tuple[jax.Array, ...], cos: jax.Array, sin: jax.Array, start: jax.Array, carried: Carried | None = None,
) -> Decoded:  # fmt: skip
    """As `pallas_kernels.decode_layers`. The residual stream is kept in nearly float32, and rounded nowhere."""
    from pallas_kernels.persistent.kernel import run_layers

    if carried is None:
        carried, keys, values = begin(x, layers, norm, head, keys, values, cos, sin, start)
    batch, _, width = x.shape
    plan, operands = plan_here(x, layers, norm, head, keys, values)
    caches = _Caches(keys, values)
    tables = [table.reshape(batch, -1) for table in (cos, sin)]
    # XLA makes slices part of a launch (jax 0.11.2), and then forgets which operands it changes.
    x, tables, start = jax.lax.optimization_barrier(
        (x.reshape(batch, width), tables, jnp.broadcast_to(start, (batch,)))
    )
    first, given = read_first(plan, operands), caches.among(operands)
    logits, carried = run_layers(plan, carried, x, tables, start, given, first, norm.eps)
    return Decoded(logits, *caches.arrays(), carried)


class _Caches:
    """References to the caches, which kernels change, or whose addresses they tell.

    A kernel that only tells them is given references, too: they are changed as it were, so that XLA has each in one place from
    there on, and copies it before if it has to.
    """

    def __init__(self, keys: Sequence[jax.Array], values: Sequence[jax.Array]):
        self._layers = len(keys)
        self._refs = {id(array): jax.new_ref(array) for array in (*keys, *values)}

    def among(self, operands: Sequence[jax.Array]) -> list[Any]:
        """Operands, references in place of caches."""
        return [self._refs.get(id(array), array) for array in operands]

    def arrays(self) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """Keys and values as they are now."""
        now = [ref[...] for ref in self._refs.values()]
        return tuple(now[: self._layers]), tuple(now[self._layers :])


def gains_by_absorbing(layers: Sequence[DecoderLayer], batch: int) -> bool:
    """Whether a step of so many sequences is faster where layers have `DecoderLayer.o_gate_up`, as these have; shapes suffice."""
    most = _tuning_here(layers, batch).absorbed_bytes
    has_all = all(layer.o_gate_up is not None for layer in layers)
    return has_all and _absorbed_bytes(layers) <= most * len(layers)


def read_first(plan: Plan, operands: Sequence[jax.Array]) -> list[int]:
    """Numbers of the operands of the first phases, as many as the cache that all cores share holds beside what else is in it."""
    found, left = [], MOST_FETCHED
    for step in plan.steps[: plan.in_layer]:
        for number in dict.fromkeys(group.weight for group in step.layers[0]) if isinstance(step, Phase) else ():
            left -= operands[number].size * operands[number].dtype.itemsize
            if left < 0:
                return found
            found.append(number)
    return found


def workspace(
    x: jax.Array, layers: Sequence[DecoderLayer], norm: Norm, head: PackedProjection, keys: Sequence[jax.Array],
    values: Sequence[jax.Array], cos: jax.Array, sin: jax.Array, start: jax.Array,
) -> int:  # fmt: skip
    """Bytes of the words, of the operands' tensor maps and addresses, and of what is absorbed. Weights and caches are used as they
    are."""
    plan, operands = plan_here(x, layers, norm, head, keys, values)
    return 4 * plan.kept_integers + described_bytes(len(operands)) + _absorbed_bytes(layers)


def plan_here(*arguments: Any) -> tuple[Plan, list[jax.Array]]:
    """For the GPU in use, as `building.plan_of`: its arguments are all but the last two."""
    leaves, tree = jax.tree.flatten(arguments)
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    plan, operands = _plan_of_shapes(tree, shapes, target().cores, _tuning_here(arguments[1], arguments[0].shape[0]))
    return plan, [leaves[number] for number in operands]


def _tuning_here(layers: Sequence[DecoderLayer], batch: int) -> Tuning:
    """For the GPU in use; shapes suffice."""
    bytes_ = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers))
    return tuning_for(target().kind, batch, bytes_ // (10**6 * len(layers)), layer_kinds(layers) > 1)


@functools.lru_cache(maxsize=8)
def _plan_of_shapes(
    tree: Any, shapes: tuple[tuple[tuple[int, ...], Any], ...], cores: int, tuning: Tuning
) -> tuple[Plan, list[int]]:
    """A plan, and its operands as numbers of leaves. It is asked for by who chooses a kernel, by who runs it, and again."""
    leaves = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    x, layers, norm, head, keys, values = jax.tree.unflatten(tree, leaves)
    plan, operands = plan_of(x, layers, norm, head, keys, values, cores, tuning)
    number = {id(leaf): index for index, leaf in enumerate(leaves)}
    return plan, [number[id(operand)] for operand in operands]


def forget_plans() -> None:
    """Has plans made anew, by who changes how they are made."""
    _plan_of_shapes.cache_clear()


def _absorbed_bytes(layers: Sequence[DecoderLayer]) -> int:
    absorbed = [layer.o_gate_up for layer in layers if layer.o_gate_up is not None]
    return sum(array.size * array.dtype.itemsize for array in absorbed)


def _projections(layer: DecoderLayer) -> tuple[PackedProjection, ...]:
    return layer.qkv, layer.o, layer.gate_up, layer.down


def _structure(layer: DecoderLayer) -> Any:
    parts = _projections(layer)
    biases = tuple(tuple(bias is None for bias in part.biases) for part in parts)
    return biases, tuple(part.d_outs for part in parts), layer.q_norm is None


def _as_matrix(array: jax.Array) -> tuple[int, int]:
    return math.prod(array.shape[:-1]), array.shape[-1]
