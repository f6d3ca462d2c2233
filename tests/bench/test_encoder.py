"""The encoder benchmark runs on a CPU, counts work as PyTorch does, and a failure is a row."""

import importlib
import json
from pathlib import Path
from typing import Any

import encoder
import jax.numpy as jnp
import numpy as np
import pytest
from encoder_cases import BLOCK_TOKENS, CASES, IMPLS, SHAPES, EncoderCase
from peers.jax_modernbert import modernbert
from prompt_cases import arguments, measured

from flashsvd_jax.encoder_config import EncoderConfig

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


TINY_MODERN = {
    "model_type": "modernbert", "vocab_size": 128, "max_position_embeddings": 256, "hidden_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "intermediate_size": 96, "global_attn_every_n_layers": 3, "local_attention": 16,
    "hidden_activation": "gelu", "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("tokens", [64, 43, 5])
def test_plain_jax_computes_what_pytorch_does_of_modernbert(
    scores: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPES, "tiny-modern", TINY_MODERN)
    torch.manual_seed(0)
    model: Any = importlib.import_module("peers.encoder").model_of(
        EncoderCase("torch-eager", "tiny-modern", 1.0, 2, tokens), "cpu"
    )
    model.float()
    ids = torch.randint(1, 128, (2, tokens))
    names = {"qkv": "attn.Wqkv", "o": "attn.Wo", "gate_up": "mlp.Wi", "down": "mlp.Wo"}
    layers = [
        {n: (layer.get_submodule(path).weight.detach().numpy(),) for n, path in names.items()} for layer in model.layers
    ]
    with torch.no_grad():
        expected, x = model(input_ids=ids).last_hidden_state, model.embeddings(input_ids=ids)
    found = modernbert(EncoderConfig.from_hf(TINY_MODERN), scores, layers, jnp.asarray(x.numpy()))
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-5)


@pytest.mark.parametrize("impl", ["jax-cudnn", "flashsvd_jax", "torch-sdpa"])
def test_a_low_rank_modernbert_is_measured_by_all(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny-modern", TINY_MODERN)
    case = EncoderCase(impl, "tiny-modern", 0.5, 2, 32)
    module = {"jax-cudnn": "peers.jax_encoder", "flashsvd_jax": "encoder_ours", "torch-sdpa": "peers.encoder"}[impl]
    with torch.enable_grad():  # and so again afterwards
        assert importlib.import_module(module).main(case)["latency_ms"] > 0


def test_the_cases_are_those_of_the_paper_and_every_implementation_has_them() -> None:
    assert ("bert-base", 0.5, 64, 512) in CASES and ("bert-base", 0.75, 64, 128) in CASES
    found = encoder.chosen(arguments(None, IMPLS, encoder.MODELS, []))
    assert len(found) == len(set(found)) and {case.impl for case in found} == set(IMPLS)
    assert {(c.model, c.ratio, c.batch, c.length) for c in found} == set(CASES)
    assert {c.batch * c.length for c in found if c.impl == "flashsvd_jax-blocks"} == {32768, 131072}
