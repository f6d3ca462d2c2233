"""Opening checkpoints: safetensors files, folders, shards behind an index, and what is refused with which words."""

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from converters.sources import open_source
from flashsvd_jax.checkpoint.hashing import sha256_of
from flashsvd_jax.errors import CheckpointError

TENSORS = {
    "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.weight": np.array([[1.5], [-2.0]], dtype=ml_dtypes.bfloat16),
    "scalar": np.array(7, dtype=np.int64),
    "empty": np.zeros((0, 4), dtype=np.float16),
    "mask": np.array([True, False, True]),
}


def read_all(path: Path) -> dict[str, np.ndarray]:
    with open_source(path) as source:
        arrays = {name: source.get(name) for name in source.infos()}
        for name, info in source.infos().items():
            assert (info.name, info.shape, info.dtype) == (name, arrays[name].shape, arrays[name].dtype)
            assert info.file in source.files and info.nbytes == arrays[name].nbytes
    return arrays


def assert_equal(arrays: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(arrays) == set(expected)
    for name, array in arrays.items():
        assert (array.shape, array.dtype) == (expected[name].shape, expected[name].dtype)
        assert array.tobytes() == expected[name].tobytes(), name


def save_torch(tensors: dict[str, np.ndarray], path: Path) -> None:
    """As PyTorch tensors in float32, whose values all of TENSORS keep."""
    torch.save({name: torch.tensor(array.astype(np.float32)) for name, array in tensors.items()}, path)


def write_index(folder: Path, stem: str, weight_map: dict[str, str]) -> Path:
    index = folder / f"{stem}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A folder with TENSORS in two safetensors shards."""
    weight_map = {}
    for number, names in ((1, ["b.weight", "mask"]), (2, ["a.weight", "scalar", "empty"])):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: TENSORS[name] for name in names}, tmp_path / shard)
        weight_map |= dict.fromkeys(names, shard)
    write_index(tmp_path, "model.safetensors", weight_map)
    return tmp_path


def edit_map(folder: Path, **changes: str | None) -> None:
    """Change entries of the index's weight_map, or remove those that are None."""
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"] | changes
    write_index(folder, "model.safetensors", {name: shard for name, shard in weight_map.items() if shard is not None})


def test_safetensors_file(tmp_path):
    path = tmp_path / "any name.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    assert_equal(read_all(path), TENSORS)
    with open_source(str(path)) as source:
        assert source.path == path and source.files == (path,)
        assert source.embedded_config is None and source.unknown_globals == ()
        assert len({info.identity for info in source.infos().values()}) == len(TENSORS)
        view = source.get("b.weight")
    assert not view.flags.owndata and not view.flags.writeable
    assert view.tolist() == TENSORS["b.weight"].tolist()  # outlives the source
    with pytest.raises(CheckpointError, match="closed"):
        source.get("b.weight")


@pytest.mark.parametrize("reader", ["safetensors", "pt", "folder"])
def test_unknown_tensor_name(tmp_path, sharded, reader):
    save_file(TENSORS, tmp_path / "other.safetensors")
    save_torch(TENSORS, tmp_path / "other.pt")
    source = open_source(sharded if reader == "folder" else tmp_path / f"other.{reader}")
    with pytest.raises(CheckpointError, match=r"has no tensor c\.weight"):
        source.get("c.weight")


