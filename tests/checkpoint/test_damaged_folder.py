"""Every kind of damage to a folder gives one error that names the file, and never a model."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from flashsvd_jax.checkpoint import load_params, open_folder
from flashsvd_jax.errors import CheckpointError, ConfigError, FlashSVDError

ALIAS, OWNER = "layers_1.self_attn.q_proj.down", "layers_0.self_attn.q_proj.down"
FIRST_SHARD = "model-00001-of-00003.safetensors"
FUZZ = hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any]) -> Path:
    """A model in one file; not to be changed."""
    return tiny_model().write(tmp_path_factory.mktemp("pristine") / "model")


@pytest.fixture
def single(model: Any, tmp_path: Path) -> Path:
    return model.write(tmp_path / "model")


@pytest.fixture
def sharded(model: Any, tmp_path: Path) -> Path:
    folder = model.write(tmp_path / "model", shard_bytes=4000)
    assert (folder / FIRST_SHARD).exists()
    return folder


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_arrays(path: Path, edit: Callable[[dict[str, np.ndarray]], Any]) -> None:
    arrays = load_file(path)
    edit(arrays)
    save_file(arrays, path)


def edit_header(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    path.write_bytes(content.replace(old, new))


def refused(folder: Path, problem: str, error: type[FlashSVDError] = CheckpointError) -> None:
    for load in (open_folder, load_params):
        with pytest.raises(error, match=problem) as caught:
            load(folder)
        assert str(folder) in str(caught.value)


def test_folder_without_manifest(single: Path) -> None:
    (single / "factorization.json").unlink()
    refused(single, r"model is not a factorized model: it has no factorization\.json")
    refused(single / "nowhere", "nowhere is not a factorized model")


@pytest.mark.parametrize("name", ["config.json", "factorization.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": ', b'"\xff"'])
def test_small_file_that_is_no_json_object(sharded: Path, name: str, content: bytes) -> None:
    (sharded / name).write_bytes(content)
    refused(sharded, rf"{sharded}/{name} ", ConfigError if name == "config.json" else CheckpointError)


def test_configuration_is_missing(single: Path) -> None:
    (single / "config.json").unlink()
    refused(single, r"config\.json cannot be read", ConfigError)


def test_configuration_lacks_a_field(single: Path) -> None:
    edit_json(single / "config.json", lambda config: config.pop("hidden_size"))
    refused(single, r"config\.json: hidden_size is missing", ConfigError)


@pytest.mark.parametrize("value", ["wide", [16], {}, 1e999])
def test_configuration_has_a_field_of_the_wrong_kind(single: Path, value: Any) -> None:
    edit_json(single / "config.json", lambda config: config.update(hidden_size=value))
    refused(single, r"config\.json", ConfigError)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("ranks", {"layers_7.mlp.up_proj": 2}, "names sites the model does not have: layers_7.mlp.up_proj"),
        ("ranks", {"layers_0.mlp.up_proj": -2}, "must be a positive whole number"),
        ("shared", {"layers_0.mlp.up_proj.down": OWNER}, "the model has no array layers_0.mlp.up_proj.down"),
        ("shared", {ALIAS: "nothing"}, "the model has no array nothing"),
        ("shared", {ALIAS: OWNER, OWNER: ALIAS}, "is shared itself; name the array that is stored"),
        ("shared", {ALIAS: "layers_0.self_attn.q_proj.up"}, r"their shapes are \[3, 16\] and \[16, 3\]"),
        ("shared", {}, r"params is \d+, the configuration and the ranks make it \d+"),
        ("params", 1, r"params is 1, the configuration and the ranks make it \d+"),
    ],
)
def test_manifest_that_does_not_fit(single: Path, field: str, value: Any, problem: str) -> None:
    edit_json(single / "factorization.json", lambda manifest: manifest.update({field: value}))
    refused(single, rf"factorization\.json: .*{problem}")


def test_weights_are_missing(single: Path) -> None:
    (single / "model.safetensors").unlink()
    refused(single, r"model\.safetensors: No such file")
    os.mkfifo(single / "model.safetensors")  # to read from it would take for ever
    refused(single, r"model\.safetensors: No such file")


def test_all_missing_and_damaged_shards_are_named(sharded: Path) -> None:
    (sharded / FIRST_SHARD).unlink()
    second = sharded / "model-00002-of-00003.safetensors"
    second.write_bytes(second.read_bytes()[:-1])
    refused(sharded, rf"(?s)2 problems:.*{FIRST_SHARD}: No such file.*{second.name}: .*incomplete")


def test_array_is_missing(single: Path) -> None:
    edit_arrays(single / "model.safetensors", lambda arrays: (arrays.pop("norm.scale"), arrays.pop(OWNER)))
    refused(single, rf"(?s)3 problems:.*missing: {OWNER}.*missing: {ALIAS}.*missing: norm\.scale \[16\]")


def test_array_is_unexpected(single: Path) -> None:
    edit_arrays(single / "model.safetensors", lambda arrays: arrays.update(other=np.zeros(2, ml_dtypes.bfloat16)))
    refused(single, r"unexpected: other \[2\]")


def test_shared_array_is_stored_too(single: Path) -> None:
    edit_arrays(single / "model.safetensors", lambda arrays: arrays.update({ALIAS: arrays[OWNER]}))
    refused(single, rf"{ALIAS} is stored, though factorization\.json says that it is {OWNER}")


def test_array_has_another_shape(single: Path) -> None:
    edit_arrays(single / "model.safetensors", lambda arrays: arrays.update({OWNER: arrays[OWNER].T.copy()}))
    refused(single, rf"mis-shaped: {OWNER} is \[16, 3\]")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int16, ml_dtypes.float8_e4m3fn])
def test_array_has_another_dtype(single: Path, dtype: Any) -> None:
    edit_arrays(single / "model.safetensors", lambda arrays: arrays.update({"norm.scale": np.zeros(16, dtype)}))
    refused(single, r"all arrays are bfloat16, but\s+model\.safetensors: norm\.scale is [FI]\d+")


def test_header_names_an_unknown_dtype(single: Path) -> None:
    edit_arrays(single / "model.safetensors", lambda arrays: arrays.update({"norm.scale": np.zeros(16, np.float32)}))
    edit_header(single / "model.safetensors", b'"dtype":"F32"', b'"dtype":"F99"')
    refused(single, r"model\.safetensors: .*F99")


def test_header_lies_about_a_shape(single: Path) -> None:
    edit_header(
        single / "model.safetensors", b'"shape":[40,16],"data_offsets":[0', b'"shape":[41,16],"data_offsets":[0'
    )
    refused(single, r"model\.safetensors: Error while deserializing header")


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda index: index.pop("weight_map"), r"index\.json: weight_map is missing"),
        (lambda index: index.update(weight_map=[]), r"index\.json: weight_map must be an object"),
        (lambda index: index["weight_map"].pop("lm_head.weight"), r"has lm_head\.weight in no file, it is in model-"),
        (lambda index: index["weight_map"].update(other=FIRST_SHARD), "has other in .*, it is in no file"),
        (
            lambda index: index["weight_map"].update({"lm_head.weight": FIRST_SHARD}),
            "has lm_head.weight in .*, it is in model-0000",
        ),
        (
            lambda index: index["weight_map"].update({"lm_head.weight": 3}),
            r"weight_map\['lm_head\.weight'\] must name a file",
        ),
        (
            lambda index: index["weight_map"].update({"lm_head.weight": "x.safetensors"}),
            r"x\.safetensors: No such file",
        ),
        (lambda index: index["weight_map"].update({"lm_head.weight": ".."}), r"\n  \.\.: "),
        (lambda index: index["weight_map"].update({"lm_head.weight": "a\0b\ud800"}), "1 problems"),
    ],
)
def test_index_contradicts_the_files(sharded: Path, edit: Callable[[dict[str, Any]], Any], problem: str) -> None:
    edit_json(sharded / "model.safetensors.index.json", edit)
    refused(sharded, problem)


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_index_must_not_lead_elsewhere(sharded: Path, file: str) -> None:
    edit_json(
        sharded / "model.safetensors.index.json", lambda index: index["weight_map"].update({"lm_head.weight": file})
    )
    refused(sharded, r"weight_map\['lm_head\.weight'\] must name a file of this folder")


def test_array_is_in_two_shards(sharded: Path) -> None:
    edit_arrays(
        sharded / FIRST_SHARD, lambda arrays: arrays.update({"lm_head.weight": np.zeros((40, 16), ml_dtypes.bfloat16)})
    )
    refused(sharded, r"lm_head\.weight is in model-0000\d-of-00003\.safetensors too")


def test_file_that_is_cut_short_while_open(single: Path) -> None:
    with open_folder(single) as folder:
        weights = single / "model.safetensors"
        with weights.open("r+b") as file:
            file.truncate(weights.stat().st_size // 2)
        with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
            for name in folder.stored_names():
                folder.get(name)


def test_truncated_weights(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    content = (pristine / "model.safetensors").read_bytes()
    damaged = copy_of(pristine, tmp_path_factory.mktemp("cut"))

    @hypothesis.given(size=st.integers(0, len(content) - 1))
    @FUZZ
    def check(size: int) -> None:
        (damaged / "model.safetensors").write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
            load_params(damaged)

    check()


def test_damaged_header(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    content = (pristine / "model.safetensors").read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    damaged = copy_of(pristine, tmp_path_factory.mktemp("flipped"))
    with open_folder(pristine) as folder:
        shapes = folder.shapes()

    @hypothesis.given(position=st.integers(0, header_end - 1), value=st.integers(0, 255))
    @FUZZ
    def check(position: int, value: int) -> None:
        changed = bytearray(content)
        changed[position] = value
        (damaged / "model.safetensors").write_bytes(changed)
        try:
            with open_folder(damaged) as folder:
                assert {name: folder.get(name).shape for name in shapes} == shapes
        except CheckpointError as error:
            assert str(damaged) in str(error)

    check()


def copy_of(folder: Path, destination: Path) -> Path:
    for file in folder.iterdir():
        (destination / file.name).write_bytes(file.read_bytes())
    return destination
