"""Checkpoints of base models with names or layouts of their own, dense and compressed, against the models they were saved from."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_modules import (
    SVDLLM_MODULES,
    ABLinear,
    FirstSecond,
    LinLinear,
    ProjLinear,
    SequentialPair,
    UVLinear,
    compress,
    compress_in_blocks,
)
from folder_logits import folder_logits
from hf_models import build_model, hf_path
from published_checkpoints import hf_config, save_pickle, save_safetensors, state_dict, write_config
from torch import nn

from converters import convert
from flashsvd_jax.checkpoint import open_folder
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.errors import ConversionError
from flashsvd_jax.schema import sites

TOKENS = np.random.default_rng(0).integers(2, 59, (2, 19)).astype(np.int32)
ARCHITECTURES = ("phi3", "gemma2", "gemma3", "opt", "gpt2")
PAIRS: dict[str, tuple[type[nn.Module], str]] = {
    "phi3": (UVLinear, "aa_svd"),
    "gemma2": (LinLinear, "fwsvd"),
    "gemma3": (SequentialPair, "sequential"),
    "opt": (FirstSecond, "dynrank"),
    "gpt2": (ProjLinear, "zs_svd"),
}


def ranks_of(model: Any) -> dict[str, int]:
    """A rank of its own for two projections in three, by module path; every third one stays dense."""
    config = ModelConfig.from_hf(model.config.to_dict())
    modules = [hf_path(config.model_type, site.name) for site in sites(config) if site.name != "lm_head"]
    return {module: 3 + index for index, module in enumerate(modules) if index % 3 != 2}


def save_bare(folder: Path, model: nn.Module) -> Path:
    """A state dict in a pickle beside its configuration."""
    write_config(folder, hf_config(model))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def check(source: Path, model: nn.Module, out: Path, family: str, ranks: Mapping[str, int], **options: Any) -> Any:
    """Converts, with the converter's own comparison, and compares logits with those of the model that was saved."""
    report = convert(source, out, dtype="float32", verify=True, progress=False, logits_fn=folder_logits, **options)
    with torch.no_grad():
        want = model(torch.from_numpy(TOKENS).long()).logits.numpy()
    np.testing.assert_allclose(folder_logits(out, TOKENS), want, rtol=0, atol=1e-4)
    kind = report.config.model_type
    assert {hf_path(kind, site): rank for site, rank in report.config.factorization.ranks} == ranks
    assert report.family == family
    assert report.verification.sites == len(sites(report.config)) and "from PyTorch" in report.verification.logits
    return report


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pairs_of_factors_under_the_models_own_names(architecture: str, tmp_path: Path) -> None:
    model = build_model(architecture)
    layer, family = PAIRS[architecture]
    compress(model, ranks := ranks_of(model), layer)
    check(save_bare(tmp_path / "in", model), model, tmp_path / "out", family, ranks)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dense_weights(architecture: str, tmp_path: Path) -> None:
    model = build_model(architecture)
    source = save_safetensors(tmp_path / "in", state_dict(model), hf_config(model))
    check(source, model, tmp_path / "out", "dense", {})


@pytest.mark.parametrize(("architecture", "module"), [("phi3", "self_attn.qkv_proj"), ("opt", "fc1")])
def test_ranks_of_the_configuration_are_compared_under_the_models_own_names(
    architecture: str, module: str, tmp_path: Path
) -> None:
    model = build_model(architecture)
    compress(model, ranks := ranks_of(model), ABLinear)
    (name,) = (name for name in ranks if name.endswith(f".0.{module}"))
    said = {
        "low_rank_modules": {module: {"rank": rank} for module, rank in ranks.items()},
        "low_rank_schema": "ABLinear",
    }
    config = hf_config(model, model_type=f"lowrank_{architecture}", **said)
    source = save_safetensors(tmp_path / "in", state_dict(model), config)
    report = convert(source, tmp_path / "out", progress=False)
    assert (report.family, report.config.model_type) == ("lowrankarena", architecture)
    said["low_rank_modules"][name] = {"rank": 9 + ranks[name]}
    write_config(tmp_path / "in", config)
    with pytest.raises(ConversionError, match=rf"says rank {9 + ranks[name]} for \S*{module}, the tensors say rank"):
        convert(source, tmp_path / "other", progress=False)


