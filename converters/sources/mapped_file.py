"""Mapping a weight file read-only, with a clear message for what downloads leave behind instead of weights."""

import mmap
from pathlib import Path

from flashsvd_jax.errors import CheckpointError

_LFS_POINTER = b"version https://git-lfs"


def map_file(path: Path) -> mmap.mmap:
    """Map `path` read-only; arrays that view the map keep it alive.

    Raises CheckpointError if the file is missing, unreadable, empty, or a Git LFS pointer.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist or is not a file")
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise CheckpointError(f"{path} is empty: the download was interrupted? Download it again")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if mapped[: len(_LFS_POINTER)] == _LFS_POINTER:
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: fetch them with  git lfs pull")
    return mapped
