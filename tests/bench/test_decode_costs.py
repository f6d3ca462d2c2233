"""Costs of decoding are found again in rows that were made from them, and the package's are what its rows give."""

import json
from pathlib import Path
from typing import Any

import decode_costs
import pytest

from flashsvd_jax.compress.decode_costs import COSTS_FILE


def rows(kernels: str, us_a_layer: float, us_a_product: float, us_a_differing_layer: float) -> list[dict[str, Any]]:
    found = []
    for ratio, ranks in ((1.0, "dense"), (0.8, "uniform"), (0.6, "uniform"), (0.5, "mixed"), (0.4, "uniform")):
        products = 32 * (4 if ranks == "dense" else 8) + 1
        of_layer = us_a_layer + us_a_differing_layer * (ranks == "mixed")
        beyond = (32 * of_layer + products * us_a_product) / 1e3
        found.append({
            "suite": "decode", "impl": "flashsvd_jax", "kernels": kernels, "model": "llama-2-7b", "ratio": ratio,
            "ranks": ranks, "dtype": "bfloat16", "batch": 1, "context": 512, "ms_per_token": 3 * ratio + beyond,
            "floor_ms": 3 * ratio, "read_tb_s": 4.2, "commit": "abc",
        })  # fmt: skip
    return found


def test_costs_that_rows_were_made_from_are_found(tmp_path: Path) -> None:
    device = tmp_path / "some_gpu"
    device.mkdir()
    made = rows("decode_layers=persistent", 2.0, 0.7, 3.0) + rows("attend_cached=triton", 0.0, 2.5, 0.0)
    others = [made[0] | {"batch": 8, "ms_per_token": 99.0}, made[1] | {"error": "out of memory"}]
    (device / "decode.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*made, *others]))
    found = decode_costs.fit(device)
    assert set(found) == {"some_gpu/persistent", "some_gpu/products"}
    for name, us_a_layer, us_a_product, differing in (("persistent", 2.0, 0.7, 3.0), ("products", 0.0, 2.5, 0.0)):
        costs = found[f"some_gpu/{name}"]
        assert costs["us_a_layer"] == pytest.approx(us_a_layer, abs=1e-3)
        assert costs["us_a_product"] == pytest.approx(us_a_product, abs=1e-3)
        assert costs["us_a_differing_layer"] == pytest.approx(differing, abs=1e-3)
        assert costs["read_tb_s"] == 4.2 and costs["rows"] == 5 and costs["largest_error_ms"] == 0


def test_newer_rows_of_layers_that_are_alike_wait_for_others_that_differ(tmp_path: Path) -> None:
    device = tmp_path / "some_gpu"
    device.mkdir()
    older, newer = (
        [row | {"date": date, "commit": date} for row in rows("decode_layers=persistent", cost, 0.7, 3.0)]
        for date, cost in (("2026-01-01", 2.0), ("2026-01-02", 1.0))
    )
    one_run = [row | {"date": "2026-01-03" if row["ranks"] == "uniform" else row["date"]} for row in newer]

    def layer_cost(*measured: list[dict[str, Any]]) -> float:
        (device / "decode.jsonl").write_text("".join(json.dumps(row) + "\n" for some in measured for row in some))
        return decode_costs.fit(device)["some_gpu/persistent"]["us_a_layer"]

    assert layer_cost(older, [row for row in newer if row["ranks"] != "mixed"]) == pytest.approx(2.0, abs=1e-3)
    assert layer_cost(older, newer) == layer_cost(older, one_run) == pytest.approx(1.0, abs=1e-3)


def test_no_cost_is_below_zero(tmp_path: Path) -> None:
    device = tmp_path / "some_gpu"
    device.mkdir()
    made = rows("attend_cached=triton", 40.0, -1.0, -2.0)
    (device / "decode.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    costs = decode_costs.fit(device)["some_gpu/products"]
    assert (
        costs["us_a_product"] == 0 == costs["us_a_differing_layer"]
        and 25 < costs["us_a_layer"] < 40
        and costs["largest_error_ms"] > 0.05
    )


def test_the_packages_costs_are_what_its_rows_give() -> None:
    assert COSTS_FILE.read_text(encoding="utf-8") == decode_costs.render()
