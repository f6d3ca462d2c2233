"""What was written is read back, each array once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashsvd_jax.checkpoint import ModelFolder, load_params, open_folder
from flashsvd_jax.errors import CheckpointError, RequestError
from flashsvd_jax.schema import abstract_params, flatten, schema

ALIAS, OWNER = "layers_1.self_attn.q_proj.down", "layers_0.self_attn.q_proj.down"

MODELS: dict[str, dict[str, Any]] = {
    "low rank, shared": {},
    "dense": {"ranks": {}, "shared": {}},
    "biases": {"model_type": "qwen2", "dtype": "float16"},
    "head norms, tied embeddings": {"model_type": "qwen3", "tie_word_embeddings": True, "dtype": "float32"},
    "low-rank head": {"ranks": {"lm_head": 7}, "shared": {}, "hidden_size": 12},
}


@pytest.fixture(params=MODELS, ids=list(MODELS))
def any_model(request: pytest.FixtureRequest, tiny_model: Callable[..., Any]) -> Any:
    return tiny_model(**MODELS[request.param])


@pytest.mark.parametrize("shard_bytes", [1000, 1 << 30])
def test_folder_gives_what_was_written(any_model: Any, tmp_path: Path, shard_bytes: int) -> None:
    path = any_model.write(tmp_path / "model", shard_bytes=shard_bytes)
    with open_folder(path) as folder:
        assert folder.path == path
        assert folder.hf_config == any_model.hf_config
        assert folder.config == any_model.config
        assert folder.manifest == any_model.manifest
        assert sorted(folder.stored_names()) == sorted(any_model.arrays)
        assert folder.shapes() == {name: spec.shape for name, spec in schema(any_model.config).items()}
        assert set(folder.dtypes().values()) == {np.dtype(any_model.manifest.dtype)}
        assert folder.dtypes().keys() == folder.shapes().keys()
        for name, shape in folder.shapes().items():
            array = folder.get(name)
            assert array.shape == shape and array.dtype == folder.dtypes()[name]
            np.testing.assert_array_equal(array, any_model.array(name))


def test_params_are_what_was_written(any_model: Any, tmp_path: Path) -> None:
    params = load_params(any_model.write(tmp_path / "model", shard_bytes=1000))
    abstract = abstract_params(any_model.config, any_model.manifest.dtype)
    assert jax.tree.map(lambda array: (array.shape, array.dtype), params) == jax.tree.map(
        lambda array: (array.shape, array.dtype), abstract
    )
    for name, array in flatten(params).items():
        assert isinstance(array, jax.Array)
        np.testing.assert_array_equal(np.asarray(array), any_model.array(name))


@pytest.mark.parametrize("dtype", ["float32", jnp.float16])
def test_params_in_another_dtype(model: Any, tmp_path: Path, dtype: Any) -> None:
    for name, array in flatten(load_params(model.write(tmp_path / "model"), dtype)).items():
        assert array.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(np.asarray(array), model.array(name).astype(dtype))


def test_shared_arrays_are_one_object(model: Any, tmp_path: Path) -> None:
    path = model.write(tmp_path / "model")
    with open_folder(path) as folder:
        owner = folder.get(OWNER)
        assert folder.get(ALIAS) is owner
        assert folder.get("layers_0.self_attn.q_proj.up") is not folder.get("layers_1.self_attn.q_proj.up")
    for dtype in (None, "float32"):
        flat = flatten(load_params(path, dtype))
        assert flat[ALIAS] is flat[OWNER]


def test_arrays_are_read_only_and_outlive_the_folder(model: Any, tmp_path: Path) -> None:
    with open_folder(model.write(tmp_path / "model")) as folder:
        array = folder.get("norm.scale")
    np.testing.assert_array_equal(array, model.array("norm.scale"))
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with pytest.raises(CheckpointError, match=r"model is closed; embed_tokens\.weight cannot be read any more"):
        folder.get("embed_tokens.weight")


def test_array_that_is_not_there(model: Any, tmp_path: Path) -> None:
    with (
        open_folder(model.write(tmp_path / "model")) as folder,
        pytest.raises(CheckpointError, match=r"has no array lm_head\.up"),
    ):
        folder.get("lm_head.up")


def test_loading_holds_one_array_at_a_time(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the device has memory of its own, that is; on the CPU an aligned array may serve as the device's."""
    alive: list[int] = []

    def get(folder: ModelFolder, name: str) -> np.ndarray:
        alive.append(len(folder._in_use))
        return read(folder, name)

    read = ModelFolder.get
    monkeypatch.setattr(ModelFolder, "get", get)
    monkeypatch.setattr(jax, "device_put", lambda array: jnp.array(array, copy=True))
    load_params(model.write(tmp_path / "model"))
    assert len(alive) == len(model.arrays) and max(alive) == 0


def test_a_dtype_that_there_is_not_is_an_error(model: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no dtype 'float17'"):
        load_params(model.write(tmp_path / "model"), "float17")
