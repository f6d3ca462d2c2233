"""Tables of `encoder.jsonl` and `prefill.jsonl`: passes over whole batches, with their memory or their share of the matrix rate."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from reporting.rows import counts_in_place_of
from reporting.tables import markdown

Row = dict[str, Any]
Setting = tuple[str, float, int, int]
"""Model, share of parameters kept, batch, length."""

IMPLEMENTATIONS = {
    "flashsvd_jax": "flashsvd_jax",
    "flashsvd_jax-blocks": "blocks of 8192 tokens",
    "flashsvd_jax-blocks4096": "blocks of 4096 tokens",
    "flashsvd_jax-blocks2048": "blocks of 2048 tokens",
    "flashsvd_jax-products": "without streaming",
    "jax-cudnn": "plain JAX, cuDNN attention",
    "jax-scores": "plain JAX, scores in memory",
    "torch-compile": "torch.compile",
    "torch-sdpa": "PyTorch",
    "torch-eager": "PyTorch, scores in memory",
}


def read(file: Path) -> dict[Setting, dict[str, Row]]:
    """The row that counts of every setting and implementation, see `counts_in_place_of`."""
    found: dict[Setting, dict[str, Row]] = {}
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for row in map(json.loads, lines):
        if "length" not in row:  # rows of `flashsvd bench` are told by other keys
            continue
        by_impl = found.setdefault((row["model"], row["ratio"], row["batch"], row["length"]), {})
        if counts_in_place_of(by_impl.get(row["impl"]), row, "latency_ms"):
            by_impl[row["impl"]] = row
    return found


def encoder(file: Path) -> str:
    """Milliseconds and temporary memory of a pass."""
    return _table(file, _time_and_memory)


def encoder_factors(file: Path) -> str:
    """Ours against what the time and memory of encoders are to be compared with, dense and plain SVD."""
    rows, lines = read(file), []
    for setting in _ordered(rows):
        model, _, batch, length = setting
        theirs, dense = rows[setting], rows.get((model, 1.0, batch, length), {})
        for impl in (i for i in IMPLEMENTATIONS if i.startswith("flashsvd_jax") and i != "flashsvd_jax-products"):
            own = _measured(theirs.get(impl))
            if own is None:
                continue
            plain = [row for i in ("jax-cudnn", "jax-scores") if (row := _measured(theirs.get(i)))]
            lines.append([
                *_what(setting), IMPLEMENTATIONS[impl],
                *(_less_memory(own, row) for row in (
                    theirs.get("jax-scores"), dense.get("jax-scores"), theirs.get("jax-cudnn"), dense.get("jax-cudnn")
                )),
                *(_faster(own, row) for row in (
                    min(plain, key=lambda row: row["latency_ms"], default=None), dense.get("jax-cudnn"), theirs.get("torch-eager")
                )),
            ])  # fmt: skip
    memory = [f"memory: {what}" for what in ("scores", "scores, dense", "cuDNN", "cuDNN, dense")]
    times = [f"time: {what}" for what in ("fastest plain JAX", "cuDNN, dense", "PyTorch, scores")]
    table = markdown(["model", "kept", "batch x tokens", "ours", *memory, *times], lines)
    return table if any(set(line[4:]) != {"-"} for line in lines) else ""


def prefill(file: Path) -> str:
    """Milliseconds of a prompt, and its operations a second, beside those of large products in the same process."""
    return _table(file, _time_and_rate, _matrix_rate)


def prefill_factors(file: Path) -> str:
    """Our prompts against the matrix rate of the same process, and how many times as fast as others and dense models they are."""
    rows, lines, others = read(file), [], ("jax-cudnn", "torch-sdpa", "torch-compile")
    for setting in _ordered(rows):
        model, ratio, batch, length = setting
        own = _measured(rows[setting].get("flashsvd_jax"))
        if own is None or own["matmul_tflops"] is None:
            continue
        dense = {} if ratio == 1 else rows.get((model, 1.0, batch, length), {})
        fastest = min(filter(_measured, dense.values()), key=lambda row: row["latency_ms"], default=None)
        share = f"{own['tflops'] / own['matmul_tflops']:.0%}"
        faster = [_faster(own, row) for row in (
            dense.get("flashsvd_jax"), fastest, *(rows[setting].get(impl) for impl in others)
        )]  # fmt: skip
        lines.append([*_what(setting), share, *faster])
    names = ["ours, dense", "fastest dense", *(IMPLEMENTATIONS[impl] for impl in others)]
    return markdown(["model", "kept", "batch x tokens", "of the matrix rate", *names], lines)


def minilm(file: Path) -> str:
    """Cosines of a factorized encoder's vectors with the dense one's, the newest row of each ratio."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = {row["ratio"]: row for row in map(json.loads, lines)}
    cells = [
        [
            "full rank" if ratio == 1 else f"{ratio:.2f}",
            f"{rows[ratio]['cosine']:.4f}",
            f"{rows[ratio]['smallest_cosine']:.4f}",
        ]
        for ratio in sorted(rows, reverse=True)
    ]
    return markdown(["kept", "mean cosine", "smallest"], cells)


