"""A folder of finished parts of long work, so that it can go on after an interruption."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from flashsvd_jax.checkpoint.hashing import sha256_of
from flashsvd_jax.checkpoint.layout import CONFIG_FILE, MANIFEST_FILE
from flashsvd_jax.checkpoint.staging import locked, sync, unwritable_as_checkpoint_error
from flashsvd_jax.errors import CheckpointError

_WHAT_FILE = "work.json"


class WorkFolder:
    """Named parts, each there whole or not at all, of work that is described by a few fields; a context manager.

    It is kept when the block ends, whatever ends it, until `remove`. A lock keeps two runs apart.

    Args:
      path: the folder, made if it is not there.
      what: JSON fields that the parts depend on; a folder of other fields is refused, not used and not deleted.

    Raises:
      CheckpointError: another process has it, it is of other work, or it cannot be written.
    """

    def __init__(self, path: Path, what: Mapping[str, Any]):
        self.path = path.absolute()
        self._what = json.loads(json.dumps(what))
        self._lock_file = self.path.with_name(f"{self.path.name}.lock")

    def __enter__(self) -> Self:
        with unwritable_as_checkpoint_error(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._unlock = locked(self._lock_file, f"{self.path} is in use by another process")
        try:
            self._check()
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.path.is_dir() and [file.name for file in self.path.iterdir()] == [_WHAT_FILE]:
            self.remove()  # nothing was finished
        self._unlock()

    def _check(self) -> None:
        file = self.path / _WHAT_FILE
        if not file.is_file():  # new, or ended before there was any part
            shutil.rmtree(self.path, ignore_errors=True)
            with unwritable_as_checkpoint_error(self.path):
                self.path.mkdir()
            self.save_json(_WHAT_FILE.removesuffix(".json"), self._what)
            return
        found = self.load_json(_WHAT_FILE.removesuffix(".json"))
        keys = dict.fromkeys([*found, *self._what]) if isinstance(found, dict) else {}
        differ = [key for key in keys if found.get(key) != self._what.get(key)]
        if differ or not keys:
            said = "; ".join(f"{key} was {found.get(key)!r}, now {self._what.get(key)!r}" for key in differ)
            raise CheckpointError(
                f"{self.path} is of other work ({said}): delete it to begin anew, or ask for the same"
            )

    def load(self, part: str) -> dict[str, np.ndarray] | None:
        """The arrays of a part, None if it is not there."""
        file = self._file(part, "safetensors")
        try:
            return load_file(file) if file.is_file() else None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} is damaged: {error}; delete it, then it is computed again") from error

    def save(self, part: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keeps a part; a part of that name is replaced."""
        contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        with unwritable_as_checkpoint_error(self.path, SafetensorError):
            self._replace(self._file(part, "safetensors"), lambda file: save_file(contiguous, file))

    def load_json(self, part: str) -> Any:
        """A part that is JSON, None if it is not there."""
        file = self._file(part, "json")
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} is damaged: {error}; delete it, then it is computed again") from error

    def save_json(self, part: str, value: Any) -> None:
        """Keeps a part as JSON."""
        text = json.dumps(value, indent=1)
        with unwritable_as_checkpoint_error(self.path):
            self._replace(self._file(part, "json"), lambda file: file.write_text(text, encoding="utf-8"))

    def remove(self) -> None:
        """Deletes the folder, when its work is done."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, part: str, kind: str) -> Path:
        return self.path / f"{part}.{kind}"

    def _replace(self, file: Path, write: Any) -> None:
        """Writes beside the file, then puts it in its place once it is safely on disk."""
        part = file.with_name(f".{file.name}.part")
        write(part)
        sync(part)
        os.replace(part, file)
        sync(self.path)


def content_digest(folder: Path) -> str:
    """Of a model's folder: the SHA-256 of its weights, configuration and manifest."""
    files = sorted([*folder.glob("*.safetensors"), folder / CONFIG_FILE, folder / MANIFEST_FILE])
    digests = [f"{file.name} {sha256_of(file, progress=False)}" for file in files]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
