"""The parameter tree is an ordinary Flax one: its utilities, its serialization and Orbax take it as it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization, traverse_util

from flashsvd_jax.checkpoint import load_params
from flashsvd_jax.checkpoint.orbax_io import load_orbax, save_orbax
from flashsvd_jax.errors import CheckpointError, ConfigError
from flashsvd_jax.schema import abstract_params, flatten

ALIAS, OWNER = "layers_1.self_attn.q_proj.down", "layers_0.self_attn.q_proj.down"


@pytest.fixture(params=["bfloat16", "float16", "float32"])
def any_model(request: pytest.FixtureRequest, tiny_model: Callable[..., Any]) -> Any:
    return tiny_model(dtype=request.param)


def assert_same(first: Any, second: Any) -> None:
    """Equal trees, bit by bit."""
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_traverse_util(any_model: Any, tmp_path: Path) -> None:
    params = load_params(any_model.write(tmp_path / "model"))
    flat = traverse_util.flatten_dict(params, sep="/")
    assert "params/layers_0/self_attn/q_proj/down" in flat
    assert_same(traverse_util.unflatten_dict(flat, sep="/"), params)


def test_serialization_to_bytes(any_model: Any, tmp_path: Path) -> None:
    params = load_params(any_model.write(tmp_path / "model"))
    target = jax.tree.map(np.zeros_like, params)
    assert_same(serialization.from_bytes(target, serialization.to_bytes(params)), params)


def test_orbax_round_trip(any_model: Any, tmp_path: Path) -> None:
    params = load_params(any_model.write(tmp_path / "model"))
    save_orbax(tmp_path / "orbax", params, any_model.hf_config, any_model.manifest)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "orbax"]
    restored, config, hf_config, manifest = load_orbax(tmp_path / "orbax")
    assert (config, hf_config, manifest) == (any_model.config, any_model.hf_config, any_model.manifest)
    assert_same(restored, params)
    assert all(isinstance(array, jax.Array) for array in jax.tree.leaves(restored))
    flat = flatten(restored)
    assert flat[ALIAS] is flat[OWNER]


def test_orbax_stores_a_shared_array_once(model: Any, tmp_path: Path) -> None:
    save_orbax(tmp_path / "orbax", load_params(model.write(tmp_path / "model")), model.hf_config, model.manifest)
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata(tmp_path / "orbax" / "params").item_metadata.tree
    assert traverse_util.flatten_dict(tree, sep=".").keys() == model.arrays.keys()


def test_plain_orbax_takes_the_abstract_tree(model: Any, tmp_path: Path) -> None:
    params = load_params(model.write(tmp_path / "model"))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: leaf.update(sharding=device), abstract_params(model.config))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "plain", params)
        checkpointer.wait_until_finished()
        assert_same(checkpointer.restore(tmp_path / "plain", abstract), params)


def test_orbax_refuses_what_is_not_the_model(model: Any, tmp_path: Path) -> None:
    path = model.write(tmp_path / "model")
    description = (model.hf_config, model.manifest)
    with pytest.raises(CheckpointError, match=r"the manifest says bfloat16, cast these first: .*norm\.scale"):
        save_orbax(tmp_path / "orbax", load_params(path, "float32"), *description)
    params = load_params(path)
    with pytest.raises(CheckpointError, match="model already exists"):
        save_orbax(path, params, *description)
    del params["params"]["norm"]
    with pytest.raises(CheckpointError, match=r"missing: norm\.scale"):
        save_orbax(tmp_path / "orbax", params, *description)
    assert not (tmp_path / "orbax").exists()


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_failing_write_of_orbax_leaves_nothing(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def full_disk(checkpointer: ocp.StandardCheckpointer, directory: Path, tree: Any) -> NoReturn:
        directory.mkdir()
        (directory / "some part").touch()
        raise error(
            "OUT_OF_RANGE: Failed to write 3614420 bytes"
        )  # what TensorStore says; here as the real one is noisy

    params = load_params(model.write(tmp_path / "model"))
    monkeypatch.setattr(ocp.StandardCheckpointer, "save", full_disk)
    with pytest.raises(CheckpointError, match=r"orbax cannot be written, .*Failed to write"):
        save_orbax(tmp_path / "orbax", params, model.hf_config, model.manifest)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_damaged_orbax_folder(model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "orbax"
    save_orbax(folder, load_params(model.write(tmp_path / "model")), model.hf_config, model.manifest)
    (folder / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"orbax/config\.json cannot be read"):
        load_orbax(folder)
    (tmp_path / "config.json").rename(folder / "config.json")
    metadata = folder / "params" / "_METADATA"
    metadata.write_bytes(metadata.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"orbax/params cannot be read: "):
        load_orbax(folder)
    with pytest.raises(CheckpointError, match=r"model/params cannot be read: "):
        load_orbax(tmp_path / "model")
    (folder / "factorization.json").unlink()
    with pytest.raises(CheckpointError, match="orbax is not a factorized model"):
        load_orbax(folder)
