"""The safetensors files of a folder, one or several with an index, opened as one set of arrays.

Files are read with safetensors' ``pread`` backend. Its mapped one copies every array as well, so mapped pages come on
top of the arrays, and it takes five times as long (measured with safetensors 0.8); and where a file is cut short while
it is open, ``pread`` gives an error, not a bus error.
"""

from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from safetensors import SafetensorError, safe_open

from flashsvd_jax.checkpoint.json_files import Fields, read_object
from flashsvd_jax.checkpoint.layout import INDEX_FILE, WEIGHTS_FILE
from flashsvd_jax.errors import CheckpointError


class Header(NamedTuple):
    """What a file says about one of its arrays; the dtype as safetensors calls it, such as ``BF16``."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class Shards:
    """Open files, made by `Shards.open`.

    Attributes:
      headers: of every array, by name.
    """

    def __init__(self, folder: Path, files: dict[str, Any], headers: dict[str, Header]):
        self.headers = headers
        self._folder = folder
        self._files = files

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Opens a folder's files and reads their headers.

        Raises:
          CheckpointError: files are missing or damaged, or the index contradicts them; all problems in one message.
        """
        index = _read_index(folder)
        shards = cls(folder, {}, {})
        problems = []
        for file in sorted(set(index.values())) if index else [WEIGHTS_FILE]:
            problems += shards._add(file)
        if not problems:
            problems = _contradictions(index, shards.headers)
        if problems:
            shards.close()
            raise CheckpointError(f"{folder} cannot be loaded, {len(problems)} problems:\n  " + "\n  ".join(problems))
        return shards

    def read(self, name: str) -> np.ndarray:
        """Reads one array into memory of its own.

        Raises:
          CheckpointError: the files are closed, or the file has changed since it was opened.
        """
        file = self.headers[name].file
        if file not in self._files:
            raise CheckpointError(f"{self._folder} is closed; {name} cannot be read any more")
        try:
            return self._files[file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self._folder / file} cannot be read: {error}") from error

    def close(self) -> None:
        """Lets go of the files; a second call does nothing."""
        while self._files:
            _, file = self._files.popitem()
            file.__exit__(None, None, None)

    def _add(self, file: str) -> list[str]:
        """Opens one more file; returns what is wrong with it."""
        if not (self._folder / file).is_file():
            return [f"{file}: No such file"]
        try:
            opened = self._files[file] = safe_open(self._folder / file, framework="np", backend="pread")
            found = {name: opened.get_slice(name) for name in opened.offset_keys()}
        except (OSError, ValueError, SafetensorError) as error:
            return [f"{file}: {error}"]
        twice = sorted(found.keys() & self.headers.keys())
        problems = [f"{file}: {name} is in {self.headers[name].file} too" for name in twice]
        self.headers |= {name: Header(file, tuple(of.get_shape()), of.get_dtype()) for name, of in found.items()}
        return problems


def _read_index(folder: Path) -> dict[str, str]:
    """Name -> file of every array, empty where there is no index."""
    path = folder / INDEX_FILE
    if not path.exists():
        return {}
    weight_map = Fields(read_object(path), str(path)).take("weight_map", dict)
    for name, file in weight_map.items():
        # An index that comes with a downloaded model must not make us read files elsewhere.
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path}: weight_map[{name!r}] must name a file of this folder, not {file!r}")
    return weight_map


def _contradictions(index: dict[str, str], headers: dict[str, Header]) -> list[str]:
    if not index:
        return []
    problems = []
    for name in sorted(index.keys() | headers.keys()):
        stated, actual = index.get(name), headers[name].file if name in headers else None
        if stated != actual:
            problems.append(f"{INDEX_FILE} has {name} in {stated or 'no file'}, it is in {actual or 'no file'}")
    return problems
