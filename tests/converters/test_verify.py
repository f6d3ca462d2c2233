"""Verification passes what is right, notices every kind of damage, and leaves no damaged folder behind."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from folder_logits import folder_logits
from published_checkpoints import CASES

from converters import convert, engine, verify_logits
from flashsvd_jax.checkpoint import FolderWriter
from flashsvd_jax.errors import ConversionError


def damaging(damage: Callable[[str, np.ndarray], np.ndarray]) -> type[FolderWriter]:
    class Damaging(FolderWriter):
        def add(self, name: str, array: np.ndarray) -> None:
            super().add(name, damage(name, np.array(array)))

    return Damaging


PRODUCTS = (
    "corda",
    "fisher_svd",
    "lora",
    "lora-factors",
    "eigen_attention",
    "modegpt",
)  # some weights are computed, and rounded to float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_conversions_verify(case: str, dtype: str, published, tmp_path) -> None:
    source = published(case)
    report = convert(source.path, tmp_path / "out", base=source.base, dtype=dtype, verify=True, progress=False)
    verification = report.verification
    assert verification is not None and verification.sites == 7 * report.config.num_layers + (
        not report.config.tie_embeddings
    )
    if dtype == "float32":
        assert verification.worst_error <= (1e-7 if case in PRODUCTS else 1e-12)  # the very same numbers
    else:
        assert 1e-4 < verification.worst_error < 1e-2  # rounded once
    assert "logits not compared: no function" in str(report)


@pytest.mark.parametrize(
    ("case", "dtype"), [("lowrankarena-qwen2", "float32"), ("svdllm", "bfloat16"), ("dense-llama-tied", "float16")]
)
def test_logits_are_compared_with_pytorchs(case: str, dtype: str, published, tmp_path) -> None:
    report = convert(
        published(case).path, tmp_path / "out", dtype=dtype, verify=True, logits_fn=folder_logits, progress=False
    )
    assert report.verification is not None
    words, _, difference = report.verification.logits.rpartition(" ")
    assert words == "logits of 24 tokens, largest difference from PyTorch"
    assert 0 < float(difference) < {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-1}[dtype]
    assert report.verification.logits in str(report)


def scaled(part: str) -> Callable[[str, np.ndarray], np.ndarray]:
    return lambda name, array: array * np.float32(1.05) if name == part else array


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("case", "part", "named"),
    [
        ("lowrankarena-qwen2", "layers_1.self_attn.q_proj.down", "layers_1.self_attn.q_proj"),
        ("lowrankarena-qwen2", "layers_0.self_attn.q_proj.bias", "layers_0.self_attn.q_proj"),
        ("lowrankarena-qwen2", "layers_0.self_attn.v_proj.weight", "layers_0.self_attn.v_proj"),
        ("svdllm", "layers_1.mlp.down_proj.up", "layers_1.mlp.down_proj"),
        ("svdllm", "lm_head.weight", "lm_head"),
        ("lems", "embed_tokens.weight", "embed_tokens.weight"),
        ("lems", "layers_0.input_layernorm.scale", "layers_0.input_layernorm.scale"),
        ("dobi", "layers_1.self_attn.k_norm.scale", "layers_1.self_attn.k_norm.scale"),
        ("dobi-pickle", "norm.scale", "norm.scale"),
    ],
)
def test_damage_is_noticed_and_nothing_is_left(case, part, named, dtype, published, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(engine, "FolderWriter", damaging(scaled(part)))
    source = published(case)
    with pytest.raises(ConversionError, match=f"does not verify, these differ from the source: {named}( |$)"):
        convert(source.path, tmp_path / "out", base=source.base, dtype=dtype, verify=True, progress=False)
    assert not (tmp_path / "out").exists()


def test_small_errors_show_where_nothing_was_rounded(published, tmp_path, monkeypatch) -> None:
    part = "layers_0.mlp.up_proj.weight"
    monkeypatch.setattr(engine, "FolderWriter", damaging(lambda name, a: a * (1 + 1e-5 * (name == part))))
    with pytest.raises(ConversionError, match=r"source: layers_0.mlp.up_proj \(relative error 1.0e-05\)$"):
        convert(published("asvd").path, tmp_path / "out", dtype="float32", verify=True, progress=False)
    convert(published("asvd").path, tmp_path / "out", dtype="bfloat16", verify=True, progress=False)


def test_exchanged_sites_are_noticed(published, tmp_path, monkeypatch) -> None:
    kept: dict[str, np.ndarray] = {}

    def exchange(name: str, array: np.ndarray) -> np.ndarray:
        kept[name] = array
        return kept["layers_0.self_attn.k_proj.weight"] if name == "layers_0.self_attn.v_proj.weight" else array

    monkeypatch.setattr(engine, "FolderWriter", damaging(exchange))
    with pytest.raises(ConversionError, match=r"source: layers_0\.self_attn\.v_proj "):
        convert(published("dense-mistral").path, tmp_path / "out", verify=True, progress=False)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-2), ("bfloat16", 1.0)])
def test_wrong_logits_are_noticed(dtype: str, error: float, published, tmp_path) -> None:
    def wrong(path: Path, tokens: np.ndarray) -> np.ndarray:
        logits = folder_logits(path, tokens)
        logits = np.array(logits)
        logits[0, -1, 3] += error
        return logits

    source = published("dense-llama-tied")
    with pytest.raises(ConversionError, match="logits differ from PyTorch's by"):
        convert(source.path, tmp_path / "out", dtype=dtype, verify=True, logits_fn=wrong, progress=False)
    assert not (tmp_path / "out").exists()


def test_logits_that_are_not_numbers_are_noticed(published, tmp_path) -> None:
    def nan(path: Path, tokens: np.ndarray) -> np.ndarray:
        return np.full((*tokens.shape, 97), np.nan, np.float32)

    with pytest.raises(ConversionError, match="logits differ from PyTorch's by nan"):
        convert(published("dense-mistral").path, tmp_path / "out", verify=True, logits_fn=nan, progress=False)


def test_why_logits_are_not_compared_is_said(published, tmp_path, monkeypatch) -> None:
    def never(path: Path, tokens: np.ndarray) -> np.ndarray:
        raise AssertionError("asked for logits")

    def logits(name: str) -> str:
        report = convert(published("asvd").path, tmp_path / name, verify=True, logits_fn=never, progress=False)
        assert report.verification is not None
        return report.verification.logits

    with monkeypatch.context() as patch:
        patch.setattr(verify_logits, "_MAX_BYTES", 100_000)
        assert logits("large") == "logits not compared: the dense model takes more than 0.0001 GB in float32"
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(verify_logits, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    assert logits("no PyTorch") == "logits not compared: PyTorch is not installed"