def _table(
    file: Path, cell: Callable[[Row], str], more: Callable[[dict[str, Row]], tuple[str, str]] | None = None
) -> str:
    rows = read(file)
    impls = [impl for impl in IMPLEMENTATIONS if any(impl in by_impl for by_impl in rows.values())]
    lines, extra = [], ""
    for setting in _ordered(rows):
        by_impl = rows[setting]
        line = _what(setting)
        if more is not None:
            extra, figure = more(by_impl)
            line.append(figure)
        lines.append([*line, *(_cell(by_impl.get(impl), cell) for impl in impls)])
    head = ["model", "kept", "batch x tokens", *([extra] if extra else []), *(IMPLEMENTATIONS[impl] for impl in impls)]
    return markdown(head, lines)


def _ordered(settings: Iterable[Setting]) -> list[Setting]:
    return sorted(settings, key=lambda s: (s[0], -s[1], s[2] * s[3], s[3]))


def _what(setting: Setting) -> list[str]:
    model, ratio, batch, length = setting
    return [model, "all (dense)" if ratio == 1 else f"{ratio:.2f}", f"{batch} x {length}"]


def _measured(row: Row | None) -> Row | None:
    return None if row is None or "error" in row else row


def memory_of(row: Row) -> int | None:
    """Bytes beside weights, input and result, as the compiler says; the allocator's peak where there is no such figure."""
    return row["temp_bytes"] if row["temp_bytes"] is not None else row["peak_activation_bytes"]


def _less_memory(own: Row, other: Row | None) -> str:
    other = _measured(other)
    mine, theirs = memory_of(own), None if other is None else memory_of(other)
    return "-" if mine is None or theirs is None else f"{mine / theirs - 1:+.0%}"


def _faster(own: Row, other: Row | None) -> str:
    other = _measured(other)
    return "-" if other is None else f"{other['latency_ms'] / own['latency_ms']:.2f}x"


def _cell(row: Row | None, cell: Callable[[Row], str]) -> str:
    if row is None:
        return "-"
    return "fails" if "error" in row else cell(row)


def _time_and_memory(row: Row) -> str:
    memory = memory_of(row)
    return f"{row['latency_ms']:.1f} ms" + ("" if memory is None else f", {memory / 2**20:.0f} MiB")


def _time_and_rate(row: Row) -> str:
    return f"{row['latency_ms']:.1f} ms, {row['tflops']:.0f}"


def _matrix_rate(by_impl: dict[str, Row]) -> tuple[str, str]:
    rate = by_impl.get("flashsvd_jax", {}).get("matmul_tflops")
    return "matrix rate", "-" if rate is None else f"{rate:.0f}"
