"""A folder that appears whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Self

import filelock

from flashsvd_jax.errors import CheckpointError


class StagedFolder:
    """A hidden folder beside ``dst`` to write into: `commit` renames it to ``dst``, leaving without commit deletes it.

    A lock keeps two runs with the same ``dst`` apart; what a killed run left behind is deleted by the next one.

    Attributes:
      path: the hidden folder.

    Raises:
      CheckpointError: ``dst`` exists, another process is writing it, or its place cannot be written.
    """

    def __init__(self, dst: Path):
        self._dst = dst.absolute()
        self.path = self._dst.parent / f".{self._dst.name}.partial"
        self._lock_file = self._dst.parent / f".{self._dst.name}.lock"

    def __enter__(self) -> Self:
        self._refuse_existing()
        new_parents = [parent for parent in self._dst.parents if not parent.exists()]
        with unwritable_as_checkpoint_error(self._dst), contextlib.ExitStack() as undo:
            undo.callback(_remove_empty, new_parents)
            self._dst.parent.mkdir(parents=True, exist_ok=True)
            undo.callback(locked(self._lock_file, f"{self._dst} is being written by another process"))
            shutil.rmtree(self.path, ignore_errors=True)
            undo.callback(shutil.rmtree, self.path, ignore_errors=True)
            self.path.mkdir()
            self._undo = undo.pop_all()
        return self

    def commit(self) -> None:
        """Puts the folder in its place, once everything in it is safely on disk."""
        self._refuse_existing()
        with unwritable_as_checkpoint_error(self._dst):
            for path in [*self.path.rglob("*"), self.path]:
                sync(path)
            self.path.rename(self._dst)
        sync(self._dst.parent)

    def __exit__(self, *exc_info: object) -> None:
        self._undo.close()

    def _refuse_existing(self) -> None:
        if os.path.lexists(self._dst):
            raise CheckpointError(f"{self._dst} already exists; delete it or choose another destination")


def locked(file: Path, busy: str) -> Callable[[], None]:
    """Takes the lock of that file; returns what gives it back.

    Raises:
      CheckpointError: another process has it; ``busy`` says so.
    """
    lock = filelock.FileLock(file)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise CheckpointError(busy) from error

    def unlock() -> None:
        file.unlink(missing_ok=True)  # while it is held: filelock never trusts a file that was unlinked
        lock.release()

    return unlock


@contextlib.contextmanager
def unwritable_as_checkpoint_error(dst: Path, *library_errors: type[Exception]) -> Iterator[None]:
    """Turns a full disk, a missing permission and the like into a CheckpointError that names ``dst``.

    ``library_errors`` are what a library raises for these in place of OSError.
    """
    try:
        yield
    except (OSError, *library_errors) as error:
        raise CheckpointError(f"{dst} cannot be written, and nothing was left there: {error}") from error


def sync(path: Path) -> None:
    """Waits until a file is on disk, or the names in a folder."""
    # Some file systems cannot sync folders; a model can be written there all the same.
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_empty(folders: Iterable[Path]) -> None:
    """Deletes those folders, innermost first, that are still empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
