"""The benchmark of prompts runs on a CPU, and counts work as PyTorch does."""

import json
from pathlib import Path

import prefill
import pytest
from prefill_cases import PrefillCase

from flashsvd_jax.schema import schema

torch = pytest.importorskip("torch")


def test_a_tiny_model_is_measured_by_ours_by_plain_jax_and_by_pytorch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    impls = "flashsvd_jax,jax-cudnn,torch-sdpa"
    assert prefill.main(["--models", "tiny", "--ratios", "0.5", "--impls", impls, "--out", str(out)]) == 0
    rows = [json.loads(text) for text in out.read_text().splitlines()]
    assert [row["impl"] for row in rows] == impls.split(",")
    assert all(row["latency_ms"] > 0 and "error" not in row and row["commit"] for row in rows), rows
    assert capsys.readouterr().out.count("TFLOP/s") == 3


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_work_is_counted_as_pytorch_counts_it(ratio: float) -> None:
    from peers.model import PeerModel
    from peers.run import random_tensors, rounded_ranks
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    case = PrefillCase("torch-sdpa", "tiny", ratio, 2, 32)
    config = rounded_ranks(case.config)
    model = PeerModel(config, random_tensors(config, torch.float32, "cpu"), 2, 33, True)
    # Of all its ways to attend, PyTorch counts the one in single products on every device.
    as_products = sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), as_products:
        model.prefill(torch.ones((2, 32), dtype=torch.long))
    causal = 2 * config.num_layers * 2 * 32 * 32 * config.num_heads * config.head_dim
    last = ("layers_3.self_attn.o_proj", "layers_3.mlp")
    behind = sum(spec.size for name, spec in schema(case.config).items() if name.startswith(last))
    for_nothing = 2 * behind * 2 * (32 - 1)
    # PyTorch counts attention as if nothing were causal, and all tokens behind the last layer; and peers' ranks are rounded.
    wanted = counter.get_total_flops() - causal - for_nothing
    assert config.num_layers == 4 and wanted == pytest.approx(case.flops(), rel=0.25 if ratio < 1 else 1e-9)
