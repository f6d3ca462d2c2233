"""Times encoders' layers from rank space and by products: what decides between the two (`pallas_kernels/triton/stream_costs.py`).

Writes such a table as `pallas_kernels/triton/tuned/<device>_streaming.json`, and prints what the one there is estimates. Hopper's
kernel is timed beside them. Every time is a row too (suite "layer") in bench/results/<device>/kernels.jsonl, beside its floor: the
operations of the products over the rate of large ones.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jobs import append_row
from one_shape import rows_file
from prompt_cases import median_seconds
from prompt_timing import matrix_rate

from flashsvd_jax.benchmark import provenance, read_bandwidth
from flashsvd_jax.compile_cache import enable_persistent_cache
from pallas_kernels import Projection, Visible, attend_padded, feed_forward, hardware_rank, pack
from pallas_kernels.triton.stream_costs import WAYS, AttentionCall, Call, FeedForwardCall, estimates

CALLS, REPEATS, LAUNCH_US = 10, 5, 2.5
TIMED = (*WAYS, "hopper")
_BERT = {"width": 768, "heads": 12, "kv_heads": 12, "head_dim": 64}


def attention(batch: int, length: int, rank: int, rotary: bool = False, seen: int | None = None) -> AttentionCall:
    """Of BERT-base's width with factors of single heads; ``seen`` where there is a window to both sides."""
    rank = hardware_rank(rank)
    return AttentionCall(batch, length, seen or length, latents=36 * rank, ranks=(rank,) * 3, rotary=rotary, **_BERT)


def layer(tokens: int, *ranks: int, inner: int = 3072) -> FeedForwardCall:
    """Of BERT-base's width; the last rank is that of down."""
    *up, down = map(hardware_rank, ranks)
    return FeedForwardCall(tokens, 768, inner, tuple(up), down)


MEASURED: tuple[Call, ...] = (
    layer(32768, 192, 192), layer(32768, 307, 307), layer(32768, 384, 384), layer(32768, 460, 460),
    layer(32768, 184, 184, 184, inner=1152), attention(64, 512, 29), attention(64, 512, 44), attention(64, 512, 64),
    attention(4, 8192, 29), attention(4, 8192, 29, rotary=True), attention(4, 8192, 29, rotary=True, seen=129),
)  # fmt: skip
"""Ratios 0.3, 0.5, and 0.75 of BERT-base with one between, ModernBERT's gated layer at 0.5, and long sequences."""


def operands(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random arguments of the operation."""
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def draw(*shape: int) -> jax.Array:
        return (jax.random.normal(next(keys), shape, jnp.float32) * shape[-1] ** -0.5).astype(jnp.bfloat16)

    if isinstance(call, FeedForwardCall):
        up = [
            Projection(down=draw(r, call.width), up=draw(call.inner, r), bias=draw(call.inner)) for r in call.up_ranks
        ]
        down = Projection(
            down=draw(call.down_rank, call.inner), up=draw(call.width, call.down_rank), bias=draw(call.width)
        )
        return (draw(1, call.tokens, call.width), pack(up), pack([down])), {"activation": "gelu"}
    columns = call.heads * call.head_dim
    qkv = [
        Projection(down=draw(call.heads * r, call.width), up=draw(call.heads, call.head_dim, r), bias=draw(columns))
        for r in call.ranks
    ]
    window = None if call.seen == call.length else (call.seen + 1) // 2
    visible = Visible(jnp.full(call.batch, call.length), causal=False, window=window)
    angles = jnp.ones((call.batch, call.length, call.head_dim // 2), jnp.float32)
    options = {"head_dim": call.head_dim, "tables": (angles, angles) if call.rotary else None}
    return (draw(call.batch, call.length, call.width), pack(qkv), visible), options


def milliseconds(call: Call) -> dict[str, float]:
    """Of a call each way; a way that refuses it is left out."""
    op, times = {"feed_forward": feed_forward, "attend_padded": attend_padded}[call.op], dict[str, float]()
    args, options = operands(call)
    for way in TIMED:
        run = partial(
            jax.jit(partial(op, implementation=way), static_argnames=("activation", "head_dim")), *args, **options
        )
        try:
            jax.block_until_ready(run())
        except ValueError as error:  # the refusal
            print(f"  {error}")
            continue
        times[way] = round(1e3 / CALLS * median_seconds(partial(queued, run), REPEATS), 4)
    return times


def row_of(call: Call, way: str, ms: float, rate: float) -> dict[str, Any]:
    """A time, and the floor by a rate of operations a second; the attention's scores count as products do."""
    operations = call.work("products", 1).operations
    return {
        "suite": "layer", "op": call.op, "impl": way, "call": dataclasses.asdict(call), "ms": ms,
        "floor_ms": round(1e3 * operations / rate, 4), "tflops": round(operations / ms / 1e9, 1),
        "matmul_tflops": round(rate / 1e12, 1),
    }  # fmt: skip


def queued(run: Callable[[], Any]) -> None:
    """Calls that the host does not wait for one by one."""
    jax.block_until_ready([run() for _ in range(CALLS)])


def main() -> int:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the table")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="bench/results/<device>/kernels.jsonl if not given")
    parsed = parser.parse_args()
    out, rows = parsed.out, rows_file(parsed.rows)
    if rows is None:
        return 1
    enable_persistent_cache()
    rate = matrix_rate()
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, **provenance()}
    table: dict[str, Any] = {
        "why": f"bench/streaming_times.py, {CALLS} calls queued, bfloat16: {', '.join(about.values())}",
        "bandwidth_tb_s": round(read_bandwidth() / 1e12, 2), "launch_us": LAUNCH_US,
    }  # fmt: skip
    for call in MEASURED:
        times, before = milliseconds(call), estimates(call) or {}
        for way, ms in times.items():
            append_row(rows, {**row_of(call, way, ms, rate), **about})
        entry = {"call": dataclasses.asdict(call), "ms": {way: times[way] for way in WAYS if way in times}}
        table.setdefault(call.op, []).append(entry)
        print(
            f"{call}\n  "
            + ", ".join(
                f"{way} {ms:.3f} ms" + (f", estimated {before[way]:.3f}" if way in before else "")
                for way, ms in times.items()
            )
        )
        out.write_text(rendered(table), encoding="utf-8")  # what has been measured by now, in case time runs out
    return 0


def rendered(table: dict[str, Any]) -> str:
    """JSON, a measured call a line."""
    parts = []
    for name, value in table.items():
        lines = ",\n    ".join(map(json.dumps, value)) if isinstance(value, list) else ""
        parts.append(f"  {json.dumps(name)}: " + (f"[\n    {lines}\n  ]" if lines else json.dumps(value)))
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
