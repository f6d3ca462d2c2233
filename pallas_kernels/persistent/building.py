"""The plan of a step of decoding, built from the arguments of the op `decode_layers`."""

import dataclasses
from collections.abc import Sequence

import jax

from pallas_kernels.decode import DecoderLayer
from pallas_kernels.norm import Norm
from pallas_kernels.persistent.plan import Plan, parts_for, splits_for
from pallas_kernels.persistent.steps import TILE_ROWS, Attention, Collect, Group, Phase, Source, Step
from pallas_kernels.persistent.tuning import Tuning
from pallas_kernels.projection import PackedProjection

DEFAULT = Tuning()


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
            return self._add(name, groups, source)
        number = self.operand([p.first for p in packed])
        groups = [[Group(number, *p.first.shape)] for p in packed]
        first = self._add(f"{name} down", groups, source)
        numbers = [self.operand([p.ups[i] for p in packed]) for i in range(len(packed[0].ups))]  # pyright: ignore
        groups = [
            [Group(numbers[i], p.d_outs[i], p.widths[i], x_start=p.starts[i]) for i in range(len(numbers))]
            for p in packed
        ]
        scaled = first if source.kind == "stream" else None
        return self._add(f"{name} up", groups, Source("sum", first, scaled=scaled))

    def _add(self, name: str, groups: Sequence[Sequence[Group]], source: Source) -> int:
        phase = Phase(name, tuple(map(tuple, groups)), source)
        longest = max(group.k for layer in groups for group in layer)
        splits = splits_for(phase.padded_rows, longest, self.programs, self.tuning)
        phase = dataclasses.replace(phase, splits=splits)
        phase = dataclasses.replace(phase, whole=phase.row_tiles_each(self.programs) >= self.tuning.whole_row_tiles)
        self.steps.append(dataclasses.replace(phase, pieces=phase.most_pieces(self.programs)))
        return len(self.steps) - 1

    def phase(self, step: int) -> Phase:
        """One of the phases so far."""
        found = self.steps[step]
        assert isinstance(found, Phase)
        return found

    def columns(self, step: int) -> list[int]:
        """Where the groups of a phase begin in its output, which are the same in all layers."""
        tiles = [group.row_tiles for group in self.phase(step).layers[0]]
        return [TILE_ROWS * sum(tiles[:number]) for number in range(len(tiles))]

    def scaled(self, step: int) -> int | None:
        """The step itself if its output is still to be divided by its norm."""
        return step if self.phase(step).source.kind == "stream" else None


def plan_of(
    x: jax.Array, layers: Sequence[DecoderLayer], norm: Norm, head: PackedProjection, keys: Sequence[jax.Array],
    values: Sequence[jax.Array], cores: int, tuning: Tuning = DEFAULT,
) -> tuple[Plan, list[jax.Array]]:  # fmt: skip
    """The plan of a step on a device of so many cores, and all operands in the order in which it counts them.

    Arguments are those of `decode_layers`; arrays may be shapes alone.
    """
    batch, _, width = x.shape
    build = _Builder(cores // 8 * 8, tuning, [[] for _ in layers])  # a multiple of every number of splits
    mlp, middle = _layer_steps(build, layers, keys, values, batch)
    in_layer, count = len(build.steps), len(build.operands[0])
    of_layers = [array for operands in build.operands for array in operands]
    build.operands = [[]]
    scale = build.operand([norm.scale])
    logits = build.project("head", [head], Source("stream", mlp, stream=middle, behind=1, scale=scale))
    build.steps.append(Collect("logits", logits, head.d_outs[0], build.scaled(logits)))
    plan = Plan(
        len(layers), tuple(build.steps), in_layer, batch, build.programs, width, keys[0].shape[2], count, tuning
    )
    return plan, [*of_layers, *build.operands[0]]


def _layer_steps(
    build: _Builder, layers: Sequence[DecoderLayer], keys: Sequence[jax.Array], values: Sequence[jax.Array], batch: int
) -> tuple[int, int]:
    """Adds the steps of a layer. Gives the numbers of its last phase, and of the one that has the stream before the MLP."""
    # The first stream adds what the last layer leaves, whose phases are not known yet: their numbers are put in below.
    scale = build.operand([layer.input_norm.scale for layer in layers])
    qkv = build.project("qkv", [layer.qkv for layer in layers], Source("stream", 0, behind=1, scale=scale))
    build.steps.append(_attention(build, layers, keys, values, batch, qkv))
    o = build.project("o", [layer.o for layer in layers], Source("attended", len(build.steps) - 1))
    scale, middle = build.operand([layer.mlp_norm.scale for layer in layers]), len(build.steps)
    gates = build.project("gate_up", [layer.gate_up for layer in layers], Source("stream", o, stream=0, scale=scale))
    gated = Source("gated", gates, scaled=build.scaled(gates), half=build.columns(gates)[1])
    mlp = build.project("down", [layer.down for layer in layers], gated)
    first = build.phase(0)
    build.steps[0] = dataclasses.replace(first, source=dataclasses.replace(first.source, of=mlp, stream=middle))
    return mlp, middle


def _attention(
    build: _Builder, layers: Sequence[DecoderLayer], keys: Sequence[jax.Array], values: Sequence[jax.Array], batch: int, qkv: int
) -> Attention:  # fmt: skip
    heads, kv_heads = heads_of(layers[0], keys)
    q, k, v = build.columns(qkv)
    return Attention(
        name="attention",
        heads=heads,
        kv_heads=kv_heads,
        head_dim=keys[0].shape[-1],
        parts=parts_for(batch, kv_heads, build.programs, build.tuning),
        windows=tuple(layer.window or 0 for layer in layers),
        of=qkv,
        columns=(q, k, v),
        scaled=build.scaled(qkv),
        keys=build.operand(keys),
        values=build.operand(values),
        norms=_norms(build, layers),
        biases=_biases(build, layers),
        batch=batch,
    )


def _norms(build: _Builder, layers: Sequence[DecoderLayer]) -> tuple[int, int] | None:
    q = [layer.q_norm.scale for layer in layers if layer.q_norm is not None]
    k = [layer.k_norm.scale for layer in layers if layer.k_norm is not None]
    return (build.operand(q), build.operand(k)) if q else None


def _biases(build: _Builder, layers: Sequence[DecoderLayer]) -> tuple[int, int, int] | None:
    if layers[0].qkv.biases[0] is None:
        return None
    q, k, v = (build.operand([layer.qkv.biases[i] for layer in layers]) for i in range(3))  # pyright: ignore
    return q, k, v
