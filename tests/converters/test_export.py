"""Exported models: PyTorch modules of the published classes load them, and converting them gives the same arrays again."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from compressed_modules import ABLinear, compress, compress_in_blocks
from hf_encoders import build_encoder
from published_checkpoints import base_model, hf_config
from safetensors.torch import load_file

from converters import EXPORT_FORMATS, convert, export
from flashsvd_jax.any_config import config_from_hf
from flashsvd_jax.checkpoint import Manifest, open_folder, save_params
from flashsvd_jax.cli import main
from flashsvd_jax.errors import CheckpointError, ConversionError
from flashsvd_jax.factorization import Factorization
from flashsvd_jax.models.flax_module import initial_params
from flashsvd_jax.schema import count_params

TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, 97, (2, 11)))
CASES = {
    "lowrankarena": (
        "lowrankarena-llama",
        "lowrankarena-qwen3",
        "lowrankarena-tied",
        "asvd-bias",
        "svdllm-qwen-buffers",
    ),
    "svdllm": (
        "svdllm",
        "svdllm-v2-mistral",
        "lowrankarena-qwen2",
        "lowrankarena-qwen3",
        "asvd-bias",
        "lowrankarena-tied",
    ),
}
PAIRS = [(format, case) for format, cases in CASES.items() for case in cases]
ARCHITECTURES = {"lowrankarena-tied": "llama_tied", "asvd-bias": "llama_bias", "svdllm-v2-mistral": "mistral"}


def arrays(folder: Path) -> dict[str, np.ndarray]:
    with open_folder(folder) as opened:
        return {name: opened.get(name) for name in opened.shapes()}


def exported_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_every_format_is_tested() -> None:
    assert CASES.keys() == {form.name for form in EXPORT_FORMATS}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("format", "case"), PAIRS)
def test_converting_an_export_gives_the_same_arrays(format: str, case: str, dtype: str, published, tmp_path) -> None:
    first = convert(published(case).path, tmp_path / "first", dtype=dtype, progress=False)
    report = export(tmp_path / "first", tmp_path / "out", format=format, progress=False)
    second = convert(tmp_path / "out", tmp_path / "second", dtype=dtype, verify=True, progress=False)
    assert second.family == report.family and second.config == first.config
    before, after = arrays(tmp_path / "first"), arrays(tmp_path / "second")
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.dtype == after[name].dtype and array.tobytes() == after[name].tobytes(), name
    ranks = second.config.factorization.ranks
    assert (report.low_rank, report.dense) == (len(ranks), second.verification.sites - len(ranks))  # type: ignore[union-attr]
    assert report.nbytes == sum(tensor.nbytes for tensor in exported_tensors(tmp_path / "out").values())


@pytest.mark.parametrize(("format", "case"), PAIRS)
def test_modules_of_the_published_classes_load_an_export_and_compute_the_same(
    format: str, case: str, converted, tmp_path
) -> None:
    source = converted(case)
    export(source.path, tmp_path / "out", format=format, progress=False)
    architecture = ARCHITECTURES.get(case, source.report.config.model_type)
    model = base_model(architecture, seed=9)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if format == "lowrankarena":
        compress(model, {name: entry["rank"] for name, entry in config["low_rank_modules"].items()}, ABLinear, seed=9)
    else:
        compress_in_blocks(model, config["svd_ranks"], bias_as_buffer=architecture.startswith("qwen"))
    tensors = exported_tensors(tmp_path / "out")
    if model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        difference = model(TOKENS).logits - source.source.model(TOKENS).logits
    assert difference.abs().max() == 0


def test_configuration_is_that_of_the_published_form(converted, tmp_path) -> None:
    source = converted("lowrankarena-qwen3")
    source_config = json.loads((source.source.path / "config.json").read_text())
    export(source.path, tmp_path / "ab", format="lowrankarena", progress=False)
    config = json.loads((tmp_path / "ab" / "config.json").read_text())
    for key in ("model_type", "architectures", "low_rank_schema", "low_rank_format_version", "low_rank_modules"):
        assert config[key] == source_config[key], key
    assert "auto_map" not in config  # it would name code that is not there
    export(source.path, tmp_path / "svd", format="svdllm", progress=False)
    config = json.loads((tmp_path / "svd" / "config.json").read_text())
    assert config["model_type"] == "svdllm-qwen3" and config["svd_ranks"] == source.source.ranks


def test_shards_tokenizer_and_index(converted, tmp_path) -> None:
    source = converted("lowrankarena-qwen2")
    folder = tmp_path / "in"
    folder.mkdir()
    for file in source.path.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.txt").write_text("not of the model")
    report = export(folder, tmp_path / "out", format="svdllm", shard_bytes=20_000, progress=False)
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    shards = [name for name in files if name.startswith("model-")]
    assert len(shards) > 2 and report.copied == ("tokenizer.json",)
    assert set(files) == {*shards, "config.json", "model.safetensors.index.json", "tokenizer.json"}
    modes = {(tmp_path / "out" / name).stat().st_mode for name in files}
    assert len(modes) == 1
    again = convert(tmp_path / "out", tmp_path / "again", dtype="float32", progress=False)
    assert again.config == source.report.config and again.copied == ("tokenizer.json",)


def test_shared_factors_are_refused_or_copied(converted, tmp_path) -> None:
    source = converted("basis_sharing")
    with pytest.raises(ConversionError, match=r"10 arrays are shared .*is layers_0.*--copy-shared"):
        export(source.path, tmp_path / "out", format="svdllm", progress=False)
    assert not (tmp_path / "out").exists()
    export(source.path, tmp_path / "out", format="svdllm", copy_shared=True, progress=False)
    report = convert(tmp_path / "out", tmp_path / "again", dtype="float32", progress=False)
    assert report.config.factorization.ranks == source.report.config.factorization.ranks
    before, after = arrays(source.path), arrays(tmp_path / "again")
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("case", "format", "words"),
    [
        ("asvd", "svdllm", "the output head is factorized"),
        ("dense-mistral", "lowrankarena", "the model is dense"),
        ("asvd", "gguf", "format 'gguf' is not known; known: lowrankarena, svdllm"),
    ],
)
def test_what_a_form_cannot_hold_is_refused(case: str, format: str, words: str, converted, tmp_path) -> None:
    with pytest.raises(ConversionError, match=words):
        export(converted(case).path, tmp_path / "out", format=format, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", CASES)
def test_encoders_and_block_diagonal_factors_are_refused(format: str, tmp_path) -> None:
    factorization = Factorization.of({(site := "layers_0.self_attn.q_proj"): 3}, groups={site: 5})
    hf = hf_config(build_encoder("bert"))
    config = config_from_hf(hf, factorization)
    sizes = {"params": count_params(config), "params_dense": count_params(config.dense())}
    manifest = Manifest(family="flashsvd_encoder", dtype="float32", factorization=factorization, **sizes)
    folder = tmp_path / "in"
    save_params(folder, initial_params(config, jax.random.key(0)), config, hf, manifest)
    with pytest.raises(ConversionError, match=r"no form for bert, .*block-diagonal second factors"):
        export(folder, tmp_path / "out", format=format, progress=False)


def test_nothing_is_left_of_an_export_that_fails(converted, tmp_path, monkeypatch) -> None:
    path = converted("svdllm").path
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConversionError, match="already exists"):
        export(path, tmp_path / "taken", format="svdllm", progress=False)
    with pytest.raises(CheckpointError, match="not a factorized model"):
        export(tmp_path, tmp_path / "out", format="svdllm", progress=False)

    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flashsvd_jax.checkpoint.shard_writer.ShardWriter.finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(path, tmp_path / "new" / "out", format="svdllm", progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]


def test_command(converted, tmp_path, capsys) -> None:
    assert main(["export", str(converted("svdllm").path), str(tmp_path / "out"), "--format", "lowrankarena"]) == 0
    out = capsys.readouterr().out
    assert (
        "convert reads it back as lowrankarena" in out
        and "14 low rank, 1 dense" in out
        and "ALinear(BLinear(x))" in out
    )
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "twice"), "--format", "svdllm"]) == 1
    assert "convert it first" in capsys.readouterr().err
