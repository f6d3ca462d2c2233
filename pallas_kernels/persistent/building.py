"""The plan of a step of decoding, built from the arguments of the op `decode_layers`."""

import dataclasses
from collections.abc import Sequence

import jax

from pallas_kernels.decode import DecoderLayer
from pallas_kernels.norm import Norm
from pallas_kernels.persistent.phases import Phases
from pallas_kernels.persistent.plan import Plan, parts_for
from pallas_kernels.persistent.sources import Output, Source
from pallas_kernels.persistent.splitting import split_by_cost
from pallas_kernels.persistent.steps import Attention, Collect, Keep
from pallas_kernels.persistent.tuning import Tuning
from pallas_kernels.projection import PackedProjection

DEFAULT = Tuning()


def heads_of(layer: DecoderLayer, keys: Sequence[jax.Array]) -> tuple[int, int]:
    """Numbers of heads and of kv heads."""
    return layer.qkv.d_outs[0] // keys[0].shape[-1], keys[0].shape[1]


def plan_of(
    x: jax.Array, layers: Sequence[DecoderLayer], norm: Norm, head: PackedProjection, keys: Sequence[jax.Array],
    values: Sequence[jax.Array], cores: int, tuning: Tuning = DEFAULT,
) -> tuple[Plan, list[jax.Array]]:  # fmt: skip
    """The plan of a step on a device of so many cores, and all operands in the order in which it counts them.

    Arguments are those of `decode_layers`; arrays may be shapes alone.
    """
    batch, _, width = x.shape
    build = Phases(cores, tuning, [[] for _ in layers])
    (mlp,), middle = _layer_steps(build, layers, keys, values, batch, width)
    in_layer, count = len(build.steps), len(build.operands[0])
    of_layers = [array for operands in build.operands for array in operands]
    build.operands = [[]]
    scale = build.operand([norm.scale])
    (logits,) = build.project("head", [head], Source("stream", (mlp,), stream=middle, behind=1, scale=scale))
    build.steps.append(Collect("logits", logits, head.d_outs[0]))
    if tuning.kilobyte_tiles:
        build.steps = split_by_cost(build.steps, in_layer, build.programs, batch, tuning)
    plan = Plan(
        len(layers), tuple(build.steps), in_layer, batch, build.programs, width, keys[0].shape[2], count, tuning
    )
    return plan, [*of_layers, *build.operands[0]]


def _layer_steps(
    build: Phases,
    layers: Sequence[DecoderLayer],
    keys: Sequence[jax.Array],
    values: Sequence[jax.Array],
    batch: int,
    width: int,
) -> tuple[tuple[Output, ...], int]:
    """Adds the steps of a layer. Gives its output, and the number of the step that has the stream before the MLP."""
    # The first stream adds what the last layer leaves, whose phases are not known yet: they are put in below.
    scale = build.operand([layer.input_norm.scale for layer in layers])
    qkv = build.project("qkv", [layer.qkv for layer in layers], Source("stream", behind=1, scale=scale))
    add_rest = _through_latents if all(layer.o_gate_up is not None for layer in layers) else _one_after_the_other
    gated, middle = add_rest(build, layers, _attention(build, layers, keys, values, batch, qkv), width)
    source = Source("gated", gated, activation=layers[0].gate)
    mlp = build.project("down", [layer.down for layer in layers], source)
    first = build.phase(0)
    build.steps[0] = dataclasses.replace(first, source=dataclasses.replace(first.source, of=mlp, stream=middle))
    return mlp, middle


def _one_after_the_other(
    build: Phases, layers: Sequence[DecoderLayer], attention: Attention, width: int
) -> tuple[tuple[Output, ...], int]:
    """Adds attention, its projection, then gate and up. Gives the outputs of these, and the number of the step that has the stream
    before the MLP."""
    build.steps.append(attention)
    o = build.project("o", [layer.o for layer in layers], Source("attended", attention=len(build.steps) - 1))
    scale, middle = build.operand([layer.mlp_norm.scale for layer in layers]), len(build.steps)
    source = Source("stream", o, stream=0, scale=scale)
    return build.project("gate_up", [layer.gate_up for layer in layers], source, 2), middle


def _through_latents(
    build: Phases, layers: Sequence[DecoderLayer], attention: Attention, width: int
) -> tuple[tuple[Output, ...], int]:
    """The same where `DecoderLayer.o_gate_up` is there: gate and up's first factors are of the stream before attention, and are
    multiplied while words of attention are on their way; what attention adds to them comes of its projection's latents. So there
    is one input less to wait for. The norm's divisor, of the whole stream, is not known before the second factors are done."""
    o, gate_up = ([getattr(layer, name) for layer in layers] for name in ("o", "gate_up"))
    build.steps.append(attention)
    scale = build.operand([layer.mlp_norm.scale for layer in layers])
    of_stream = build.whole("gate_up ahead", [p.first for p in gate_up], Source("kept", stream=0, scale=scale), 2)
    source = Source("attended", attention=len(build.steps) - 2)
    latents = build.whole("o down", [p.first for p in o], source)
    added, of_attention = build.second(
        "o", o, [latents], 1, [layer.o_gate_up for layer in layers if layer.o_gate_up is not None]
    )
    assert of_attention is not None
    middle = len(build.steps) + 1
    gated, _ = build.second("gate_up", gate_up, [of_stream, of_attention], 2, divided_by=middle)
    build.steps.append(Keep("stream", Source("stream", added, stream=0), attention.batch, width))
    return gated, middle


def _attention(
    build: Phases, layers: Sequence[DecoderLayer], keys: Sequence[jax.Array], values: Sequence[jax.Array], batch: int,
    qkv: tuple[Output, ...],
) -> Attention:  # fmt: skip
    (heads, kv_heads), (q, k, v) = heads_of(layers[0], keys), qkv
    return Attention(
        name="attention",
        heads=heads,
        kv_heads=kv_heads,
        head_dim=keys[0].shape[-1],
        parts=parts_for(batch, kv_heads, build.programs, build.tuning),
        windows=tuple(layer.window or 0 for layer in layers),
        of=(q, k, v),
        keys=build.operand(keys),
        values=build.operand(values),
        norms=_norms(build, layers),
        batch=batch,
    )


def _norms(build: Phases, layers: Sequence[DecoderLayer]) -> tuple[int, int] | None:
    q = [layer.q_norm.scale for layer in layers if layer.q_norm is not None]
    k = [layer.k_norm.scale for layer in layers if layer.k_norm is not None]
    return (build.operand(q), build.operand(k)) if q else None
