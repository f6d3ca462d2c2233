"""Tables and plots of prompts and encoders from rows: what they compare, and that they leave out what was not measured."""

import json
from pathlib import Path
from typing import Any

from reporting import plots, prompt_plots, prompts

MIB = 2**20


def row(impl: str, ms: float, mib: float | None = None, **fields: Any) -> dict[str, Any]:
    return {
        "suite": "encoder", "impl": impl, "model": "bert-base", "ratio": 0.5, "batch": 64, "length": 512, "latency_ms": ms,
        "temp_bytes": mib and int(mib * MIB), "peak_activation_bytes": None, "tflops": 1000 / ms, "matmul_tflops": 700.0,
    } | fields  # fmt: skip


def write(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_encoders_are_compared_with_plain_svd_and_dense(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        row("flashsvd_jax", 10.0, 120),
        row("flashsvd_jax-blocks", 11.0, 30),
        row("flashsvd_jax-products", 13.0, 430),
        row("jax-cudnn", 12.0, 400),
        row("jax-scores", 20.0, 1200),
        row("torch-eager", 25.0, None, peak_activation_bytes=1000 * MIB),
        row("jax-cudnn", 15.0, 480, ratio=1.0),
        {**row("jax-scores", 1.0, 1, ratio=1.0), "error": "out of memory"},
    )
    table = cells(prompts.encoder_factors(file))
    assert [line[3:] for line in table[2:]] == [
        ["flashsvd_jax", "-90%", "-", "-70%", "-75%", "1.20x", "1.50x", "2.50x"],
        ["blocks of 8192 tokens", "-98%", "-", "-92%", "-94%", "1.09x", "1.36x", "2.27x"],
    ]
    assert "fails" in cells(prompts.encoder(file))[2]


def test_prompts_are_compared_with_the_matrix_rate_and_with_dense_models(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        row("flashsvd_jax", 10.0, matmul_tflops=200.0),
        row("jax-cudnn", 12.0),
        row("flashsvd_jax", 18.0, ratio=1.0),
        row("jax-cudnn", 16.0, ratio=1.0),
        {**row("torch-sdpa", 1.0), "error": "out of memory"},
        {**row("torch-sdpa", 1.0, ratio=1.0), "error": "out of memory"},
    )
    table = [line[1:] for line in cells(prompts.prefill_factors(file))[2:]]
    assert table == [
        ["all (dense)", "64 x 512", "8%", "-", "-", "0.89x", "-", "-"],
        ["0.50", "64 x 512", "50%", "1.80x", "1.60x", "1.20x", "-", "-"],
    ]


def test_nothing_to_compare_with_gives_no_table(tmp_path: Path) -> None:
    assert prompts.encoder_factors(write(tmp_path, row("flashsvd_jax", 10.0, 120))) == ""
    assert prompt_plots.plots(tmp_path / "none", tmp_path / "none") == {}


def test_encoders_are_drawn_against_their_ratio(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        row("flashsvd_jax", 12.0, 140, ratio=0.75),
        row("flashsvd_jax", 10.0, 120),
        row("jax-cudnn", 12.0, 400),
        row("jax-cudnn", 9.0, 400, length=128),
        {**row("jax-scores", 1.0, 1), "error": "out of memory"},
    )
    drawn = prompt_plots.plots(file, tmp_path / "none")
    assert set(drawn) == {"encoder_latency", "encoder_memory"}
    (panel,) = drawn["encoder_memory"]["panels"]
    assert [(s["label"], s["x"], s["y"]) for s in panel["series"]] == [
        ("flashsvd_jax", [0.5, 0.75], [120.0, 140.0]),
        ("plain JAX, cuDNN attention", [0.5], [400.0]),
    ]


def test_prompts_are_drawn_against_their_tokens(tmp_path: Path) -> None:
    llama = {"model": "llama-2-7b"}
    file = write(
        tmp_path,
        row("flashsvd_jax", 10.0, **llama, batch=8),
        row("flashsvd_jax", 5.0, **llama, batch=1),
        row("flashsvd_jax", 5.0, **llama, ratio=1.0),
    )
    drawn = prompt_plots.plots(tmp_path / "none", file)
    (panel,) = drawn["prefill"]["panels"]  # one dense row is no line
    assert panel["series"] == [
        {"label": "flashsvd_jax", "x": [512, 4096], "y": [200.0, 100.0]},
        {"label": plots.MATRIX_RATE, "x": [512, 4096], "y": [700.0, 700.0]},
    ]
    plots.write(tmp_path / "plots", drawn)
    assert plots.stale(tmp_path / "plots", drawn) == []
