"""The encoder benchmark runs on a CPU, counts work as PyTorch does, and a failure is a row."""

import importlib
import json
from pathlib import Path

import encoder
import pytest
from encoder_cases import BLOCK_TOKENS, CASES, IMPLS, EncoderCase
from prompt_cases import arguments, measured

torch = pytest.importorskip("torch")


def test_a_tiny_model_is_measured_by_ours_and_by_pytorch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    options = [
        "--models",
        "tiny",
        "--ratios",
        "0.5",
        "--impls",
        "flashsvd_jax-blocks32,jax-scores,torch-eager",
        "--ahead",
        "2",
        "--out",
        str(out),
    ]
    assert encoder.main(options) == 0
    rows = [json.loads(text) for text in out.read_text().splitlines()]
    assert [row["impl"] for row in rows] == ["flashsvd_jax-blocks32", "jax-scores", "torch-eager"]
    assert all(row["latency_ms"] > 0 and "error" not in row and row["commit"] for row in rows), rows
    assert rows[0]["temp_bytes"] > 0 and rows[0]["attention"] and rows[0]["block_tokens"] == 32
    assert capsys.readouterr().out.count("TFLOP/s") == 3


def test_a_failure_is_a_row() -> None:
    (row,) = measured([EncoderCase("torch-sdpa", "unknown", 1.0, 1, 8)], 60, 60)
    assert "unknown" in row["error"] and row["impl"] == "torch-sdpa" and row["commit"]
    (row,) = measured([EncoderCase("flashsvd_jax", "tiny", 1.0, 1, 8)], 0.01, 60)
    assert "no result after" in row["error"]


def test_no_case_begins_when_the_budget_is_spent(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(measured([EncoderCase("flashsvd_jax", "tiny", 1.0, 1, 8)] * 3, 60, -1, 2)) == []
    assert capsys.readouterr().out.count("left out") == 3


@pytest.mark.parametrize(
    ("impl", "preferred", "block_tokens"),
    [
        ("flashsvd_jax", None, None),
        ("flashsvd_jax-products", "products", None),
        ("flashsvd_jax-blocks", None, BLOCK_TOKENS),
        ("flashsvd_jax-products-blocks4096", "products", 4096),
    ],
)
def test_names_say_what_ours_does(impl: str, preferred: str | None, block_tokens: int | None) -> None:
    case = EncoderCase(impl, "tiny", 0.5, 2, 32)
    assert (case.preferred, case.block_tokens) == (preferred, block_tokens)


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_work_is_counted_as_pytorch_counts_it(ratio: float) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    case = EncoderCase("torch-eager", "tiny", ratio, 2, 16)
    model = importlib.import_module("peers.encoder").model_of(case, "cpu").float()
    tokens = torch.ones((2, 16), dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    assert counter.get_total_flops() == pytest.approx(
        case.flops(), rel=0.25 if ratio < 1 else 1e-9
    )  # peers' ranks are rounded


def test_the_cases_are_those_of_the_paper_and_every_implementation_has_them() -> None:
    assert ("bert-base", 0.5, 64, 512) in CASES and ("bert-base", 0.75, 64, 128) in CASES
    found = encoder.chosen(arguments(None, IMPLS, encoder.MODELS, []))
    assert len(found) == len(set(found)) and {case.impl for case in found} == set(IMPLS)
    assert {(c.model, c.ratio, c.batch, c.length) for c in found} == set(CASES)
    assert {c.batch * c.length for c in found if c.impl == "flashsvd_jax-blocks"} == {32768, 131072}
