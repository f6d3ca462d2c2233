"""The script that compresses the bundled model, on tiny untrained models: its algebra and its PyTorch modules."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """The compression script; its folder is on the path, as when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench" / "bundled_model"))
        yield importlib.import_module("compress_svdllm")
    for name in ("compress_svdllm", "svd_llama", "component", "component.svd_llama"):
        sys.modules.pop(name, None)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        initializer_range=0.2,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=96,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def batches() -> list[torch.Tensor]:
    return list(torch.randint(0, 97, (8, 40), generator=torch.Generator().manual_seed(1)).split(4))


def test_rank_keeps_the_ratio_of_parameters_rounded_down(script: Any) -> None:
    assert script.parameter_rank(256, 256, 0.6) == 76
    assert script.parameter_rank(64, 256, 0.6) == 30
    assert script.parameter_rank(4096, 4096, 0.5) == 1024


def test_full_rank_changes_nothing(script: Any, model: Any, batches: list[torch.Tensor]) -> None:
    with torch.no_grad():
        dense = model(batches[0]).logits
        script.compress(model, batches, ratio=2.0)
        torch.testing.assert_close(model(batches[0]).logits, dense, atol=1e-3, rtol=1e-3)


def test_factors_reach_the_least_error_that_the_rank_allows(script: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    weight, x = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((20, 30), (200, 30)))
    x = x * torch.logspace(0, -2, 30, dtype=torch.float64)
    u, v = script.factorize(weight, x.T @ x, rank=6)
    error = torch.linalg.norm(x @ (weight - u @ v).T)
    least = torch.linalg.norm(torch.linalg.svdvals(x @ weight.T)[6:])
    torch.testing.assert_close(error, least)


def test_sqrt_of_sigma_is_on_both_factors(script: Any) -> None:
    weight = torch.randn(10, 14, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    u, v = script.factorize(weight, torch.eye(14, dtype=torch.float64), rank=4)
    sigma = torch.linalg.svdvals(weight)[:4]
    torch.testing.assert_close(u.T @ u, torch.diag(sigma), atol=1e-10, rtol=0)
    torch.testing.assert_close(v @ v.T, torch.diag(sigma), atol=1e-10, rtol=0)


def test_inputs_that_span_less_than_the_space_are_handled(script: Any) -> None:
    generator = torch.Generator().manual_seed(4)
    weight, x = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((20, 30), (12, 30)))
    u, v = script.factorize(weight, x.T @ x, rank=12)
    torch.testing.assert_close(x @ (u @ v).T, x @ weight.T, atol=1e-3, rtol=1e-3)


def test_gram_matrices_are_of_the_inputs_of_each_projection(
    script: Any, model: Any, batches: list[torch.Tensor]
) -> None:
    grams = script.input_grams(model, batches)
    with torch.no_grad():
        x = torch.cat([model.model.layers[0].input_layernorm(model.model.embed_tokens(b)) for b in batches])
    x = x.flatten(0, 1).double()
    assert len(grams) == 14
    torch.testing.assert_close(grams["model.layers.0.self_attn.k_proj"], x.T @ x)
    assert grams["model.layers.1.mlp.down_proj"].shape == (80, 80)


def test_cached_decoding_agrees_with_the_whole_sequence(script: Any, model: Any, batches: list[torch.Tensor]) -> None:
    script.compress(model, batches, ratio=0.6)
    prompt = batches[0][:2, :7]
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    with torch.no_grad():
        again = model(out[:, :-1]).logits.argmax(-1)[:, 6:]
    ends = (out[:, 7:] == 96).cumsum(1) > 0
    assert ((again == out[:, 7:]) | ends).all()


def test_checkpoint_survives_pickling(script: Any, model: Any, batches: list[torch.Tensor], tmp_path: Path) -> None:
    script.compress(model, batches, ratio=0.6)
    frequencies = model.model.layers[0].self_attn.rotary_emb.inv_freq.clone()
    rounded = script.save_checkpoint(model, None, tmp_path / "tiny.pt")
    loaded = torch.load(tmp_path / "tiny.pt", weights_only=False)["model"]
    assert {p.dtype for p in loaded.parameters()} == {torch.float16}
    torch.testing.assert_close(loaded.model.layers[0].self_attn.rotary_emb.inv_freq, frequencies, atol=0, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(loaded.float()(batches[0]).logits, rounded(batches[0]).logits, atol=0, rtol=0)
