"""The op `decode_layers` as one persistent launch: its plan, and what it cannot serve."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode import Decoded, DecoderLayer
from pallas_kernels.norm import Norm
from pallas_kernels.persistent.plan import (
    HEAD_DIMS,
    TILE_ROWS,
    Attention,
    Collect,
    Group,
    Phase,
    Plan,
    Source,
    Step,
    parts_for,
    splits_for,
)
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
    if _heads(layers[0], keys)[0] > _MOST_QUERIES * keys[0].shape[1]:
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
    return _plan(x, layers, norm, head, keys, values, target().cores)[0].problems()


def run(
    x: jax.Array, layers: Sequence[DecoderLayer], norm: Norm, head: PackedProjection, keys: tuple[jax.Array, ...],
    values: tuple[jax.Array, ...], cos: jax.Array, sin: jax.Array, start: jax.Array,
) -> Decoded:  # fmt: skip
    """As `pallas_kernels.decode_layers`. The residual stream is kept in nearly float32, and rounded nowhere."""
    from pallas_kernels.persistent.kernel import run_layers
    from pallas_kernels.persistent.tensor_maps import describe

    batch, _, width = x.shape
    plan, operands = _plan(x, layers, norm, head, keys, values, target().cores)
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


def _heads(layer: DecoderLayer, keys: Sequence[jax.Array]) -> tuple[int, int]:
    return layer.qkv.d_outs[0] // keys[0].shape[-1], keys[0].shape[1]


def _structure(layer: DecoderLayer) -> Any:
    parts = (layer.qkv, layer.o, layer.gate_up, layer.down)
    ups = tuple(tuple(up is None for up in part.ups) for part in parts)
    return ups, tuple(part.d_outs for part in parts), layer.q_norm is None


def _as_matrix(array: jax.Array) -> tuple[int, int]:
    return math.prod(array.shape[:-1]), array.shape[-1]


@dataclasses.dataclass
class _Builder:
    """Phases so far, and the operands of every layer that they name by number."""

    programs: int
    operands: list[list[jax.Array]]
    steps: list[Step] = dataclasses.field(default_factory=list)

    def operand(self, of_layers: Sequence[jax.Array]) -> int:
        """One more operand in every layer; gives its number."""
        for operands, array in zip(self.operands, of_layers, strict=True):
            operands.append(array)
        return len(self.operands[0]) - 1

    def project(self, name: str, packed: Sequence[PackedProjection], source: Source) -> int:
        """Adds the phases of a projection; gives the number of the last."""
        if all(up is None for up in packed[0].ups):
            number = self.operand([p.first for p in packed])
            groups = [
                [
                    Group(number, width, p.first.shape[1], row_start=begin)
                    for begin, width in zip(p.starts, p.widths, strict=True)
                ]
                for p in packed
            ]
            return self.phase(name, groups, source)
        number = self.operand([p.first for p in packed])
        groups = [[Group(number, *p.first.shape)] for p in packed]
        first = self.phase(f"{name} down", groups, source)
        numbers = [self.operand([p.ups[i] for p in packed]) for i in range(len(packed[0].ups))]  # pyright: ignore
        groups = [
            [Group(numbers[i], p.d_outs[i], p.widths[i], x_start=p.starts[i]) for i in range(len(numbers))]
            for p in packed
        ]
        scaled = first if source.kind == "stream" else None
        return self.phase(f"{name} up", groups, Source("sum", first, scaled=scaled))

    def phase(self, name: str, groups: Sequence[Sequence[Group]], source: Source) -> int:
        phase = Phase(name, tuple(map(tuple, groups)), source)
        longest = max(group.k for layer in groups for group in layer)
        splits = splits_for(phase.padded_rows, longest, self.programs)
        self.steps.append(dataclasses.replace(phase, splits=splits))
        return len(self.steps) - 1

    def scaled(self, step: int) -> int | None:
        """The step itself if its output is still to be divided by its norm."""
        phase = self.steps[step]
        return step if isinstance(phase, Phase) and phase.source.kind == "stream" else None


def _plan(
    x: jax.Array, layers: Sequence[DecoderLayer], norm: Norm, head: PackedProjection, keys: Sequence[jax.Array],
    values: Sequence[jax.Array], cores: int,
) -> tuple[Plan, list[jax.Array]]:  # fmt: skip
    """The plan, and all operands in the order in which it counts them."""
    batch, _, width = x.shape
    programs = cores // 8 * 8  # a multiple of every number of splits
    build = _Builder(programs, [[] for _ in layers])
    # The first stream adds what the last layer leaves, whose phases are not known yet: their numbers are put in below.
    scale = build.operand([layer.input_norm.scale for layer in layers])
    qkv = build.project("qkv", [layer.qkv for layer in layers], Source("stream", 0, behind=1, scale=scale))
    attention = build.steps[qkv]
    assert isinstance(attention, Phase)
    tiles = [group.row_tiles * TILE_ROWS for group in attention.layers[0]]
    heads, kv_heads = _heads(layers[0], keys)
    build.steps.append(
        Attention(
            "attention",
            heads,
            kv_heads,
            keys[0].shape[-1],
            parts_for(batch, kv_heads, programs),
            tuple(layer.window or 0 for layer in layers),
            qkv,
            (0, tiles[0], tiles[0] + tiles[1]),
            build.scaled(qkv),
            build.operand(keys),
            build.operand(values),
            _norms(build, layers),
            _biases(build, layers),
            batch,
        )
    )
    o = build.project("o", [layer.o for layer in layers], Source("attended", len(build.steps) - 1))
    scale = build.operand([layer.mlp_norm.scale for layer in layers])
    middle = len(build.steps)
    gates = build.project("gate_up", [layer.gate_up for layer in layers], Source("stream", o, stream=0, scale=scale))
    gated = build.steps[gates]
    assert isinstance(gated, Phase)
    half = gated.layers[0][0].row_tiles * TILE_ROWS
    mlp = build.project(
        "down", [layer.down for layer in layers], Source("gated", gates, scaled=build.scaled(gates), half=half)
    )
    first = build.steps[0]
    assert isinstance(first, Phase)
    build.steps[0] = dataclasses.replace(first, source=dataclasses.replace(first.source, of=mlp, stream=middle))
    in_layer, count = len(build.steps), len(build.operands[0])
    of_layers = [array for operands in build.operands for array in operands]
    build.operands = [[]]
    scale = build.operand([norm.scale])
    logits = build.project("head", [head], Source("stream", mlp, stream=middle, behind=1, scale=scale))
    build.steps.append(Collect("logits", logits, head.d_outs[0], build.scaled(logits)))
    plan = Plan(len(layers), tuple(build.steps), in_layer, batch, programs, width, keys[0].shape[2], count)
    return plan, [*of_layers, *build.operands[0]]


def _norms(build: _Builder, layers: Sequence[DecoderLayer]) -> tuple[int, int] | None:
    q = [layer.q_norm.scale for layer in layers if layer.q_norm is not None]
    k = [layer.k_norm.scale for layer in layers if layer.k_norm is not None]
    return (build.operand(q), build.operand(k)) if q else None


def _biases(build: _Builder, layers: Sequence[DecoderLayer]) -> tuple[int, int, int] | None:
    if layers[0].qkv.biases[0] is None:
        return None
    q, k, v = (build.operand([layer.qkv.biases[i] for layer in layers]) for i in range(3))  # pyright: ignore
    return q, k, v
