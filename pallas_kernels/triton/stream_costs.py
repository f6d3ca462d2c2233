"""Whether streaming from rank space is worth it: what a call would take this way and by products, from times of calls like it.

A way takes

    operations / rate + bytes / bandwidth + kernels * launch

where the counts follow from a call's sizes. Bandwidth, launch and a few calls with their times are data,
`tuned/<device>_streaming.json`: the rate is what the call nearest in rank and length has reached, so that at a measured call the
estimate is what was measured. `bench/streaming_times.py` measures them. A device without such a file streams all that it can.

Streaming keeps out of memory what products write between them, so it may take `MARGIN` longer.
"""

import dataclasses
import functools
import math
from typing import Any

from pallas_kernels.attention import Visible
from pallas_kernels.projection import PackedProjection
from pallas_kernels.target import target
from pallas_kernels.triton.feed_forward_program import TOKENS, inner_splits
from pallas_kernels.triton.flash_programs import pieces
from pallas_kernels.tuned import table

WAYS = ("stream", "products")
MARGIN = 0.1
_ITEMSIZE = 2


@dataclasses.dataclass(frozen=True)
class Work:
    """What a way has to do: operations of products, bytes to and from memory, and kernels."""

    operations: float
    bytes: float
    kernels: int


@dataclasses.dataclass(frozen=True)
class FeedForwardCall:
    """Sizes of a feed-forward layer: rows of x, its width, inner columns, the ranks of up (and a gate), and of down."""

    tokens: int
    width: int
    inner: int
    up_ranks: tuple[int, ...]
    down_rank: int

    op = "feed_forward"

    @classmethod
    def of(cls, tokens: int, up: PackedProjection, down: PackedProjection) -> "FeedForwardCall":
        """Those of a call over so many tokens."""
        return cls(tokens, up.first.shape[1], up.d_outs[0], up.widths, down.widths[0])

    @property
    def ranks(self) -> tuple[int, ...]:
        return *self.up_ranks, self.down_rank

    def distance(self, other: "FeedForwardCall") -> float:
        """How unlike two calls are."""
        return _apart(sum(self.ranks), sum(other.ranks)) + abs(len(self.ranks) - len(other.ranks))

    def work(self, way: str, cores: int) -> Work:
        """What a way does on so many cores. The kernel's last programs may leave most idle, and its ranks are rounded up."""
        latents = sum(self.ranks)
        outer, values = 2 * self.tokens * self.width * latents, 2 * self.width + 2 * latents
        if way == "products":
            values += (2 * len(self.up_ranks) + 2) * self.inner
            return Work(outer + 2 * self.tokens * self.inner * latents, _ITEMSIZE * self.tokens * values, 5)
        splits = inner_splits(self.tokens, self.inner, cores)
        turns = -(-splits * -(-self.tokens // TOKENS) // cores)  # a program fills a core
        inner = 2 * turns * cores * TOKENS * self.inner / splits * sum(map(_held, self.ranks))
        partial_sums = 8 * splits * self.tokens * self.down_rank if splits > 1 else 0
        return Work(outer + inner, _ITEMSIZE * self.tokens * values + partial_sums, 3 + (splits > 1))


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """Sizes of attention: how many keys a query sees, columns of a head, and ranks of queries, keys and values.

    ``latents`` counts those of a token, which is less than a rank for each head where heads share them.
    """

    batch: int
    length: int
    seen: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    latents: int
    ranks: tuple[int, ...]
    rotary: bool = False

    op = "attend_padded"
    query_tile = 64
    """Of the kernel: rotated keys are rebuilt for each tile of queries."""

    @classmethod
    def of(
        cls, shape: tuple[int, int, int], qkv: PackedProjection, visible: Visible, head_dim: int, rotary: bool
    ) -> "AttentionCall":
        """Those of a call over x of a shape [batch, tokens, width]."""
        batch, length, width = shape
        seen = (
            length
            if visible.window is None
            else min(length, visible.window if visible.causal else 2 * visible.window - 1)
        )
        heads, kv_heads, _ = (d_out // head_dim for d_out in qkv.d_outs)
        ranks = tuple(up.shape[-1] for up in qkv.ups if up is not None)
        return cls(batch, length, seen, width, heads, kv_heads, head_dim, qkv.first.shape[0], ranks, rotary)

    def distance(self, other: "AttentionCall") -> float:
        """How unlike two calls are; rotation changes more than sizes do."""
        sizes = _apart(sum(self.ranks), sum(other.ranks)) + _apart(self.seen, other.seen)
        return sizes + 10 * (self.rotary != other.rotary)

    def work(self, way: str, cores: int) -> Work:
        """What a way does; on how many cores does not matter, as there are many programs."""
        tokens, columns = self.batch * self.length, self.heads * self.head_dim
        first, values = 2 * tokens * self.width * self.latents, self.width + 2 * self.latents + columns
        kv_columns = self.kv_heads * self.head_dim
        if way == "products":
            q, k, v = self.ranks
            lifted = 2 * tokens * (columns * q + kv_columns * (k + v))
            values += 2 * (columns + 2 * kv_columns)
            return Work(first + lifted + 4 * tokens * self.seen * columns, _ITEMSIZE * tokens * values, 7)
        q, k, v = map(_held, self.ranks)
        pairs = tokens * self.seen * self.heads
        scores = 2 * pairs * (self.head_dim * (1 + k / self.query_tile) if self.rotary else k)
        lifted = 2 * tokens * columns * (q + v + (0 if self.rotary else k))
        return Work(first + lifted + scores + 2 * pairs * v, _ITEMSIZE * tokens * values, 2)


Call = FeedForwardCall | AttentionCall


def slower(call: Call) -> str | None:
    """Why streaming is not worth it, if products would take less time; None where it is, or where nothing was measured."""
    times = estimates(call)
    if times is None or times["stream"] <= (1 + MARGIN) * times["products"]:
        return None
    return f"streaming would take about {_text(times['stream'])}, products {_text(times['products'])}"


def estimates(call: Call) -> dict[str, float] | None:
    """Milliseconds of a call either way on the target, or None where nothing was measured on such a device."""
    found = _table(target().kind)
    if found is None:
        return None
    return {way: _milliseconds(call, way, found) for way in WAYS}


def _milliseconds(call: Any, way: str, found: dict[str, Any]) -> float:
    cores = target().cores
    like, times = min((m for m in found[call.op] if way in m[1]), key=lambda m: call.distance(m[0]))

    def beside_operations(work: Work) -> float:
        return work.bytes / (1e9 * found["bandwidth_tb_s"]) + work.kernels * 1e-3 * found["launch_us"]

    done, todo = like.work(way, cores), call.work(way, cores)
    rate = done.operations / (times[way] - beside_operations(done))
    return todo.operations / rate + beside_operations(todo)


def _apart(size: float, other: float) -> float:
    return abs(math.log(size / other))


def _held(rank: int) -> int:
    """Columns that a program holds for a rank."""
    return sum(piece.tile for piece in pieces(rank))


def _text(milliseconds: float) -> str:
    return f"{milliseconds:.3f} ms" if milliseconds < 1 else f"{milliseconds:.2f} ms"


@functools.cache
def _table(kind: str) -> dict[str, Any] | None:
    found = table("pallas_kernels.triton", kind, "streaming")
    for of_op in (FeedForwardCall, AttentionCall) if found else ():
        found[of_op.op] = [(_call(of_op, entry["call"]), entry["ms"]) for entry in found[of_op.op]]
    return found


def _call(kind: type[Any], fields: dict[str, Any]) -> Any:
    """A call from JSON, which has lists in place of tuples."""
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
