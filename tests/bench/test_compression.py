"""The benchmark of compression's tables: which rows count, what they are set beside, and what is said of them."""

import math
from pathlib import Path
from typing import Any

import compression_methods
import numpy as np
import pytest
from compression_methods import FINETUNE, Cell, cells
from reporting.compression import Rows, compression

from converters import convert
from flashsvd_jax.bundled import DENSE as DENSE_MODEL
from flashsvd_jax.compress import METHODS, Calibration, Recipe
from flashsvd_jax.compress.dense_layers import DenseLayers

WINDOWS = np.random.default_rng(0).uniform(1.5, 3.5, 30)


def row(
    method: str, ratio: float, alloc: str = "uniform", factor: float = 1.0, noise: float = 0.01, **fields: Any
) -> dict[str, Any]:
    """A model whose losses are those of one text, higher by a factor and some noise."""
    seed = sum(map(ord, f"{method}{ratio}{alloc}"))
    losses = WINDOWS + math.log(factor) + noise * np.random.default_rng(seed).normal(size=30)
    value = math.exp(losses.mean())
    return {
        "method": method, "ratio": ratio, "alloc": alloc, "update": False, "finetune": None, "samples": 4, "length": 8,
        "seed": 0, "perplexity": value, "standard_error": 0.5, "tokens": 300, "windows": 30, "window": 11,
        "window_losses": [[float(loss), 10] for loss in losses],
    } | fields  # fmt: skip


def lines(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


DENSE = row("dense", 1.0)


def test_rows_stand_beside_plain_svd_and_beside_uniform_ranks() -> None:
    text = compression(
        Rows([
            DENSE, row("svd", 0.6, factor=2.0), row("drone", 0.6, factor=1.5), row("drone", 0.6, "greedy", 1.8),
            row("drone", 0.6, "v2", 1.2), row("svd", 0.6, "v2", 2.0),
        ])
    )  # fmt: skip
    head, _, svd, drone = lines(text)
    assert head == ["kept", "method", "uniform", "greedy", "greedy alike", "v2", "fisher"]
    assert svd[:2] == ["0.6", "`svd`"] and svd[3] == "-" and "(" not in svd[2]
    assert [float(cell.split("(")[1].split()[0]) for cell in (*drone[2:4], drone[5])] == pytest.approx(
        [0.75, 1.2, 0.8], abs=0.02
    )
    assert "uniform ranks: `drone` 1 of 1." in text
    assert "`greedy` is better in 0 of 1 and worse in 1 of 1" in text
    assert "`v2` is better in 1 of 2 and worse in 0 of 2" in text


def test_the_error_is_that_of_the_difference_between_windows() -> None:
    text = compression(Rows([DENSE, row("svd", 0.6), row("drone", 0.6, factor=0.99, noise=0.1)]))
    cell = lines(text)[-1][2]
    value, error = (float(part) for part in cell.split("(")[1].rstrip(")").split(" ± "))
    assert error == pytest.approx(0.1 / math.sqrt(30), rel=0.5) and abs(value - 0.99) < 4 * error
    assert "`drone` 0 of 1" in text  # within chance


def test_newer_rows_count_and_other_calibrations_do_not() -> None:
    old = row("svd", 0.6, factor=9.0)
    text = compression(Rows([DENSE, row("drone", 0.8, samples=99), old, row("svd", 0.6, factor=2.0)]))
    assert len(lines(text)) == 3 and float(lines(text)[-1][2]) == pytest.approx(2 * DENSE["perplexity"], rel=0.02)


def test_what_is_fine_tuned_stands_beside_what_was_not() -> None:
    tuned = row("svdllm", 0.4, factor=1.2, finetune=FINETUNE)
    text = compression(Rows([DENSE, row("svdllm", 0.4, factor=1.6), tuned, row("svdllm", 0.6)]))
    assert lines(text)[-1][:2] == ["`svdllm`, fine-tuned", "-"]
    assert float(lines(text)[-1][2].split("(")[1].split()[0]) == pytest.approx(0.75, abs=0.02)
    assert f"{FINETUNE['steps']} steps of {FINETUNE['batch']} windows" in text
    assert compression(Rows([])) == compression(Rows([DENSE])) == ""


def test_cells_are_all_methods_ratios_and_allocations_once() -> None:
    found = list(cells())
    assert len({str(cell) for cell in found}) == len(found)
    plain = {(c.method, c.ratio, c.alloc) for c in found if not (c.update or c.finetune)}
    assert {(m, r, a) for m in METHODS for r in (0.8, 0.6, 0.4) for a in ("uniform", "greedy", "v2")} <= plain
    assert {("basis_sharing", 0.6, "effective"), ("svdllm", 0.4, "importance")} <= plain  # D-Rank and AdaSVD


def test_losses_by_which_sensitivity_chooses_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(DENSE_MODEL, tmp_path / "dense", progress=False)
    text, calls = Calibration("x = 1\n" * 50, "text.txt", 1, 16), []

    def sensitivity(layers: DenseLayers) -> dict[str, list[float]]:
        calls.append(layers)
        return {name: list(np.linspace(3, 2, 9)) for index in range(8) for name in layers.sites(index)}

    monkeypatch.setattr(DenseLayers, "sensitivity", sensitivity)
    found = [
        compression_methods.by_sensitivity(Recipe("asvd", ratio, "sensitivity"), tmp_path / "dense", text)
        for ratio in (0.8, 0.4)
    ]
    assert len(calls) == 1
    assert [recipe.alloc for recipe in found] == ["file", "file"]
    site = "layers_0.self_attn.q_proj"  # 256 x 256
    assert [recipe.ranks and recipe.ranks[site] for recipe in found] == [102, 51]


def test_rows_that_are_there_are_not_measured_again(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    few, measured = [Cell("svd", 0.6, "uniform"), Cell("svd", 0.4, "uniform")], []

    def measure(cell: Cell, *_: Any) -> dict[str, Any]:
        measured.append(cell)
        return row(cell.method, cell.ratio, samples=3, length=16) | {"compress_s": 0.0}

    for name, value in {"cells": lambda: iter(few), "measure": measure, "results_folder": lambda _: tmp_path}.items():
        monkeypatch.setattr(compression_methods, name, value)
    arguments = ["compression_methods.py", "--samples", "3", "--length", "16"]
    monkeypatch.setattr("sys.argv", [*arguments, "--budget", "0"])
    compression_methods.main()
    assert measured == []
    monkeypatch.setattr("sys.argv", arguments)
    compression_methods.main()
    compression_methods.main()
    assert measured == few
    assert len((tmp_path / "compression.jsonl").read_text().splitlines()) == 2
