"""The plan of a step of decoding, built from the arguments of the op `decode_layers`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels.decode import DecoderLayer
from pallas_kernels.norm import Norm
from pallas_kernels.persistent.plan import Plan, parts_for, splits_for
from pallas_kernels.persistent.sources import Output, Source
from pallas_kernels.persistent.splitting import split_by_cost
from pallas_kernels.persistent.steps import MOST_PARTS, TILE_ROWS, Attention, Collect, Group, Keep, Phase, Step
from pallas_kernels.persistent.tuning import Tuning
from pallas_kernels.projection import PackedProjection

DEFAULT = Tuning()
_SHORTEST = 8  # contraction axis that anything may have


def heads_of(layer: DecoderLayer, keys: Sequence[jax.Array]) -> tuple[int, int]:
    """Numbers of heads and of kv heads."""
    return layer.qkv.d_outs[0] // keys[0].shape[-1], keys[0].shape[1]


@dataclasses.dataclass
class _Builder:
    """Phases so far, and the operands of every layer that they name by number."""

    programs: int
    tuning: Tuning
    operands: list[list[jax.Array]]
    steps: list[Step] = dataclasses.field(default_factory=list)

    def operand(self, of_layers: Sequence[jax.Array]) -> int:
        """One more operand in every layer; gives its number."""
        for operands, array in zip(self.operands, of_layers, strict=True):
            operands.append(array)
        return len(self.operands[0]) - 1

    def project(
        self, name: str, packed: Sequence[PackedProjection], source: Source, together: int = 1
    ) -> tuple[Output, ...]:
        """Adds the phases of a projection, so many of whose members are read together; gives what its members put out.

        One phase if all members are dense in every layer. Else two: in a layer in which a member is dense it has no rows in the
        second, and is read from the first.
        """
        first = self.operand([p.first for p in packed])
        if all(up is None for p in packed for up in p.ups):
            groups = [
                [
                    Group(first, width, p.first.shape[1], row_start=begin)
                    for begin, width in zip(p.starts, p.widths, strict=True)
                ]
                for p in packed
            ]
            return self._outputs(packed, [self._add(name, groups, source, together)])
        down = self.whole(f"{name} down", first, [p.first for p in packed], source, together)
        return self.second(name, packed, [down], together)[0]

    def whole(
        self, name: str, operand: int, of_layers: Sequence[jax.Array], source: Source, together: int = 1
    ) -> Output:
        """Adds a phase of one operand that all rows of are read; gives its output."""
        step = self._add(name, [[Group(operand, *array.shape)] for array in of_layers], source, together)
        return _in_all_layers(step, of_layers)

    def second(
        self, name: str, packed: Sequence[PackedProjection], latents: Sequence[Output], together: int = 1,
        beside: Sequence[jax.Array] = (), divided_by: int | None = None,
    ) -> tuple[tuple[Output, ...], Output | None]:  # fmt: skip
        """Adds the phase of a projection's second factors, of the sum of ``latents``; the last of these has its dense members.

        Args:
          name, packed, together: as for `project`.
          latents: what its first factors put out.
          beside: of each layer, what is done in the same phase, of all latents; none if not given.
          divided_by: as `Source` has it.

        Returns:
          What its members put out, and what comes of ``beside``.
        """
        count = range(len(packed[0].ups))
        # A dense member names an operand all the same, of which it has no rows.
        ups = [self.operand([p.first if p.ups[i] is None else p.ups[i] for p in packed]) for i in count]  # pyright: ignore
        groups = [
            [
                Group(ups[i], 0, _SHORTEST)
                if p.ups[i] is None
                else Group(ups[i], p.d_outs[i], p.widths[i], 0, p.starts[i])
                for i in count
            ]
            for p in packed
        ]
        if beside:
            operand = self.operand(beside)
            groups = [[*of_layer, Group(operand, *array.shape)] for of_layer, array in zip(groups, beside, strict=True)]
        step = self._add(f"{name} up", groups, Source("sum", tuple(latents), divided_by=divided_by), together)
        found = self._outputs(packed, [latents[-1].steps[0], step])
        return found, _in_all_layers(step, beside, len(count), self.phase(step)) if beside else None

    def _outputs(self, packed: Sequence[PackedProjection], phases: Sequence[int]) -> tuple[Output, ...]:
        """Of the members of a projection with these phases."""
        starts, found = [TILE_ROWS * tile for tile in self.phase(phases[-1]).tile_starts], []
        for i, bias in enumerate(packed[0].biases):
            lies = [
                (phases[0], 0, p.starts[i]) if len(phases) > 1 and p.ups[i] is None else (phases[-1], i, starts[i])
                for p in packed
            ]
            number = None if bias is None else self.operand([p.biases[i] for p in packed])  # pyright: ignore
            steps, groups, begins = zip(*lies, strict=True)
            found.append(Output(steps, groups, begins, number))
        return tuple(found)

    def _add(self, name: str, groups: Sequence[Sequence[Group]], source: Source, together: int) -> int:
        """Adds a phase. All programs read a part of its output, but where that is attention, which reads a few columns at most."""
        for_all = name not in ("qkv", "qkv up")
        phase = Phase(name, tuple(map(tuple, groups)), source, most_parts=MOST_PARTS // together)
        longest = max(group.k for layer in groups for group in layer)
        splits = splits_for(phase.padded_rows, longest, self.programs, self.tuning)
        phase = dataclasses.replace(phase, splits=splits)
        whole = phase.row_tiles_each(self.programs) >= self.tuning.whole_row_tiles
        whole |= phase.longer_if_whole(self.programs) <= (self.tuning.uneven_tiles if for_all else 0)
        phase = dataclasses.replace(phase, whole=whole)
        self.steps.append(dataclasses.replace(phase, pieces=phase.most_pieces(self.programs)))
        return len(self.steps) - 1

    def phase(self, step: int) -> Phase:
        """One of the phases so far."""
        found = self.steps[step]
        assert isinstance(found, Phase)
        return found


def _in_all_layers(step: int, layers: Sequence[Any], group: int = 0, phase: Phase | None = None) -> Output:
    """What a group of a phase puts out; the first if the phase is not given."""
    begin = TILE_ROWS * phase.tile_starts[group] if phase is not None else 0
    return Output((step,) * len(layers), (group,) * len(layers), (begin,) * len(layers))


def plan_of(
    x: jax.Array, layers: Sequence[DecoderLayer], norm: Norm, head: PackedProjection, keys: Sequence[jax.Array],
    values: Sequence[jax.Array], cores: int, tuning: Tuning = DEFAULT,
) -> tuple[Plan, list[jax.Array]]:  # fmt: skip
    """The plan of a step on a device of so many cores, and all operands in the order in which it counts them.

    Arguments are those of `decode_layers`; arrays may be shapes alone.
    """
    batch, _, width = x.shape
    build = _Builder(cores, tuning, [[] for _ in layers])
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
    build: _Builder,
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
    build: _Builder, layers: Sequence[DecoderLayer], attention: Attention, width: int
) -> tuple[tuple[Output, ...], int]:
    """Adds attention, its projection, then gate and up. Gives the outputs of these, and the number of the step that has the stream
    before the MLP."""
    build.steps.append(attention)
    o = build.project("o", [layer.o for layer in layers], Source("attended", attention=len(build.steps) - 1))
    scale, middle = build.operand([layer.mlp_norm.scale for layer in layers]), len(build.steps)
    source = Source("stream", o, stream=0, scale=scale)
    return build.project("gate_up", [layer.gate_up for layer in layers], source, 2), middle


def _through_latents(
    build: _Builder, layers: Sequence[DecoderLayer], attention: Attention, width: int
) -> tuple[tuple[Output, ...], int]:
    """The same where `DecoderLayer.o_gate_up` is there: gate and up's first factors are of the stream before attention, and are
    multiplied while words of attention are on their way; what attention adds to them comes of its projection's latents. So there
    is one input less to wait for. The norm's divisor, of the whole stream, is not known before the second factors are done."""
    o, gate_up = ([getattr(layer, name) for layer in layers] for name in ("o", "gate_up"))
    build.steps.append(attention)
    scale = build.operand([layer.mlp_norm.scale for layer in layers])
    of_stream = build.whole(
        "gate_up ahead", build.operand([p.first for p in gate_up]), [p.first for p in gate_up],
        Source("kept", stream=0, scale=scale), 2,
    )  # fmt: skip
    source = Source("attended", attention=len(build.steps) - 2)
    latents = build.whole("o down", build.operand([p.first for p in o]), [p.first for p in o], source)
    added, of_attention = build.second(
        "o", o, [latents], 1, [layer.o_gate_up for layer in layers if layer.o_gate_up is not None]
    )
    assert of_attention is not None
    middle = len(build.steps) + 1
    gated, _ = build.second("gate_up", gate_up, [of_stream, of_attention], 2, divided_by=middle)
    build.steps.append(Keep("stream", Source("stream", added, stream=0), attention.batch, width))
    return gated, middle


def _attention(
    build: _Builder, layers: Sequence[DecoderLayer], keys: Sequence[jax.Array], values: Sequence[jax.Array], batch: int,
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


def _norms(build: _Builder, layers: Sequence[DecoderLayer]) -> tuple[int, int] | None:
    q = [layer.q_norm.scale for layer in layers if layer.q_norm is not None]
    k = [layer.k_norm.scale for layer in layers if layer.k_norm is not None]
    return (build.operand(q), build.operand(k)) if q else None
