"""Writing arrays as the safetensors files of a folder: one, or several with an index."""

import json
import shutil
from collections.abc import KeysView
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from flashsvd_jax.checkpoint.layout import INDEX_FILE, shard_file


class ShardWriter:
    """Writes arrays in the order they come; files get their names in `finish`, as these tell how many there are.

    Peak memory is one shard and one array: safetensors writes a file from arrays that are all in memory.

    Args:
      folder: the folder to write into.
      shard_bytes: size at which a new file is begun; only an array that is larger by itself makes a larger file.
      metadata: of every file.

    Raises:
      OSError, SafetensorError: a file cannot be written.
    """

    def __init__(self, folder: Path, shard_bytes: int, metadata: dict[str, str] | None = None):
        self._folder, self._shard_bytes, self._metadata = folder, shard_bytes, metadata
        self._pending: dict[str, np.ndarray] = {}
        self._shard_by_name: dict[str, int] = {}  # of every array that was added, pending ones included
        self._written = 0  # number of shards
        self._total = 0  # bytes

    @property
    def names(self) -> KeysView[str]:
        """Names of all arrays that were added."""
        return self._shard_by_name.keys()

    def make_room(self, nbytes: int) -> None:
        """Writes the file that was begun, if an array of this size does not fit into it; `add` does so by itself."""
        if self._pending and sum(other.nbytes for other in self._pending.values()) + nbytes > self._shard_bytes:
            self._write()

    def add(self, name: str, array: np.ndarray) -> None:
        """Takes a contiguous array, which must not be changed before its file is written."""
        self.make_room(array.nbytes)
        self._pending[name] = array
        self._shard_by_name[name] = self._written
        self._total += array.nbytes

    def finish(self, like: Path) -> None:
        """Writes what is left, names the files, and adds the index if there are several.

        ``like`` is a file whose permissions they get; by itself safetensors makes files that only their owner reads.
        """
        self._write()
        files = [shard_file(number + 1, self._written) for number in range(self._written)]
        for number, file in enumerate(files):
            self._part(number).rename(self._folder / file)
            shutil.copymode(like, self._folder / file)
        if len(files) > 1:
            by_name = {name: files[number] for name, number in sorted(self._shard_by_name.items())}
            index = {"metadata": {"total_size": self._total}, "weight_map": by_name}
            (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _write(self) -> None:
        save_file(self._pending, self._part(self._written), self._metadata)
        self._written += 1
        self._pending = {}

    def _part(self, number: int) -> Path:
        """Where shard ``number`` (from 0) is until the number of shards is known."""
        return self._folder / f"{number}.part"
