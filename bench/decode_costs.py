"""Fits what decoding costs beyond its bytes to the rows of `decode.jsonl`, for `flashsvd compress --ms-per-token`.

A row at batch 1 took ``bytes / bandwidth + layers * a + products * b``; the bandwidth is the one measured in the same runs, a and b
are least squares over all rows of one device and one kind of kernels, none below zero. The largest error of a row is kept beside
them. Writes flashsvd_jax/compress/decode_costs.json, as bench/report.py does too.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from reporting.rows import Row, Setting, results

from flashsvd_jax.compress.decode_costs import COSTS_FILE
from flashsvd_jax.shapes import shape_config

RESULTS = Path(__file__).resolve().parent / "results"
KERNELS = {"persistent": "flashsvd_jax-persistent", "products": "flashsvd_jax-products", "xla": "flashsvd_jax-xla"}
PACKED_GROUPS = 4
"""Of a layer: queries, keys and values; the attention's output; gate and up; down."""
FEWEST_ROWS = 4
UNCOUNTED = ("partly dense", "allocated", "allocated alike")
"""Ranks of which some are none, so that how many products there are does not follow."""


def fit(device: Path) -> dict[str, dict[str, Any]]:
    """Costs by kind of kernels from one device's rows; a kind with few rows is left out."""
    found = {}
    rows = results(device / "decode.jsonl")
    for kind, impl in KERNELS.items():
        measured = [
            (setting, row)
            for setting in rows.settings(batch=1)
            if setting.ranks not in UNCOUNTED and (row := rows.row(setting, impl)) is not None and "error" not in row
        ]
        if len(measured) >= FEWEST_ROWS and len({setting.ranks for setting, _ in measured}) > 1:
            found[f"{device.name}/{kind}"] = _costs(measured)
    return found


def _costs(measured: list[tuple[Setting, Row]]) -> dict[str, Any]:
    layers = np.array([shape_config(setting.model).num_layers for setting, _ in measured])
    per_layer = np.array([PACKED_GROUPS if setting.ranks == "dense" else 2 * PACKED_GROUPS for setting, _ in measured])
    counts = np.stack([layers, layers * per_layer + 1], axis=1)
    beyond = np.array([1e3 * (row["ms_per_token"] - row["floor_ms"]) for _, row in measured])
    costs = _not_negative(counts, beyond)
    return {
        "read_tb_s": round(statistics.median(row["read_tb_s"] for _, row in measured), 3),
        "us_a_layer": round(float(costs[0]), 3),
        "us_a_product": round(float(costs[1]), 3),
        "rows": len(measured),
        "largest_error_ms": round(float(np.abs(counts @ costs - beyond).max()) / 1e3, 3),
        "commits": sorted({row["commit"] for _, row in measured}),
    }


def _not_negative(counts: np.ndarray, beyond: np.ndarray) -> np.ndarray:
    """Least squares of two numbers, none below zero: the best of the solutions with both, and with either at zero."""
    both = np.linalg.lstsq(counts, beyond)[0]
    if (both >= 0).all():
        return both
    alone = [np.eye(2)[i] * max(counts[:, i] @ beyond / (counts[:, i] @ counts[:, i]), 0.0) for i in range(2)]
    return min(alone, key=lambda costs: np.square(counts @ costs - beyond).sum())


def render() -> str:
    """The file's text, from every device's rows."""
    tables: dict[str, Any] = {}
    for device in sorted(file.parent for file in RESULTS.glob("*/decode.jsonl")):
        tables |= fit(device)
    return json.dumps(tables, indent=2) + "\n"


if __name__ == "__main__":
    COSTS_FILE.write_text(render(), encoding="utf-8")