def test_svdllm_keeps_opts_factors_in_its_blocks(tmp_path: Path) -> None:
    model = build_model("opt")
    compress_in_blocks(model, ranks := ranks_of(model))
    source = save_pickle(tmp_path / "opt_whitening_only_0.8.pt", model, SVDLLM_MODULES)
    check(source, model, tmp_path / "out", "svdllm", ranks)


@pytest.mark.parametrize(("architecture", "prefix"), [("gpt2", "transformer."), ("opt", "model.")])
def test_names_of_the_class_without_a_head(architecture: str, prefix: str, tmp_path: Path) -> None:
    """As the first GPT-2 and OPT checkpoints have them; GPT-2's with its masks."""
    model = build_model(architecture)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in state_dict(model).items()}
    masks = {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    tensors |= masks if architecture == "gpt2" else {}
    source = save_safetensors(tmp_path / "in", tensors, hf_config(model))
    check(source, model, tmp_path / "out", "dense", {})


def _transposed(tensors: dict[str, torch.Tensor], chosen: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    return {
        name: tensor.T.contiguous() if ".c_" in name and name.endswith("weight") and chosen(name) else tensor
        for name, tensor in tensors.items()
    }


def test_gpt2_may_hold_its_weights_either_way_round(tmp_path: Path) -> None:
    """The square weight of c_proj has the layout of the others."""
    model = build_model("gpt2")
    tensors = _transposed(state_dict(model), lambda name: True)
    check(save_safetensors(tmp_path / "in", tensors, hf_config(model)), model, tmp_path / "out", "dense", {})


def test_gpt2_with_weights_both_ways_round_is_refused(tmp_path: Path) -> None:
    model = build_model("gpt2")
    tensors = _transposed(state_dict(model), lambda name: "c_fc" in name)
    source = save_safetensors(tmp_path / "in", tensors, hf_config(model))
    with pytest.raises(
        ConversionError, match=r"c_\w+.weight as \[inputs, outputs\] and .*c_fc.weight as .*attn.c_proj.weight is"
    ):
        convert(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_mis_shaped_weight_of_gpt2_is_named_as_it_is_stored(tmp_path: Path) -> None:
    model = build_model("gpt2")
    tensors = state_dict(model)
    tensors["transformer.h.1.mlp.c_fc.weight"] = torch.zeros(56, 43)
    source = save_safetensors(tmp_path / "in", tensors, hf_config(model))
    with pytest.raises(ConversionError, match=r"h.1.mlp.c_fc.weight is \[56, 43\], the base model makes it \[56, 44\]"):
        convert(source, tmp_path / "out", progress=False)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_model_of_a_gemma3_that_sees(prefix: str, tmp_path: Path) -> None:
    """Its configuration leaves out what it has in common with the class, and the vision tower is not needed."""
    model = build_model("gemma3", num_attention_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-6)
    compress(model, ranks := ranks_of(model), ABLinear)
    text = hf_config(model)
    left_out = ("num_attention_heads", "max_position_embeddings", "rms_norm_eps", "architectures")
    config = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 7],
        "text_config": {key: value for key, value in text.items() if key not in (*left_out, "eos_token_id")},
        "vision_config": {"hidden_size": 12},
    }
    tensors = {prefix + name.removeprefix("model."): tensor for name, tensor in state_dict(model).items()}
    tensors |= {"vision_tower.vision_model.embeddings.position_embedding.weight": torch.zeros(3, 12)}
    tensors |= {"multi_modal_projector.mm_soft_emb_norm.weight": torch.zeros(12)}
    source = save_safetensors(tmp_path / "in", tensors, config)
    report = check(source, model, tmp_path / "out", "bare_ab", ranks)
    assert (report.config.model_type, report.config.eos_token_ids) == ("gemma3_text", (1, 7))
    assert any("2 tensors were not needed" in note for note in report.notes)
    with open_folder(tmp_path / "out") as folder:
        assert folder.hf_config["architectures"] == ["Gemma3ForCausalLM"] and "text_config" not in folder.hf_config
