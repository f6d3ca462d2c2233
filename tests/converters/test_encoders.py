"""Conversions of encoders against the transformers models they were saved from: every head, container and kind of name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_modules import ABLinear, LinLinear, SequentialPair, UVLinear, compress
from converted_encoders import TOKENS, converted, folder_outputs
from hf_encoders import ARCHITECTURES, HEADS, build_encoder, canonical_encoder
from published_checkpoints import save_safetensors, save_shards, write_config

from converters import convert
from converters.encoder_naming import naming_of
from flashsvd_jax.checkpoint import load_params
from flashsvd_jax.encoder_config import EncoderConfig
from flashsvd_jax.errors import ConversionError
from flashsvd_jax.schema import flatten, sites


def hf_config(model: Any, **added: Any) -> dict[str, Any]:
    return json.loads(model.config.to_json_string(use_diff=False)) | added


def tensors(model: Any) -> dict[str, torch.Tensor]:
    """As `save_pretrained` stores them: tensors that are another one are left out."""
    kept: dict[int, str] = {}
    return {n: t.contiguous() for n, t in model.state_dict().items() if kept.setdefault(t.data_ptr(), n) == n}


def source_outputs(model: Any, tokens: np.ndarray = TOKENS) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long())[0].numpy()


def ranks_by_module(model: Any) -> dict[str, int]:
    """Another rank for nearly every projection of the layers, by module path in the whole model; every third stays dense."""
    naming, config = (
        naming_of(EncoderConfig.from_hf(model.config.to_dict())),
        EncoderConfig.from_hf(model.config.to_dict()),
    )
    names = [site.name for site in sites(config) if site.name.startswith("layers_")]
    return {naming.whole(naming.module(name)): 4 + i for i, name in enumerate(names) if i % 3 != 1}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dense_checkpoints(architecture: str, head: str, tmp_path: Path) -> None:
    model = build_encoder(architecture, head)
    report = converted(save_safetensors(tmp_path / "in", tensors(model), hf_config(model)), tmp_path)
    assert report.family == "dense"
    stored = flatten(load_params(tmp_path / "out"))
    want = canonical_encoder(model)
    assert stored.keys() == want.keys()
    assert all(np.array_equal(stored[name], want[name]) for name in want)
    np.testing.assert_allclose(folder_outputs(tmp_path / "out"), source_outputs(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "head", "layer", "family"),
    [
        ("bert", "Model", UVLinear, "aa_svd"),
        ("modernbert", "Model", UVLinear, "aa_svd"),
        ("modernbert_bias", "ForMaskedLM", SequentialPair, "sequential"),
        ("bert_tanh", "ForMaskedLM", LinLinear, "fwsvd"),
        ("roberta", "ForSequenceClassification", SequentialPair, "sequential"),
        ("distilbert", "ForMaskedLM", ABLinear, "bare_ab"),
    ],
)
def test_pairs_of_factors_in_a_pickle(architecture: str, head: str, layer: Any, family: str, tmp_path: Path) -> None:
    model = build_encoder(architecture, head)
    ranks = ranks_by_module(model)
    compress(model, ranks, layer)
    base = write_config(tmp_path / "base", hf_config(model))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    report = converted(tmp_path / "pytorch_model.bin", tmp_path, base=base, verify=True)
    assert report.family == family
    assert sorted(report.config.factorization.rank_by_site.values()) == sorted(ranks.values())
    assert report.verification is not None and report.verification.worst_error <= 1e-12
    np.testing.assert_allclose(folder_outputs(tmp_path / "out"), source_outputs(model), rtol=0, atol=1e-4)
    (row,) = (line for line in str(report).splitlines() if line.strip().startswith("layer"))
    columns = (
        ["qkv", "o", "gate_up", "down"] if architecture.startswith("modern") else ["q", "k", "v", "o", "up", "down"]
    )
    assert row.split() == ["layer", *columns]


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_shards(suffix: str, tmp_path: Path) -> None:
    model = build_encoder("roberta", "ForMaskedLM")
    converted(save_shards(tmp_path / "in", tensors(model), hf_config(model), suffix), tmp_path)
    np.testing.assert_allclose(folder_outputs(tmp_path / "out"), source_outputs(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "modernbert"])
def test_outputs_are_compared_with_transformers(architecture: str, head: str, tmp_path: Path) -> None:
    model = build_encoder(architecture, head)
    compress(model, ranks_by_module(model), UVLinear)
    source = save_safetensors(tmp_path / "in", tensors(model), hf_config(model))
    report = converted(source, tmp_path, verify=True, logits_fn=folder_outputs)
    assert report.verification is not None
    assert report.verification.logits.startswith("logits of 24 tokens, largest difference from PyTorch ")
    with pytest.raises(ConversionError, match="does not verify: logits differ from PyTorch's"):
        wrong = lambda path, tokens: folder_outputs(path, tokens) + 0.01  # noqa: E731
        convert(source, tmp_path / "wrong", dtype="float32", progress=False, verify=True, logits_fn=wrong)


def test_names_without_the_models_own_prefix_old_names_of_norms_and_buffers(tmp_path: Path) -> None:
    model = build_encoder("bert", "ForMaskedLM")
    renamed = {"embeddings.position_ids": torch.arange(37)[None]}
    for name, tensor in tensors(model).items():
        name = name.removeprefix("bert.")
        norm = name.rpartition(".")[0].endswith("LayerNorm")
        leaf = {"weight": "gamma", "bias": "beta"}[name.rpartition(".")[2]] if norm else name.rpartition(".")[2]
        renamed[f"{name.rpartition('.')[0]}.{leaf}"] = tensor
    report = converted(save_safetensors(tmp_path / "in", renamed, hf_config(model)), tmp_path)
    assert "embeddings.position_ids" in str(report)
    np.testing.assert_allclose(folder_outputs(tmp_path / "out"), source_outputs(model), rtol=0, atol=1e-4)


def test_what_only_pretraining_needs_is_left_out_and_named(tmp_path: Path) -> None:
    model = build_encoder("bert", "ForPreTraining")
    everything = {name: tensor.clone() for name, tensor in model.state_dict().items()}  # tied ones too
    report = converted(save_safetensors(tmp_path / "in", everything, hf_config(model)), tmp_path)
    (note,) = report.notes
    assert "bert.pooler.dense.weight" in note and "6 tensors were not needed" in note
    np.testing.assert_allclose(folder_outputs(tmp_path / "out"), source_outputs(model), rtol=0, atol=1e-4)


def test_the_body_of_a_checkpoint_with_a_head(tmp_path: Path) -> None:
    model = build_encoder("roberta", "ForSequenceClassification")
    source = save_safetensors(tmp_path / "in", tensors(model), hf_config(model, architectures=["RobertaModel"]))
    assert "4 tensors were not needed: classifier.dense" in str(converted(source, tmp_path))
    with torch.no_grad():
        want = model.roberta(torch.from_numpy(TOKENS).long())[0].numpy()
    np.testing.assert_allclose(folder_outputs(tmp_path / "out"), want, rtol=0, atol=1e-4)


def test_a_tied_head_with_other_values_is_refused(tmp_path: Path) -> None:
    model = build_encoder("bert", "ForMaskedLM")
    everything = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("cls.predictions.decoder.weight", "cls.predictions.bias"):
        wrong = everything | {name: everything[name] + 1}
        source = save_safetensors(tmp_path / name, wrong, hf_config(model))
        with pytest.raises(ConversionError, match=f"{name} differs from "):
            converted(source, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architecture", ["bert", "bert_tanh", "roberta"])
def test_the_bias_of_the_output_layer_under_either_of_its_names(architecture: str, tmp_path: Path) -> None:
    model = build_encoder(architecture, "ForMaskedLM")
    block = "lm_head" if architecture == "roberta" else "cls.predictions"
    given = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given[f"{block}.bias"] = given.pop(f"{block}.decoder.bias")
    converted(save_safetensors(tmp_path / "in", given, hf_config(model)), tmp_path)
    np.testing.assert_allclose(folder_outputs(tmp_path / "out"), source_outputs(model), rtol=0, atol=1e-4)


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    model = build_encoder("distilbert")
    given = tensors(model)
    given["transformer.layer.2.ffn.lin1.weight"] = given.pop("transformer.layer.1.ffn.lin1.weight")
    with pytest.raises(ConversionError) as caught:
        converted(save_safetensors(tmp_path / "in", given, hf_config(model)), tmp_path)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        "missing: transformer.layer.1.ffn.lin1.weight [46, 36]",
        "unexpected: transformer.layer.2.ffn.lin1.weight [46, 36]",
    ]


def test_a_map_of_ranks_has_names_with_the_prefix_or_without(tmp_path: Path) -> None:
    model = build_encoder("bert", "ForMaskedLM")
    ranks = ranks_by_module(model)
    compress(model, ranks, ABLinear)
    for folder, prefix in (("with", ""), ("without", "bert.")):
        said = {name.removeprefix(prefix): rank for name, rank in ranks.items()}
        config = hf_config(model, truncation_ranks=said)
        source = save_safetensors(tmp_path / folder / "in", tensors(model), config)
        assert converted(source, tmp_path / folder).family == "asvd"
    wrong = {name: rank + 1 for name, rank in ranks.items()}
    source = save_safetensors(tmp_path / "wrong", tensors(model), hf_config(model, truncation_ranks=wrong))
    with pytest.raises(ConversionError, match=f"{len(ranks)} problems"):
        converted(source, tmp_path)
