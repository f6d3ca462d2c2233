"""Small decoders of every structure that the persistent kernel's plan must stand, and their plans."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from pallas_kernels import (
    DecoderLayer,
    Norm,
    PackedProjection,
    Projection,
    pack,
)
from pallas_kernels.persistent import building
from pallas_kernels.persistent.plan import Plan
from pallas_kernels.persistent.steps import Phase
from pallas_kernels.persistent.tuning import Tuning

EPS = 1e-5
Ranks = tuple[int | tuple[int | None, ...] | None, ...]
"""Of each layer: of all its projections, or of every one."""
Draw = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of a decoder. ``attention`` and ``mlp`` hold a rank for each layer, None where it is dense, or one for each of q, k, v
    and o, of gate, up and down; members of one input that are given one rank have ranks 8 apart. Gate and up have one first factor
    in the layers that are ``shared``. Biases of q, k and v alone are "qkv". Low-rank ones may be ``absorbed``, see
    `DecoderLayer.o_gate_up`."""

    attention: Ranks = (None, None)
    mlp: Ranks = (None, None)
    head: int | None = None
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 128
    width: int = 256
    ff: int = 456
    vocab: int = 200
    slots: int = 192
    windows: tuple[int | None, ...] = (None, None, None)
    norms: bool = False
    biases: str = ""
    gate: str = "silu"
    shared: tuple[int, ...] = ()
    absorbed: bool = False
    dtype: Any = jnp.float32

    def arguments(self, draw: Draw) -> tuple[Any, ...]:
        """Of `decode_layers`, with arrays from ``draw(*shape, dtype=...)``."""
        cache = (self.batch, self.kv_heads, self.slots, self.head_dim)
        keys, values = (tuple(draw(*cache, dtype=self.dtype) for _ in self.attention) for _ in "kv")
        angles = jnp.arange(self.batch * self.head_dim // 2, dtype=jnp.float32).reshape(self.batch, 1, -1)
        return (
            draw(self.batch, 1, self.width, dtype=self.dtype),
            tuple(self.layer(draw, index) for index in range(len(self.attention))),
            self.norm(draw, self.width),
            self.packed(draw, self.width, [self.head], self.vocab),
            keys,
            values,
            jnp.cos(angles),
            jnp.sin(angles),
            jnp.asarray([self.slots - 1, 70, 0, 128, 5, 64, 63, 1][: self.batch], jnp.int32),
        )

    def layer(self, draw: Draw, index: int) -> DecoderLayer:
        attention, mlp = _of_members(self.attention[index], 3), _of_members(self.mlp[index], 2)
        inner, of_kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        everywhere = self.biases == "all"
        layer = DecoderLayer(
            input_norm=self.norm(draw, self.width),
            qkv=self.packed(draw, self.width, attention[:3], inner, of_kv, of_kv, biases=bool(self.biases)),
            q_norm=self.norm(draw, self.head_dim) if self.norms else None,
            k_norm=self.norm(draw, self.head_dim) if self.norms else None,
            o=self.packed(draw, inner, attention[3:], self.width, biases=everywhere),
            mlp_norm=self.norm(draw, self.width),
            gate_up=self.packed(
                draw, self.width, mlp[:2], self.ff, self.ff, biases=everywhere, shared=index in self.shared
            ),
            down=self.packed(draw, self.ff, mlp[2:], self.width, biases=everywhere),
            gate=self.gate,
            window=self.windows[index],
        )
        (up,) = layer.o.ups
        if not self.absorbed or up is None or None in layer.gate_up.ups or layer.o.biases != (None,):
            return layer
        return dataclasses.replace(layer, o_gate_up=layer.gate_up.first * layer.mlp_norm.scale @ up)

    def norm(self, draw: Draw, width: int) -> Norm:
        return Norm(1 + draw(width, dtype=self.dtype) * 0.3, EPS)

    def packed(
        self,
        draw: Draw,
        d_in: int,
        ranks: Sequence[int | None],
        *d_outs: int,
        biases: bool = False,
        shared: bool = False,
    ) -> PackedProjection:
        weight = lambda *shape: draw(*shape, dtype=self.dtype) * shape[-1] ** -0.5  # noqa: E731
        found, one = [], weight(ranks[0], d_in) if shared and ranks[0] else None
        for d_out, rank in zip(d_outs, ranks, strict=True):
            bias = draw(d_out, dtype=self.dtype) if biases else None
            if rank is None:
                found.append(Projection(weight=weight(d_out, d_in), bias=bias))
                continue
            down = weight(rank, d_in) if one is None else one
            found.append(Projection(down=down, up=weight(d_out, down.shape[0]), bias=bias))
        return pack(found)


def _of_members(ranks: int | tuple[int | None, ...] | None, packed: int) -> tuple[int | None, ...]:
    """Of a layer's ``packed`` members of one input, and of the projection that follows them."""
    if isinstance(ranks, tuple):
        return ranks
    return (*(None if ranks is None else ranks + 8 * member for member in range(packed)), ranks)


def arrays_of(model: Model) -> tuple[Any, ...]:
    """Arguments of `decode_layers` with random numbers."""
    rng = np.random.default_rng(0)
    return model.arguments(lambda *shape, dtype: jnp.asarray(rng.standard_normal(shape), dtype))


def shapes_of(model: Model) -> tuple[Any, ...]:
    """The same as shapes alone."""
    return jax.eval_shape(lambda: model.arguments(lambda *shape, dtype: jnp.zeros(shape, dtype)))


def plan_of(arguments: tuple[Any, ...], programs: int, tuning: Tuning = building.DEFAULT) -> tuple[Plan, list[Any]]:
    return building.plan_of(*arguments[:6], programs, tuning)


class Item(NamedTuple):
    """Of a phase: tiles ``begin`` to ``end`` of a row tile, counted among its team's."""

    team: int
    split: int
    row_tile: int
    begin: int
    end: int
    piece: int


def items_of(plan: Plan, number: int, layer: int, program: int) -> list[Any]:
    """A program's items of a step: numbers of an attention's, `Item` of a phase's."""
    step = plan.steps[number]
    turn = (program - plan.first_programs[number][layer]) % plan.programs
    if not isinstance(step, Phase):
        return list(range(turn, step.items, plan.programs))
    sizes = step.team_programs(layer, plan.programs)
    if turn >= sum(sizes):
        return []
    team = next(t for t in range(len(sizes)) if turn < sum(sizes[: t + 1]))
    index, split = divmod(turn - sum(sizes[:team]), step.splits)
    sharers, k_tiles = step.sharers(layer, plan.programs)[team], step.k_tiles(team, layer)
    mine = step.share(team, layer, sharers, index) if index < sharers else ()
    found = []
    for row_tile, some in itertools.groupby(mine, lambda tile: tile // k_tiles):
        within = [tile % k_tiles for tile in some]
        others = {i for i in range(index) if any(t // k_tiles == row_tile for t in step.share(team, layer, sharers, i))}
        found.append(Item(team, split, row_tile, within[0], within[-1] + 1, len(others)))
    return found


def pieces_of(plan: Plan, number: int, layer: int) -> tuple[int, ...]:
    """Of every row tile of a phase's output, how many programs have some of it, in each split."""
    phase = plan.steps[number]
    assert isinstance(phase, Phase)
    taken: collections.Counter[tuple[int, int]] = collections.Counter()
    for program in range(plan.programs):
        for item in items_of(plan, number, layer, program):
            if item.split == 0:
                taken[item.team, item.row_tile] += 1
    found = []
    for i, group in enumerate(phase.layers[layer]):
        (team,) = (t for t, groups in enumerate(phase.teams) if i in groups)
        before = sum(phase.layers[layer][j].row_tiles for j in phase.teams[team] if j < i)
        found += [taken[team, before + tile] for tile in range(group.row_tiles)]
        # Rows that only other layers have: who reads them here has gone astray.
        found += [0] * (max(groups[i].row_tiles for groups in phase.layers) - group.row_tiles)
    return tuple(found)


LOW_RANK = (136, 72, 200)
DENSE = (None, None, None)
MODELS = {
    "low rank, other ranks in every layer": Model(LOW_RANK, (200, 264, 64), head=136, batch=3),
    "dense": Model(DENSE, DENSE, batch=1),
    "dense attention, low-rank MLP": Model(DENSE, (64, 200, 136), batch=3, windows=(None, 64, 100)),
    "grouped queries, one window": Model(LOW_RANK[:2], DENSE[:2], batch=1, heads=4, windows=(100, None)),
    "heads of 32": Model(LOW_RANK[:2], LOW_RANK[1:], heads=8, kv_heads=4, head_dim=32, norms=True, windows=(65, None)),
    "heads of 64": Model(DENSE[:2], LOW_RANK[:2], batch=1, heads=4, head_dim=64, biases="qkv"),
    "norms and biases": Model(LOW_RANK[:2], LOW_RANK[1:], kv_heads=1, norms=True, biases="qkv", windows=(65, 1)),
    "norms and biases of dense ones": Model(DENSE[:2], DENSE[:2], head=64, batch=3, heads=4, norms=True, biases="qkv"),
    "one first factor for gate and up": Model(LOW_RANK, LOW_RANK, batch=1, kv_heads=1, shared=(0, 2)),
    "split inputs": Model((136, 72), DENSE[:2], batch=6, heads=8, width=1024),
    "many rows": Model(DENSE[:2], LOW_RANK[:2], batch=1, vocab=8200),
    "dense among low rank": Model(
        ((None, 72, 40, 136), (136, None, 40, None), (None, None, None, 64)),
        ((None, 64, 200), (136, None, None), (136, 136, 40)),
        batch=3,
        heads=4,
        norms=True,
        biases="all",
        shared=(2,),
    ),
    "some layers dense": Model((None, 72, 136), (200, None, (None, None, 64)), batch=2, biases="qkv", gate="gelu_tanh"),
    "first layer low rank": Model((72, None), (136, None), batch=1, heads=4, width=1024, biases="all", gate="gelu"),
    "one layer": Model(((None, 72, 40, 136),), ((136, None, 64),), batch=2, biases="all"),
    "absorbed": Model(LOW_RANK, (200, 264, 64), batch=3, biases="qkv", norms=True, absorbed=True),
    "absorbed, split inputs": Model(
        (136, 72), (1000, 64), batch=1, width=1032, heads=8, gate="gelu", shared=(1,), absorbed=True
    ),
    "split latents": Model(DENSE[:2], (1000, 64), 904, kv_heads=1, width=1024, ff=1160, norms=True, shared=(0,)),
}


def eighths(most: int) -> st.SearchStrategy[int]:
    """Multiples of eight, as kernels need them."""
    return st.integers(2, most).map(lambda n: 8 * n)


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Of any structure that the kernel serves."""
    count = draw(st.integers(1, 4))

    def ranks(members: int) -> st.SearchStrategy[Ranks]:
        some = st.none() | eighths(160)
        mixed = st.tuples(*[some | st.tuples(*[some] * members)] * count)
        return st.just((None,) * count) | st.tuples(*[eighths(160)] * count) | mixed

    kv_heads = draw(st.sampled_from([1, 2, 8]))
    everywhere, gates = ["", "qkv", "all"], ["silu", "gelu", "gelu_tanh"]
    return Model(
        attention=draw(ranks(4)), mlp=draw(ranks(3)), head=draw(st.none() | eighths(80)), batch=draw(st.integers(1, 8)),
        head_dim=draw(st.sampled_from([32, 64, 128])),
        heads=kv_heads * draw(st.integers(1, 8)), kv_heads=kv_heads, width=draw(eighths(200)), ff=draw(eighths(300)),
        vocab=draw(st.integers(1, 700)), windows=draw(st.tuples(*[st.none() | st.integers(1, 300)] * count)),
        norms=draw(st.booleans()), gate=draw(st.sampled_from(gates)), biases=draw(st.sampled_from(everywhere)),
        shared=draw(st.sampled_from([(), (0,), (1, 2)])), absorbed=draw(st.booleans()),
    )  # fmt: skip


PROGRAMS = st.integers(8, 136)