def test_safetensors_dtype_that_is_not_supported(tmp_path):
    save_torch_file({"good": torch.ones(1), "bad": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"m\.safetensors: tensor bad has dtype F8_E4M3"):
        open_source(tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", ["m.safetensors", "m.bin", "m.pt"])
def test_files_that_are_not_there_or_not_weights(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(CheckpointError, match="does not exist"):
        open_source(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is empty: the download was interrupted"):
        open_source(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(CheckpointError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        open_source(path)


def test_unknown_suffix(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"model\.gguf is not a weight file.*\.safetensors, \.pt"):
        open_source(tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["model.safetensors", "custom.safetensors", "pytorch_model.bin", "m.pt", "m.pth"])
def test_folder_with_one_weight_file(tmp_path, name):
    for other in ("config.json", "tokenizer.model", "training_args.bin", "optimizer.pt", "rng_state_0.pth"):
        (tmp_path / other).write_bytes(b"{}")
    if name.endswith("safetensors"):
        save_file(TENSORS, tmp_path / name)
    else:
        save_torch(TENSORS, tmp_path / name)
    with open_source(tmp_path) as source:
        assert source.path == tmp_path and source.files == (tmp_path / name,)
        assert set(source.infos()) == set(TENSORS)


@pytest.mark.parametrize("names", [("pytorch_model.bin", "model.safetensors"), ("a.pt", "b.safetensors")])
def test_safetensors_are_preferred(tmp_path, names):
    (tmp_path / names[0]).write_bytes(b"never read")
    save_file(TENSORS, tmp_path / names[1])
    assert_equal(read_all(tmp_path), TENSORS)


def test_sharded_safetensors_are_preferred_to_one_bin(sharded):
    (sharded / "pytorch_model.bin").write_bytes(b"never read")
    assert_equal(read_all(sharded), TENSORS)
    assert [file.name for file in open_source(sharded).files] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def test_sharded_bin(tmp_path):
    save_torch({"b.weight": TENSORS["b.weight"]}, tmp_path / "pytorch_model-1.bin")
    save_torch({"a.weight": TENSORS["a.weight"]}, tmp_path / "pytorch_model-2.bin")
    weight_map = {"b.weight": "pytorch_model-1.bin", "a.weight": "pytorch_model-2.bin"}
    write_index(tmp_path, "pytorch_model.bin", weight_map)
    assert_equal(read_all(tmp_path), {name: TENSORS[name].astype(np.float32) for name in weight_map})


def test_shards_may_be_links_out_of_the_folder(sharded, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("blobs") / "blob"
    shard = sharded / "model-00001-of-00002.safetensors"
    shard.rename(elsewhere)
    shard.symlink_to(elsewhere)
    assert_equal(read_all(sharded), TENSORS)


def test_all_missing_shards_are_named(sharded):
    edit_map(sharded, **{"b.weight": "gone-1.safetensors", "mask": "gone-2.safetensors"})
    with pytest.raises(
        CheckpointError, match=r"lacks gone-1\.safetensors, gone-2\.safetensors: the download was inter"
    ):
        open_source(sharded)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", ".."])
def test_shard_outside_the_folder(sharded, name):
    folder = sharded / "model"
    folder.mkdir()
    for file in sharded.glob("model[-.]*"):
        file.rename(folder / file.name)
    save_file({"mask": TENSORS["mask"]}, sharded / "x.safetensors")
    edit_map(folder, mask=name)
    with pytest.raises(CheckpointError, match="names files outside its folder"):
        open_source(folder)


def test_index_and_shards_disagree(sharded):
    edit_map(sharded, added="model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"do not hold: added \(model-00001-of-00002"):
        open_source(sharded)
    edit_map(sharded, added=None, mask=None)
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors holds tensors.*does not name.*mask"):
        open_source(sharded)


def test_tensor_in_two_shards(sharded):
    names = ["a.weight", "scalar", "empty", "mask"]
    save_file({name: TENSORS[name] for name in names}, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors holds tensors.*another shard: mask"):
        open_source(sharded)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": ["a"]}', "[" * 100_000]
)
def test_damaged_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json is not an index"):
        open_source(tmp_path)


def test_a_tensor_that_an_index_names_twice(sharded):
    index = sharded / "model.safetensors.index.json"
    text = index.read_text()
    name, shard = next(iter(json.loads(text)["weight_map"].items()))
    index.write_text(text.replace('"weight_map": {', f'"weight_map": {{{json.dumps(name)}: "{shard}", ', 1))
    with pytest.raises(CheckpointError, match=f"'{name}' stands in an object twice"):
        open_source(sharded)


def test_index_beside_unsharded_file(sharded):
    save_file(TENSORS, sharded / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"both model\.safetensors and model\.safetensors\.index\.json"):
        open_source(sharded)


def test_folder_with_no_or_several_weight_files(tmp_path):
    with pytest.raises(CheckpointError, match="holds no weight file; it holds nothing"):
        open_source(tmp_path)
    (tmp_path / "model.safetensors.incomplete").write_bytes(b"x")
    (tmp_path / "training_args.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"it holds model\.safetensors\.incomplete, training_args\.bin"):
        open_source(tmp_path)
    for name in ("one.pt", "two.pt"):
        save_torch(TENSORS, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"several weight files and no index: name one of one\.pt, two\.pt"):
        open_source(tmp_path)


def test_sha256(tmp_path):
    contents = bytes(range(256)) * 40_000  # more than one chunk
    (tmp_path / "file").write_bytes(contents)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(contents).hexdigest()
    assert sha256_of(tmp_path / "file", progress=False) == hashlib.sha256(contents).hexdigest()
    with pytest.raises(CheckpointError, match="missing cannot be read"):
        sha256_of(tmp_path / "missing")
