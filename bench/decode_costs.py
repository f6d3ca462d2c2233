"""Fits what decoding costs beyond its bytes to the rows of `decode.jsonl`, for `flashsvd compress --ms-per-token`.

A row at batch 1 took ``bytes / bandwidth + layers * a + products * b + differing layers * c``; the bandwidth is the median of those
measured in the same runs, a, b and c are least squares over all rows of one device and one kind of kernels, none below zero. Rows
of a commit without layers that differ are left out if they are newer than the last of those: where kernels have changed since, they
would tell what has changed, not what it costs that layers differ. The largest error of a row is kept beside them. Writes
flashsvd_jax/compress/decode_costs.json, as bench/report.py does.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from reporting.rows import Results, Row, Setting, results
from scipy.optimize import nnls

from flashsvd_jax.compress.decode_costs import COSTS_FILE
from flashsvd_jax.shapes import shape_config

RESULTS = Path(__file__).resolve().parent / "results"
KERNELS = {"persistent": "flashsvd_jax-persistent", "products": "flashsvd_jax-products", "xla": "flashsvd_jax-xla"}
PACKED_GROUPS = 4
"""Of a layer: queries, keys and values; the attention's output; gate and up; down."""
FEWEST_ROWS = 4
LOW_RANK = {"dense": 0.0, "uniform": 1.0, "mixed": 1.0, "partly dense": 7 / 8}
"""Share of projections, of which each is two products. Of ranks that earlier costs led to it is not known any more."""
DIFFERENT = ("mixed", "partly dense")


def fit(device: Path) -> dict[str, dict[str, Any]]:
    """Costs by kind of kernels from one device's rows; a kind with few rows is left out."""
    found = {}
    for kind, impl in KERNELS.items():
        measured = _comparable(device / "decode.jsonl", impl)
        if len(measured) >= FEWEST_ROWS and len({setting.ranks for setting, _ in measured}) > 1:
            found[f"{device.name}/{kind}"] = _costs(measured)
    return found


def _comparable(file: Path, impl: str) -> list[tuple[Setting, Row]]:
    """Rows that are not newer than the last of layers that differ, or of its commit; all if there is none of those."""
    measured = _measured(results(file), impl)
    differ = [row for setting, row in measured if setting.ranks in DIFFERENT]
    if not differ:
        return measured
    last = max(differ, key=_date)
    return _measured(results(file, lambda row: _date(row) <= _date(last) or row["commit"] == last["commit"]), impl)


def _measured(rows: Results, impl: str) -> list[tuple[Setting, Row]]:
    """Rows at batch 1 whose shares of low-rank projections are known."""
    return [
        (setting, row)
        for setting in rows.settings(batch=1)
        if setting.ranks in LOW_RANK and (row := rows.row(setting, impl)) is not None and "error" not in row
    ]


def _date(row: Row) -> str:
    return row.get("date", "")  # early rows have none


def _costs(measured: list[tuple[Setting, Row]]) -> dict[str, Any]:
    layers = np.array([shape_config(setting.model).num_layers for setting, _ in measured])
    products = PACKED_GROUPS * np.array([1 + LOW_RANK[setting.ranks] for setting, _ in measured])
    differ = np.array([setting.ranks in DIFFERENT for setting, _ in measured])
    counts = np.stack([layers, layers * products + 1, layers * differ], axis=1)
    read_tb_s = statistics.median(row["read_tb_s"] for _, row in measured)
    floors = [row["floor_ms"] * row["read_tb_s"] / read_tb_s for _, row in measured]
    beyond = np.array([1e3 * (row["ms_per_token"] - floor) for floor, (_, row) in zip(floors, measured, strict=True)])
    costs, _ = nnls(counts, beyond)
    return {
        "read_tb_s": round(read_tb_s, 3),
        "us_a_layer": round(float(costs[0]), 3),
        "us_a_product": round(float(costs[1]), 3),
        "us_a_differing_layer": round(float(costs[2]), 3),
        "rows": len(measured),
        "largest_error_ms": round(float(np.abs(counts @ costs - beyond).max()) / 1e3, 3),
        "commits": sorted({row["commit"] for _, row in measured}),
    }


def render() -> str:
    """The file's text, from every device's rows."""
    tables: dict[str, Any] = {}
    for device in sorted(file.parent for file in RESULTS.glob("*/decode.jsonl")):
        tables |= fit(device)
    return json.dumps(tables, indent=2) + "\n"


if __name__ == "__main__":
    COSTS_FILE.write_text(render(), encoding="utf-8")
