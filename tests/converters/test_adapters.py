"""LoRA adapters: merged into their base, or refused with what is wrong."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_modules import add_lora
from published_checkpoints import MODULES, Published, base_model, hf_config, save_safetensors, state_dict
from safetensors.torch import load_file, save_file

from converters import convert
from flashsvd_jax.checkpoint import open_folder
from flashsvd_jax.cli import main
from flashsvd_jax.errors import CheckpointError, ConversionError

Tensors = dict[str, torch.Tensor]
Q = MODULES[0]
A, B = (f"base_model.model.{Q}.lora_{part}.weight" for part in "AB")


def changed(source: Published, folder: Path, change: Callable[[Tensors, dict[str, Any]], object]) -> Path:
    """The adapter with other tensors or another configuration."""
    shutil.copytree(source.path, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def renamed(old: str, new: str) -> Callable[[Tensors, object], None]:
    def change(tensors: Tensors, _: object) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, c: c.update(peft_type="IA3"), "peft_type 'IA3' is not read, only LORA"),
        (lambda t, c: c.update(use_dora=True), "use_dora is True, which is not read; merge the adapter"),
        (lambda t, c: c.update(fan_in_fan_out=True), "fan_in_fan_out is True"),
        (
            lambda t, c: c.update(init_lora_weights="pissa_niter_16"),
            "'pissa_niter_16' changes the base model's weights",
        ),
        (lambda t, c: c.update(r=5), r"gives model.\S+ rank 5, \S+ has 4"),
        (lambda t, c: c.update(use_rslora="yes"), "use_rslora is 'yes', which is of the wrong kind"),
        (lambda t, c: t.pop("base_model.model.lm_head.weight"), "holds nothing for lm_head, which modules_to_save"),
        (lambda t, c: c.update(lora_alpha="six"), r"scale lora_alpha 'six', which is no number"),
        (lambda t, c: c.update(lora_alpha=10**400), r"scale lora_alpha 1000.*, which is no number"),
        (lambda t, c: c.update(rank_pattern={"a{99999999999999999999}": 3}), "which is none"),
        (lambda t, c: c.update(rank_pattern={"(a+)+": 3}), "too intricate"),
        (lambda t, c: c.update(rank_pattern={"[": 3}), "the pattern '.', which is none"),
        (lambda t, c: t.pop(B), rf"{A} is there without its other factor"),
        (lambda t, c: t.update({B: torch.ones(40, 3)}), r"are no two factors"),
        (
            lambda t, c: t.update({B: torch.ones(39, 4)}),
            rf"mis-shaped: {B} .39, 4. and .*do not form {Q}.weight .40, 36.",
        ),
        (renamed("q_proj", "w_proj"), r"unexpected: .*the base has no model.layers.0.self_attn.w_proj"),
        (lambda t, c: t.update({A.replace("weight", "two.weight"): t[A] + 1}), "is there for several adapters"),
        (
            lambda t, c: t.update({"base_model.model.model.norm.bias": torch.ones(36)}),
            "the base has no model.norm.bias",
        ),
        (
            lambda t, c: t.update({"base_model.model.lm_head.weight": torch.ones(99, 36)}),
            r"mis-shaped: base_model.model.lm_head.weight is .99, 36., the base's lm_head.weight .97, 36.",
        ),
        (lambda t, c: [t.pop(name) for name in list(t) if "lora" in name], "holds no lora_A and lora_B"),
    ],
)
def test_wrong_adapters_are_refused(change, words: str, published, tmp_path) -> None:
    source = published("lora")
    with pytest.raises(ConversionError, match=words) as caught:
        convert(changed(source, tmp_path / "in", change), tmp_path / "out", base=source.base, progress=False)
    assert not (tmp_path / "out").exists()
    assert str(tmp_path) in str(caught.value) or "adapter_config.json" in str(caught.value)


def test_patterns_cannot_hang_the_reader(published, tmp_path) -> None:
    source, start = published("lora"), time.process_time()
    patterns = {"(?:[a-z._0-9]+)+!": 3, "([a-z._0-9]*)*!": 3}
    for pattern in patterns:
        folder = changed(source, tmp_path / "in", lambda t, c, p=pattern: c.update(alpha_pattern={p: 3}))
        with pytest.raises(ConversionError, match="too intricate"):
            convert(folder, tmp_path / "out", base=source.base, progress=False)
        shutil.rmtree(folder)
    path = "base_model.model." + "a." * 800 + "q.lora_{}.weight"

    def deep(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        config.update(rank_pattern={".*.*.*x": 4})
        tensors.update({path.format(name): torch.ones(shape) for name, shape in (("A", (4, 8)), ("B", (8, 4)))})

    with pytest.raises(ConversionError, match=r"rank_pattern cannot be matched with the path .* which is too long"):
        convert(changed(source, tmp_path / "in", deep), tmp_path / "out", base=source.base, progress=False)
    assert time.process_time() - start < 5


def test_patterns_are_ends_of_paths(published, tmp_path) -> None:
    """As PEFT has them: a regular expression that a path must end with, from a dot on."""
    source = published("lora")

    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        config["rank_pattern"] = {r"layers\.\d+\.mlp\.down_proj": 3}
        config["alpha_pattern"] = {"v_proj": 5.0}

    options = {"base": source.base, "dtype": "float32", "progress": False}
    convert(source.path, tmp_path / "one", **options)
    convert(changed(source, tmp_path / "in", change), tmp_path / "other", **options)
    first, second = (tmp_path / name / "model.safetensors" for name in ("one", "other"))
    assert first.read_bytes() == second.read_bytes()


def test_an_adapter_needs_its_base_or_stands_beside_it(published, tmp_path) -> None:
    source = published("lora")
    with pytest.raises(
        ConversionError, match="is an adapter for somebody/tiny: give the folder of that model's weights"
    ):
        convert(source.path, tmp_path / "out", progress=False)
    together = tmp_path / "in"
    shutil.copytree(source.base, together)
    shutil.copytree(source.path, together, dirs_exist_ok=True)
    (together / "tokenizer.json").write_text("{}")
    for number, path in enumerate((together, together / "adapter_model.safetensors")):
        report = convert(path, tmp_path / str(number), dtype="float32", progress=False)
        assert report.family == "lora" and report.copied == ("tokenizer.json",)
        assert "its base is dense" in report.evidence and "file adapter_config.json" in report.evidence
        with open_folder(tmp_path / str(number)) as folder:
            assert {file.name for file in folder.manifest.sources} == {"model.safetensors", "adapter_model.safetensors"}
    assert (
        "LoRA: 5 updates are merged into weights, 0 make factors wider; 1 parameters are the adapter's" in report.notes
    )


def test_base_weights_alone_are_the_base(published, tmp_path) -> None:
    source = published("lora")
    together = tmp_path / "in"
    shutil.copytree(source.base, together)
    shutil.copytree(source.path, together, dirs_exist_ok=True)
    assert convert(together / "model.safetensors", tmp_path / "out", progress=False).family == "dense"


def test_shared_arrays_are_not_changed_for_one_of_their_users(tmp_path, published) -> None:
    with torch.no_grad():
        model = base_model("llama_tied")
        base = save_safetensors(tmp_path / "base", state_dict(model), hf_config(model))
        add_lora(model, tmp_path / "tied", {"model.embed_tokens": 2}, {"model.embed_tokens": 1.0})
        name, shared = "model.q_basis.0", published("basis_sharing")
        add_lora(base_model("llama_bias", num_hidden_layers=4), tmp_path / "basis", {Q: 2}, {Q: 1.0})
    with pytest.raises(
        ConversionError, match=r"change of model.embed_tokens.weight, which is shared with the output head"
    ):
        convert(tmp_path / "tied", tmp_path / "out", base=base, progress=False)
    rename = {f"base_model.model.{Q}.lora_A.weight": (2, 40), f"base_model.model.{Q}.lora_B.weight": (5, 2)}
    tensors = {key.replace(Q, name): torch.ones(shape) for key, shape in rename.items()}
    save_file(tensors, tmp_path / "basis" / "adapter_model.safetensors")
    with pytest.raises(ConversionError, match=r"change of model.q_basis.0.weight, which is shared with layers_1"):
        convert(tmp_path / "basis", tmp_path / "out", base=shared.path, progress=False)


def test_wider_factors_hold_the_very_numbers(converted) -> None:
    result = converted("lora-factors")
    base, adapter = load_tensors(result.source.base), load_file(result.source.path / "adapter_model.safetensors")
    with open_folder(result.path) as folder:
        down, up = (folder.get(f"layers_0.self_attn.q_proj.{part}") for part in ("down", "up"))
    np.testing.assert_array_equal(down, np.concatenate([base[f"{Q}.BLinear.weight"], adapter[A]]))
    np.testing.assert_array_equal(up, np.concatenate([base[f"{Q}.ALinear.weight"], 1.5 * adapter[B]], 1))


@pytest.mark.parametrize(("case", "base"), [("lora-factors", "lowrankarena-mistral"), ("lora", "dense-qwen2")])
def test_a_converted_model_can_be_the_base(case: str, base: str, published, converted, tmp_path) -> None:
    wanted = converted(case)
    folder = tmp_path / "base"
    convert(wanted.source.base, folder, dtype="float32", progress=False)
    report = convert(wanted.source.path, tmp_path / "out", base=folder, dtype="float32", verify=True, progress=False)
    assert report.config == wanted.report.config and report.family == "lora"
    assert f"file factorization.json of a model read as {base.split('-')[0]}" in report.evidence
    first, second = (path / "model.safetensors" for path in (wanted.path, tmp_path / "out"))
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(ConversionError, match="base is a converted model already; load it, or export it"):
        convert(folder, tmp_path / "again", progress=False)


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def test_dtype_is_that_of_the_base(published, tmp_path) -> None:
    source = published("lora")
    shutil.copytree(source.base, tmp_path / "base")
    save_file(
        {name: t.half() for name, t in load_tensors(source.base).items()}, tmp_path / "base" / "model.safetensors"
    )
    report = convert(source.path, tmp_path / "out", base=tmp_path / "base", verify=True, progress=False)
    assert report.dtype == "float16"


def test_damaged_files(published, tmp_path) -> None:
    source = published("lora")
    shutil.copytree(source.path, tmp_path / "in")
    (tmp_path / "in" / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors"):
        convert(tmp_path / "in", tmp_path / "out", base=source.base, progress=False)
    (tmp_path / "in" / "adapter_model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"neither adapter_model.safetensors nor adapter_model.bin"):
        convert(tmp_path / "in", tmp_path / "out", base=source.base, progress=False)


def test_command(published, tmp_path, capsys) -> None:
    source = published("lora-factors")
    arguments = [str(source.path), str(tmp_path / "out"), "--base", str(source.base), "--verify", "--dtype", "float32"]
    assert main(["convert", *arguments]) == 0
    out = capsys.readouterr().out
    assert "lora: PEFT's LoRA adapters" in out and "its base is lowrankarena" in out and "verified  logits" in out
