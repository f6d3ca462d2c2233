"""Plots of `encoder.jsonl` and `prefill.jsonl` as data, which `plots.draw` draws."""

from collections.abc import Callable
from pathlib import Path

from reporting.plots import KEPT, MATRIX_RATE, Data, data_of, series
from reporting.prompts import IMPLEMENTATIONS, Row, Setting, memory_of, read

ENCODER = ("bert-base", 64, 512)


def plots(encoder: Path, prefill: Path) -> dict[str, Data]:
    """Name -> data of every plot that has at least two points to join."""
    found = {
        "encoder_latency": _against_ratio(encoder, "ms a pass", lambda row: row["latency_ms"]),
        "encoder_memory": _against_ratio(encoder, "MiB beside weights, input and result", _mebibytes),
        "prefill": _against_tokens(prefill),
    }
    return {name: data for name, data in found.items() if data}


def _against_ratio(file: Path, y: str, value: Callable[[Row], float | None]) -> Data | None:
    model, batch, length = ENCODER
    rows = {s: by_impl for s, by_impl in read(file).items() if (s[0], *s[2:]) == ENCODER}
    panel = {"title": f"{model}, {batch} x {length} tokens", "series": _series(rows, lambda s: s[1], value)}
    return data_of(KEPT, y, [panel])


def _against_tokens(file: Path) -> Data | None:
    rows, panels = read(file), []
    for model, ratio in sorted({s[:2] for s in rows}, key=lambda pair: (pair[0], -pair[1])):
        of_model = {s: by_impl for s, by_impl in rows.items() if s[:2] == (model, ratio)}
        drawn = _series(of_model, lambda s: s[2] * s[3], lambda row: row["tflops"])
        rates = _points(of_model, "flashsvd_jax", lambda s: s[2] * s[3], lambda row: row["matmul_tflops"])
        title = f"{model}, {'dense' if ratio == 1 else f'{ratio:g} of the parameters'}"
        panels.append({"title": title, "series": [*drawn, *([series(MATRIX_RATE, rates)] if rates else [])]})
    data = data_of("tokens of a batch", "TFLOP/s", panels)
    return data and {**data, "yscale": "linear"}


def _series(
    rows: dict[Setting, dict[str, Row]], x_of: Callable[[Setting], float], value: Callable[[Row], float | None]
) -> list[Data]:
    found = ((label, _points(rows, impl, x_of, value)) for impl, label in IMPLEMENTATIONS.items())
    return [series(label, points) for label, points in found if points]


def _points(
    rows: dict[Setting, dict[str, Row]],
    impl: str,
    x_of: Callable[[Setting], float],
    value: Callable[[Row], float | None],
) -> list[tuple[float, float]]:
    """Of the measured rows of an implementation, in order."""
    measured = [
        (x_of(s), by_impl[impl]) for s, by_impl in rows.items() if "error" not in by_impl.get(impl, {"error": ""})
    ]
    return sorted((x, y) for x, row in measured if (y := value(row)) is not None)


def _mebibytes(row: Row) -> float | None:
    memory = memory_of(row)
    return None if memory is None else round(memory / 2**20, 1)
