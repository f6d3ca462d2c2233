"""Folders appear whole, with the values that were given, or not at all."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from flashsvd_jax.checkpoint import FolderWriter, WeightWarning, load_params, save_params
from flashsvd_jax.checkpoint.layout import COMPANION_FILES, companion_files
from flashsvd_jax.errors import CheckpointError, ConfigError

NORM = "norm.scale"
ALIAS, OWNER = "layers_1.self_attn.q_proj.down", "layers_0.self_attn.q_proj.down"


def stored(folder: Path) -> dict[str, np.ndarray]:
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_single_file(tiny_model: Callable[..., Any], tmp_path: Path, dtype: str) -> None:
    model = tiny_model(dtype=dtype)
    folder = model.write(tmp_path / "model")
    assert names_in(folder) == ["SHA256SUMS", "config.json", "factorization.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text()) == model.hf_config
    arrays = stored(folder)
    assert arrays.keys() == model.arrays.keys()
    for name, array in arrays.items():
        assert array.dtype.name == dtype
        np.testing.assert_array_equal(array, model.array(name))


def test_shards_are_bounded_and_indexed(model: Any, tmp_path: Path) -> None:
    limit = 2000
    folder = model.write(tmp_path / "model", shard_bytes=limit)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert [file.name for file in files] == [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    by_file = {file.name: load_file(file) for file in files}
    assert index["weight_map"] == {name: file for file, arrays in by_file.items() for name in arrays}
    sizes = [sum(array.nbytes for array in arrays.values()) for arrays in by_file.values()]
    assert all(size <= limit for size in sizes)
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"].keys() == model.arrays.keys()


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum, of GNU coreutils, is not here")
def test_checksums_tell_a_changed_byte(model: Any, tmp_path: Path) -> None:
    def check() -> list[str]:
        command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout.splitlines()

    folder = model.write(tmp_path / "model", shard_bytes=2000)
    others = [name for name in names_in(folder) if name != "SHA256SUMS"]
    assert check() == [f"{name}: OK" for name in others]
    changed = bytearray((folder / others[-2]).read_bytes())
    changed[-1] ^= 1
    (folder / others[-2]).write_bytes(changed)
    assert [line for line in check() if not line.endswith(": OK")] == [f"{others[-2]}: FAILED"]


def test_an_array_larger_than_a_shard_has_a_file_of_its_own(model: Any, tmp_path: Path) -> None:
    folder = model.write(tmp_path / "model", shard_bytes=1)
    assert len(list(folder.glob("*.safetensors"))) == len(model.arrays)
    assert stored(folder).keys() == model.arrays.keys()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_strided_and_reused_arrays_are_copied(tiny_model: Callable[..., Any], tmp_path: Path, dtype: str) -> None:
    model = tiny_model(dtype=dtype)
    buffer = np.empty(2000, np.float32)
    with FolderWriter(tmp_path / "model", model.hf_config, model.manifest) as out:
        for index, (name, array) in enumerate(model.arrays.items()):
            view = (
                buffer[: array.size].reshape(array.shape[::-1]).T
                if index % 2
                else buffer[: array.size].reshape(array.shape)
            )
            view[...] = array
            out.add(name, view)
    for name, array in stored(tmp_path / "model").items():
        np.testing.assert_array_equal(array, model.array(name), err_msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("source", [np.float32, np.float64])
def test_cast_rounds_to_nearest(tiny_model: Callable[..., Any], tmp_path: Path, dtype: str, source: Any) -> None:
    model = tiny_model(dtype=dtype)
    step = float(jnp.finfo(dtype).eps)  # from 1.0 to the next number
    values = np.resize(np.array([1 + 0.49 * step, 1 + 0.51 * step, 1 + 1.5 * step, -1 - 0.49 * step], source), 16)
    model.arrays[NORM] = values
    rounded = np.resize(np.array([1, 1 + step, 1 + 2 * step, -1]), 16)
    np.testing.assert_array_equal(stored(model.write(tmp_path / "model"))[NORM].astype(np.float64), rounded)


def test_values_that_are_not_finite_are_reported_once(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model(dtype="float16")
    model.arrays[NORM][3] = np.nan
    model.arrays["lm_head.weight"] = np.zeros_like(model.arrays["lm_head.weight"])
    model.arrays["lm_head.weight"][-1, -1] = -np.inf
    model.arrays["embed_tokens.weight"][0, 0] = 70000.0  # float16 ends at 65504
    with pytest.warns(WeightWarning) as caught:
        model.write(tmp_path / "model")
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "3 arrays are not finite" in message
    for part in (f"{NORM} holds NaN", "lm_head.weight holds NaN or infinity", "embed_tokens.weight overflows float16"):
        assert part in message
    assert np.isinf(stored(tmp_path / "model")["embed_tokens.weight"][0, 0])


def test_flaw_beyond_the_first_chunk_is_found(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model(vocab_size=20000, dtype="float32")
    model.arrays["embed_tokens.weight"][-1, -1] = np.inf
    with pytest.warns(WeightWarning, match="1 arrays are not finite: embed_tokens.weight holds NaN or infinity"):
        model.write(tmp_path / "model")


def test_largest_finite_values_are_no_flaw(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    for dtype in ("bfloat16", "float16", "float32"):
        model = tiny_model(dtype=dtype)
        model.arrays[NORM][:2] = float(jnp.finfo(dtype).max), float(jnp.finfo(dtype).min)
        model.write(tmp_path / dtype)  # warnings are errors


@pytest.mark.parametrize(
    ("name", "array", "problem"),
    [
        ("layers_9.mlp.up_proj.weight", np.zeros((2, 2)), "the model has no such array"),
        ("layers_0.self_attn.q_proj.weight", np.zeros((16, 16)), "the model has no such array"),
        (ALIAS, np.zeros((3, 16)), f"it shares the array of {OWNER}; add that alone"),
        (NORM, np.zeros((16, 1)), r"norm.scale is \[16, 1\], it must be \[16\]"),
        (NORM, np.zeros(16, np.int8), "norm.scale is int8, it must be floating point"),
    ],
)
def test_wrong_array_is_named(model: Any, tmp_path: Path, name: str, array: np.ndarray, problem: str) -> None:
    with (
        pytest.raises(CheckpointError, match=problem),
        FolderWriter(tmp_path / "model", model.hf_config, model.manifest) as out,
    ):
        out.add(name, array)
    assert names_in(tmp_path) == []


def test_array_added_twice(model: Any, tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"norm\.scale was added before"),
        FolderWriter(tmp_path / "model", model.hf_config, model.manifest, shard_bytes=1) as out,
    ):
        for name in (NORM, OWNER, NORM):
            out.add(name, model.arrays[name])


def test_missing_arrays_are_named(model: Any, tmp_path: Path) -> None:
    del model.arrays[NORM], model.arrays[OWNER]
    with pytest.raises(CheckpointError, match=rf"2 arrays were not added: {OWNER}, {NORM}"):
        model.write(tmp_path / "model")
    assert names_in(tmp_path) == []


def test_all_files_can_be_read_by_the_same_users(model: Any, tmp_path: Path) -> None:
    folder = model.write(tmp_path / "model", shard_bytes=1000)
    assert {path.stat().st_mode for path in folder.iterdir()} == {(folder / "config.json").stat().st_mode}


def test_companion_files_are_copied(model: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in (*COMPANION_FILES, "pytorch_model.bin", "config.json"):
        (source / name).write_text(f"content of {name}")
    (source / "vocab.json").unlink()
    folder = model.write(tmp_path / "model", copy_files=companion_files(source))
    copied = set(COMPANION_FILES) - {"vocab.json"}
    assert set(names_in(folder)) == copied | {"SHA256SUMS", "config.json", "factorization.json", "model.safetensors"}
    for name in copied:
        assert (folder / name).read_text() == f"content of {name}"


def test_files_that_cannot_be_copied_are_named(model: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be copied: there is no such file"):
        model.write(tmp_path / "model", copy_files=[tmp_path / "tokenizer.json"])
    (tmp_path / "config.json").touch()
    with pytest.raises(
        CheckpointError, match=r"config\.json cannot be copied: the folder has another file of that name"
    ):
        model.write(tmp_path / "model", copy_files=[tmp_path / "config.json"])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"params": 1}, r"params is 1, the configuration and the ranks make it \d+"),
        ({"params_dense": 1}, r"params_dense is 1, the configuration and the ranks make it \d+"),
        ({"dtype": "int8"}, "dtype must be one of"),
    ],
)
def test_manifest_that_contradicts_the_model(model: Any, tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        model.with_manifest(**changes).write(tmp_path / "model")
    assert names_in(tmp_path) == []


def test_configuration_that_is_not_supported(model: Any, tmp_path: Path) -> None:
    for changes in ({"model_type": "mamba"}, {"hidden_size": None}, {"hidden_size": "wide"}, {"rope_scaling": "x"}):
        with pytest.raises(ConfigError, match=rf"{tmp_path}/model: config\.json"):
            FolderWriter(tmp_path / "model", {**model.hf_config, **changes}, model.manifest)


def test_parameter_tree_round_trip(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model("qwen3", tie_word_embeddings=True)
    params = load_params(model.write(tmp_path / "first"))
    save_params(tmp_path / "second", params, model.config, model.hf_config, model.manifest)
    first, second = stored(tmp_path / "first"), stored(tmp_path / "second")
    assert first.keys() == second.keys()
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)


def test_parameter_tree_that_is_not_the_model(model: Any, tmp_path: Path) -> None:
    params = load_params(model.write(tmp_path / "first"))
    arguments = (model.config, model.hf_config, model.manifest)
    with pytest.raises(CheckpointError, match="the configuration of params is not what"):
        save_params(tmp_path / "second", params, model.config.dense(), *arguments[1:])
    q_proj = params["params"]["layers_1"]["self_attn"]["q_proj"]
    q_proj["down"] = q_proj["down"] + 1
    with pytest.raises(CheckpointError, match=f"{ALIAS} should share the array of {OWNER}, but has other values"):
        save_params(tmp_path / "second", params, *arguments)
    del q_proj["down"]
    with pytest.raises(CheckpointError, match=f"missing: {ALIAS}"):
        save_params(tmp_path / "second", params, *arguments)
    assert names_in(tmp_path) == ["first"]
