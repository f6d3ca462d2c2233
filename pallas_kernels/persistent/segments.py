"""The op `segment` as one persistent kernel: which phases it has, and what it cannot serve."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.persistent.plan import TILE_K, TILE_ROWS, Group, Phase, Segment, Source, splits_for
from pallas_kernels.products import rows
from pallas_kernels.projection import PackedProjection
from pallas_kernels.segment import Between
from pallas_kernels.target import Target, target

LARGEST_BATCH = 4


def unavailable(device: Target) -> str | None:
    """Why the kernel cannot run on a device at all."""
    if device.platform != "cuda" or device.capability != (9, 0):
        return f"written for Hopper (compute capability 9.0), not {device.kind or device.platform}"
    return "Mosaic GPU's interpreter has no words in GPU memory" if device.interpret else None


def refuses(x: jax.Array, attended: jax.Array, between: Between) -> str | None:
    """Why the kernel cannot serve a call."""
    if between.following is None or between.next_norm is None:
        return "the last layer, which nothing follows"
    if rows(x) > LARGEST_BATCH:
        return f"{rows(x)} rows; it serves up to {LARGEST_BATCH}"
    parts = (between.o, between.gate_up, between.down, between.following)
    weights = [weight for part in parts for weight in (part.first, *part.ups) if weight is not None]
    if any(a.dtype != jnp.bfloat16 for a in (x, attended, *weights)):
        return "a dtype other than bfloat16"
    if between.gate != "silu" or any(bias is not None for part in parts for bias in part.biases):
        return "biases, or an activation other than silu"
    if any(len({up is None for up in part.ups}) > 1 for part in parts):
        return "dense and low-rank members of one input"
    if any(weight.shape[0] < TILE_ROWS or weight.shape[1] < TILE_K for weight in weights):
        return f"a weight smaller than a tile of {TILE_ROWS} by {TILE_K}"
    if between.mlp_norm.eps != between.next_norm.eps:
        return "norms of different eps"
    return _plan(rows(x), x.shape[-1], target().cores, between)[0].problems()


def run(x: jax.Array, attended: jax.Array, between: Between) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """As `pallas_kernels.segment`. The residual stream is rounded once, after both additions."""
    from pallas_kernels.persistent.kernel import run_segment

    assert between.next_norm is not None
    batch, width = rows(x), x.shape[-1]
    segment, weights = _plan(batch, width, target().cores, between)
    scales = between.mlp_norm.scale, between.next_norm.scale
    operands = (x.reshape(batch, width), attended.reshape(batch, -1), *scales, *weights)
    stream, *outputs = run_segment(segment, operands, between.mlp_norm.eps)
    return stream.reshape(x.shape), tuple(y.reshape(*x.shape[:-1], -1) for y in outputs)


@dataclasses.dataclass
class _Builder:
    """Phases so far, and the weights that they name; operands 0 to 3 are the stream, the plain input and two norm scales."""

    programs: int
    phases: list[Phase] = dataclasses.field(default_factory=list)
    weights: list[jax.Array] = dataclasses.field(default_factory=list)

    def project(self, name: str, packed: PackedProjection, source: Source, plain: bool = False) -> int:
        """Adds the phases of a projection; gives the number of the last."""
        if all(up is None for up in packed.ups):
            d_in = packed.first.shape[1]
            operand = self._weight(packed.first)
            groups = [
                Group(operand, width, d_in, row_start=start)
                for start, width in zip(packed.starts, packed.widths, strict=True)
            ]
            return self._phase(name, groups, source, plain)
        rows_, d_in = packed.first.shape
        first = self._phase(f"{name} down", [Group(self._weight(packed.first), rows_, d_in)], source, False)
        ups = [
            Group(self._weight(up), up.shape[0], width, x_start=start)
            for up, start, width in zip(packed.ups, packed.starts, packed.widths, strict=True)
            if up is not None
        ]
        scaled = first if source.kind == "stream" else None
        return self._phase(f"{name} up", ups, Source("sum", (first,), scaled=scaled), plain)

    def _weight(self, array: jax.Array) -> int:
        self.weights.append(array)
        return 3 + len(self.weights)

    def _phase(self, name: str, groups: list[Group], source: Source, plain: bool) -> int:
        phase = Phase(name, tuple(groups), source, plain=plain)
        splits = 1 if plain else splits_for(phase.padded_rows, max(g.k for g in groups), self.programs)
        self.phases.append(dataclasses.replace(phase, splits=splits))
        return len(self.phases) - 1


def _plan(batch: int, width: int, cores: int, between: Between) -> tuple[Segment, list[jax.Array]]:
    """The segment's phases, and the weights in the order in which they are numbered."""
    assert between.following is not None
    programs = cores // 8 * 8  # a multiple of every number of splits
    build = _Builder(programs)
    attention = build.project("o", between.o, Source("plain"))
    gates = build.project("gate_up", between.gate_up, Source("stream", (attention,), scale=2))
    dense = build.phases[gates].source.kind == "stream"
    half = build.phases[gates].groups[0].row_tiles * TILE_ROWS
    mlp = build.project("down", between.down, Source("gated", (gates,), scaled=gates if dense else None, half=half))
    build.project("following", between.following, Source("stream", (attention, mlp), scale=3), plain=True)
    return Segment(tuple(build.phases), batch, programs, width), build.weights
