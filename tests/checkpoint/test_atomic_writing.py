"""A folder appears whole or not at all, whatever stops its writing."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from safetensors.numpy import load_file

from flashsvd_jax.checkpoint import FolderWriter, WeightWarning, open_folder, shard_writer
from flashsvd_jax.checkpoint.metadata import Metadata
from flashsvd_jax.errors import CheckpointError


def load_all(folder: Path) -> dict[str, np.ndarray]:
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_error_in_the_block_leaves_nothing(model: Any, tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        FolderWriter(tmp_path / "a" / "b" / "model", model.hf_config, model.manifest, shard_bytes=1) as out,
    ):
        for name, array in model.arrays.items():
            out.add(name, array)
        raise KeyboardInterrupt
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_existing_destination_is_refused(model: Any, tmp_path: Path, kind: str) -> None:
    dst = tmp_path / "model"
    {"folder": dst.mkdir, "file": dst.touch, "dangling link": lambda: dst.symlink_to("nowhere")}[kind]()
    with pytest.raises(CheckpointError, match=r"model already exists; delete it or choose another destination"):
        model.write(dst)
    assert names_in(tmp_path) == ["model"]


def test_destination_that_appears_meanwhile_is_kept(model: Any, tmp_path: Path) -> None:
    dst = tmp_path / "model"
    with (
        pytest.raises(CheckpointError, match="already exists"),
        FolderWriter(dst, model.hf_config, model.manifest) as out,
    ):
        for name, array in model.arrays.items():
            out.add(name, array)
        dst.mkdir()
    assert names_in(tmp_path) == ["model"] and names_in(dst) == []


def full_disk(*args: object, **kwargs: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["shard", "configuration", "rename", "fsync", "copy"])
def test_full_disk_leaves_nothing(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    owner, name = {
        "shard": (shard_writer, "save_file"),
        "configuration": (Metadata, "write_config"),
        "rename": (Path, "rename"),
        "fsync": (os, "fsync"),
        "copy": (shutil, "copyfile"),
    }[where]
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full_disk)
        with pytest.raises(CheckpointError, match=r"new/model cannot be written, .*No space left on device"):
            model.write(tmp_path / "new" / "model", copy_files=[tokenizer])
    assert names_in(tmp_path) == ["tokenizer.json"]


def test_file_system_that_cannot_sync_folders(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sync_files_only(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", sync_files_only)
    assert load_all(model.write(tmp_path / "model")).keys() == model.arrays.keys()


def test_failing_write_of_safetensors_leaves_nothing(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    model = tiny_model(vocab_size=20000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))  # like a full disk, inside the library's own code
    try:
        with pytest.raises(CheckpointError, match=r"model cannot be written, .*File too large"):
            model.write(tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names_in(tmp_path) == []


def test_place_that_cannot_be_written(model: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/model cannot be written"):
        model.write(tmp_path / "file" / "model")
    assert names_in(tmp_path) == ["file"]


def test_manifest_is_written_last(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def interrupt(metadata: Metadata, folder: Path) -> NoReturn:
        seen.extend(names_in(folder))
        raise KeyboardInterrupt

    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    monkeypatch.setattr(Metadata, "write_manifest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.write(tmp_path / "model", copy_files=[tokenizer])
    assert seen == ["config.json", "model.safetensors", "tokenizer.json"]
    assert names_in(tmp_path) == ["tokenizer.json"]


def test_two_writers_of_one_destination(model: Any, tmp_path: Path) -> None:
    dst = tmp_path / "model"
    with FolderWriter(dst, model.hf_config, model.manifest, shard_bytes=1) as out:
        for name, array in model.arrays.items():
            out.add(name, array)
        with pytest.raises(CheckpointError, match="model is being written by another process"):
            model.write(dst)
    assert load_all(dst).keys() == model.arrays.keys()
    assert names_in(tmp_path) == ["model"]


def test_killed_run_leaves_no_model_and_does_not_hinder_the_next(model: Any, tmp_path: Path) -> None:
    dst = tmp_path / "model"
    script = """
        import json, sys, time
        import numpy as np
        from flashsvd_jax.checkpoint import FolderWriter, Manifest

        dst, hf_config, manifest, names = sys.argv[1:]
        with FolderWriter(dst, json.loads(hf_config), Manifest.from_json(manifest, "argument"), shard_bytes=1) as out:
            for name, shape in json.loads(names).items():
                out.add(name, np.ones(shape, np.float32))
            print("added", flush=True)
            time.sleep(600)
    """
    shapes = json.dumps({name: array.shape for name, array in model.arrays.items()})
    arguments = [str(dst), json.dumps(model.hf_config), model.manifest.to_json(), shapes]
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), *arguments], stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None and process.stdout.readline() == b"added\n"
        process.kill()
    left = names_in(tmp_path)
    assert ".model.partial" in left and len(names_in(tmp_path / ".model.partial")) > 3
    for name in ("model", *left):
        with pytest.raises(CheckpointError):
            open_folder(tmp_path / name)
    model.write(dst)
    assert names_in(tmp_path) == ["model"]
    for name, array in load_all(dst).items():
        np.testing.assert_array_equal(array, model.array(name))


@pytest.mark.filterwarnings("error::flashsvd_jax.checkpoint.WeightWarning")
def test_warning_turned_into_an_error_leaves_nothing(model: Any, tmp_path: Path) -> None:
    model.arrays["norm.scale"][0] = np.nan
    with pytest.raises(WeightWarning):
        model.write(tmp_path / "model")
    assert names_in(tmp_path) == []
