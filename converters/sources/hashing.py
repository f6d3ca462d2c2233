"""Checksums of weight files for the record of a conversion."""

import hashlib
from pathlib import Path

from flashsvd_jax.errors import CheckpointError
from flashsvd_jax.progress import progress_bar

_CHUNK_BYTES = 4 << 20


def sha256_of(path: Path, progress: bool = True) -> str:
    """The SHA-256 of a file in hexadecimal, with a progress bar if it takes long and `progress` is set.

    Raises CheckpointError if the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with (
            path.open("rb") as file,
            progress_bar(f"sha256 {path.name}", path.stat().st_size, unit="B", enabled=progress) as bar,
        ):
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                bar.update(len(chunk))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
