"""Checksums of files, of those that a model was converted from and of its own."""

import hashlib
from pathlib import Path

from flashsvd_jax.checkpoint.layout import CHECKSUMS_FILE
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


def write_checksums(folder: Path, progress: bool = True) -> None:
    """Writes those of all files of a folder as `CHECKSUMS_FILE`, which `sha256sum -c` reads.

    Raises CheckpointError if a file cannot be read, OSError if that file cannot be written.
    """
    lines = [f"{sha256_of(file, progress)}  {file.name}\n" for file in sorted(folder.iterdir())]
    (folder / CHECKSUMS_FILE).write_text("".join(lines), encoding="utf-8")
