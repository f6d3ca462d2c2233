"""Checkpoints that must not be converted: one clear error, and nothing left behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_checkpoints import Published, hf_config, save_safetensors, state_dict, write_config

from converters import convert
from flashsvd_jax.errors import CheckpointError, ConfigError, ConversionError, FlashSVDError

Tensors = dict[str, torch.Tensor]
LAYER1 = "model.layers.1"
Q = "model.layers.0.self_attn.q_proj"
A, B = f"{Q}.ALinear.weight", f"{Q}.BLinear.weight"


def refuse(src: Path, words: str, tmp_path: Path, error: type[FlashSVDError] = ConversionError, **options: Any) -> str:
    """Converts in vain: the error says `words`, and neither the folder nor anything beside it was made."""
    place = tmp_path / "nothing here"
    place.mkdir()
    with pytest.raises(error, match=words) as caught:
        convert(src, place / "out", progress=False, **options)
    assert list(place.iterdir()) == []
    place.rmdir()
    return str(caught.value)


def changed(source: Published, folder: Path, change: Callable[[Tensors, dict[str, Any]], object]) -> Path:
    """The checkpoint of a folder with other tensors or another configuration."""
    tensors = {name: tensor.clone() for name, tensor in state_dict(source.model).items()}
    config = json.loads((source.path / "config.json").read_text())
    change(tensors, config)
    return save_safetensors(folder, {name: tensor.contiguous() for name, tensor in tensors.items()}, config)


def test_a_checkpoint_of_no_tensors(published: Callable[[str], Published], tmp_path: Path) -> None:
    empty = save_safetensors(tmp_path / "in", {}, json.loads((published("asvd").path / "config.json").read_text()))
    refuse(empty, "in holds no tensors", tmp_path)


def exchange(tensors: Tensors, one: str, other: str) -> None:
    tensors[one], tensors[other] = tensors[other], tensors[one]


def exchange_all(tensors: Tensors, _: object) -> None:
    for name in [name for name in tensors if ".ALinear." in name]:
        exchange(tensors, name, name.replace(".ALinear.", ".BLinear."))


@pytest.mark.parametrize(
    # t: the tensors, c: the configuration
    ("case", "change", "words"),
    [
        ("asvd", exchange_all, "11 problems:\n  wrong way round: .*ASVD, Hugging Face export applies it first"),
        ("lowrankarena-mistral", exchange_all, "10 problems:\n  wrong way round: "),
        ("dobi", exchange_all, "10 problems:\n  wrong way round: .*Dobi-SVD"),
        ("asvd", lambda t, c: exchange(t, A, B), "1 problem:\n  wrong way round"),
        ("asvd", lambda t, c: c["truncation_ranks"].update({Q: 4}), f"truncation_ranks says rank 4 for {Q},"),
        ("svdllm-hf", lambda t, c: c["svd_ranks"].pop(Q), f"svd_ranks says dense for {Q}, the tensors say rank 3"),
        ("dobi", lambda t, c: c["dobi_target_modules"].update({Q: 4}), "dobi_target_modules says rank 4"),
        ("lillama", lambda t, c: c["ranks"].update({Q: 4}), f"ranks says rank 4 for {Q}, the tensors say rank 3"),
        ("lillama", lambda t, c: t.pop(f"{Q}.1.weight"), f"missing: {Q}.1.weight, the other factor is there"),
        ("d_rank", lambda t, c: c.update(q_groups=[[0, 1, 2], [3]]), "q_basis.* differs from .*q_basis"),
        ("lowrankarena-qwen3", lambda t, c: c["low_rank_modules"].update({Q: {"rank": 9}}), "modules says rank 9"),
        ("asvd", lambda t, c: t.pop(B), f"missing: {B}, the other factor is there"),
        ("asvd", lambda t, c: t.pop("model.embed_tokens.weight"), r"missing: model.embed_tokens.weight \[97, 44\]"),
        ("lowrankarena-qwen2", lambda t, c: t.pop(f"{Q}.ALinear.bias"), f"missing: {Q}.ALinear.bias"),
        ("dense-mistral", lambda t, c: t.pop("lm_head.weight"), "missing: lm_head.weight .* does not tie it"),
        ("asvd", lambda t, c: t.update({f"{LAYER1}.extra": torch.ones(3)}), rf"unexpected: {LAYER1}.extra \[3\]"),
        ("dense-qwen2", lambda t, c: t.update({f"{Q}.weight": torch.ones(40, 36).int()}), "not floating .* int32"),
        ("asvd", lambda t, c: c.update(num_hidden_layers=1), f"unexpected: {LAYER1}.input_layernorm.weight"),
        ("asvd", lambda t, c: c.update(num_hidden_layers=3), "missing: model.layers.2.input_layernorm.weight"),
        ("asvd", lambda t, c: c.update(num_key_value_heads=4), r"do not form the weight \[48, 44\] of the base model"),
        ("asvd", lambda t, c: c.update(tie_word_embeddings=True), "lm_head.ALinear.weight .* ties the head"),
        ("dense-mistral", lambda t, c: c.update(tie_word_embeddings=True), "lm_head.weight differs from model.embed"),
        ("dense-mistral", lambda t, c: t[f"{Q}.weight"].fill_(torch.nan), rf"holds NaN .*; in .*: {Q}\.weight; nothing was"),
    ],
)  # fmt: skip
def test_damaged_checkpoint(case: str, change, words: str, published, tmp_path) -> None:
    message = refuse(changed(published(case), tmp_path / "in", change), words, tmp_path)
    assert str(tmp_path) in message


def test_dobi_bias_is_refused(published, tmp_path) -> None:
    def add_bias(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[f"{Q}.ALinear.bias"] = torch.ones(72)

    refuse(
        changed(published("dobi"), tmp_path / "in", add_bias), f"bias on the first factor: {Q}.ALinear.bias", tmp_path
    )


def test_base_configuration_of_another_model(published, tmp_path) -> None:
    for case, other in (("svdllm", "qwen2"), ("lems", "llama"), ("aa_svd", "mistral")):
        base = write_config(tmp_path / f"base-{case}", hf_config(published(f"lowrankarena-{other}").model))
        message = refuse(published(case).path, "does not fit the base model's configuration; ", tmp_path, base=base)
        assert "missing: " in message or "mis-shaped: " in message


def test_values_out_of_range_of_the_dtype(published, tmp_path) -> None:
    path = changed(published("dense-mistral"), tmp_path / "in", lambda t, c: t["lm_head.weight"].fill_(1e6))
    refuse(path, "lm_head.weight overflows float16", tmp_path, dtype="float16")
    convert(path, tmp_path / "out", dtype="bfloat16", progress=False)


def test_family_that_is_not_read(published, tmp_path) -> None:
    def split_a_factor(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[f"{Q}.qweight"] = torch.ones(3, 40)

    refuse(changed(published("dense-mistral"), tmp_path / "in", split_a_factor), "GPTQ.*not read yet", tmp_path)


def test_no_configuration(published, tmp_path) -> None:
    refuse(published("sequential").path, "has no config.json: give the base model's folder with --base", tmp_path)


def test_base_that_is_no_configuration(published, tmp_path) -> None:
    source = published("sequential").path
    refuse(source, "absent.* cannot be read", tmp_path, base=tmp_path / "absent")
    (tmp_path / "config.json").write_text("[1]")
    refuse(source, "must hold a JSON object", tmp_path, base=tmp_path)
    for config, words in (
        ({"model_type": "bloom"}, "model_type 'bloom' is not supported"),
        ({}, "model_type is missing"),
        (hf_config(published("sequential").model, num_attention_heads="many"), "num_attention_heads"),
    ):
        write_config(tmp_path, config)
        message = refuse(source, words, tmp_path, ConfigError, base=tmp_path)
        assert str(tmp_path / "config.json") in message


def test_destination_that_exists_is_left_alone(published, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(ConversionError, match="already exists"):
        convert(published("dense-mistral").path, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_full_disk_is_noticed_before_anything_is_written(published, tmp_path, monkeypatch) -> None:
    needed = convert(published("asvd").path, tmp_path / "fits", progress=False).nbytes
    usage = type("usage", (), {"free": needed - 1})
    monkeypatch.setattr("converters.engine.shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr("converters.engine.FolderWriter", None)  # would fail with another error
    refuse(published("asvd").path, "GB are free there; free some space", tmp_path)


def test_source_that_is_no_checkpoint(tmp_path) -> None:
    refuse(tmp_path / "absent.pt", "does not exist", tmp_path, CheckpointError)
    (tmp_path / "broken.safetensors").write_bytes(b"not a checkpoint")
    refuse(tmp_path / "broken.safetensors", "broken.safetensors", tmp_path, CheckpointError)


def test_unknown_dtype(published, tmp_path) -> None:
    refuse(published("asvd").path, "dtype 'int8' is not supported; supported: bfloat16", tmp_path, dtype="int8")


def test_write_that_is_interrupted_leaves_nothing(published, tmp_path, monkeypatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("converters.engine.FolderWriter.add", interrupted)
    (tmp_path / "place").mkdir()
    with pytest.raises(KeyboardInterrupt):
        convert(published("asvd").path, tmp_path / "place" / "out", progress=False)
    assert list((tmp_path / "place").iterdir()) == []
