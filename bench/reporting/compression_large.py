"""Table of `compression_large.jsonl`: what compressing a model of a published size takes."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from reporting.tables import markdown

Row = dict[str, Any]
_SETTING = ("device", "cores", "model", "layers", "method", "ratio", "alloc", "samples", "length")
_HEAD = (
    "device", "model", "method", "kept", "calibration", "time", "of it, start and conversion", "a layer", "host memory",
    "of it, beside mapped files", "device memory", "killed and resumed",
)  # fmt: skip


def read(files: Iterable[Path]) -> list[Row]:
    """The newest row of every setting."""
    lines = (line for file in files for line in file.read_text(encoding="utf-8").splitlines())
    return list({tuple(row[key] for key in _SETTING): row for row in map(json.loads, lines)}.values())


def table(rows: Iterable[Row]) -> str:
    """A line for each; "" without rows."""
    return markdown(_HEAD, [_line(row) for row in rows])


def _line(row: Row) -> list[str]:
    alloc = "" if row["alloc"] == "uniform" else f", {row['alloc']} ranks"
    return [
        f"{row['device']}, {row['cores']} cores", f"{row['model']}, {row['layers']} layers", f"`{row['method']}`{alloc}",
        f"{row['ratio']:g}", f"{row['samples']} x {row['length']}", _time(row["seconds"]), _time(row["convert_s"]),
        _time(row["layer_s"]), _memory(row["peak_rss_gib"]), _memory(row["peak_anonymous_gib"]),
        _memory(row["device_peak_gib"]), _interruptions(row),
    ]  # fmt: skip


def _interruptions(row: Row) -> str:
    alike = {None: "", True: ", files the same", False: ", files differ"}[row["identical"]]
    return f"{row['killed'] or 'not'}{' x' * bool(row['killed'])}{alike}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _memory(gib: float | None) -> str:
    return "-" if gib is None else f"{gib:.1f} GiB"
