"""Writing a factorized model as a folder: whole or not at all."""

import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError

from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.checkpoint.casting import cast
from flashsvd_jax.checkpoint.hashing import write_checksums
from flashsvd_jax.checkpoint.layout import CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, WEIGHTS_FILE
from flashsvd_jax.checkpoint.manifest import Manifest
from flashsvd_jax.checkpoint.metadata import Metadata
from flashsvd_jax.checkpoint.params_tree import stored_arrays
from flashsvd_jax.checkpoint.shard_writer import ShardWriter
from flashsvd_jax.checkpoint.staging import StagedFolder, unwritable_as_checkpoint_error
from flashsvd_jax.errors import CheckpointError


class WeightWarning(UserWarning):
    """Weights that were written hold NaN or infinity; ``arrays`` are their names."""

    def __init__(self, message: str, arrays: Sequence[str] = ()):
        super().__init__(message)
        self.arrays = tuple(arrays)


class FolderWriter:
    """Writes a model's folder tensor by tensor; a context manager.

    The folder appears at ``dst`` when the block ends without an error; before that, and after one, there is nothing.
    Peak memory is one shard and one tensor, see `ShardWriter`.

    Args:
      dst: the folder to make; its parents are made too.
      hf_config: the base model's configuration, written as it is.
      manifest: what the folder holds; every array is cast to its dtype.
      shard_bytes: size at which a new file is begun; only a tensor that is larger by itself makes a larger file.
      copy_files: files to copy into the folder, such as the tokenizer's (see `layout.companion_files`).
      progress: show a bar if taking checksums of what was written takes more than two seconds.

    Attributes:
      config: the model that ``hf_config`` and ``manifest`` describe.

    Raises:
      ConfigError: the configuration is not one that this package runs.
      CheckpointError: ``dst`` exists or cannot be written, or manifest, configuration and arrays contradict each other.
    """

    def __init__(
        self,
        dst: str | Path,
        hf_config: Mapping[str, Any],
        manifest: Manifest,
        *,
        shard_bytes: int = 2 * 2**30,
        copy_files: Sequence[Path] = (),
        progress: bool = False,
    ):
        self._dst, self._progress = Path(dst), progress
        checked = Manifest.from_json(manifest.to_json(), f"manifest for {dst}")  # what is written can be read
        self._metadata = Metadata.of(hf_config, checked, str(dst))
        self.config: AnyConfig = self._metadata.config
        self._dtype = jnp.dtype(checked.dtype)
        self._copy_files = _checked_copies(copy_files)
        self._staged = StagedFolder(self._dst)
        self._shards = ShardWriter(self._staged.path, shard_bytes)
        self._flaws: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._staged.__enter__()
        return self

    def add(self, name: str, array: np.ndarray) -> None:
        """Takes one array by its flat name, in any order; it may be reused afterwards.

        Raises:
          CheckpointError: not a stored array of the model, added before, of the wrong shape, or not floating point.
        """
        self._check(name, array)
        with unwritable_as_checkpoint_error(self._dst, SafetensorError):
            self._shards.make_room(array.size * self._dtype.itemsize)  # before there is a copy
        copy, flaw = cast(array, self._dtype)
        self._shards.add(name, copy)
        if flaw:
            self._flaws[name] = flaw

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._staged.__exit__()

    def _check(self, name: str, array: np.ndarray) -> None:
        spec = self._metadata.stored.get(name)
        if spec is None:
            owner = self.config.factorization.owner_by_name.get(name)
            why = f"it shares the array of {owner}; add that alone" if owner else "the model has no such array"
            raise CheckpointError(f"{self._dst}: {name} cannot be added: {why}")
        if name in self._shards.names:
            raise CheckpointError(f"{self._dst}: {name} was added before")
        if array.shape != spec.shape:
            raise CheckpointError(f"{self._dst}: {name} is {list(array.shape)}, it must be {list(spec.shape)}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise CheckpointError(f"{self._dst}: {name} is {array.dtype.name}, it must be floating point")

    def _finish(self) -> None:
        missing = self._metadata.stored.keys() - self._shards.names
        if missing:
            raise CheckpointError(f"{self._dst}: {len(missing)} arrays were not added: {', '.join(sorted(missing))}")
        self._warn()
        with unwritable_as_checkpoint_error(self._dst, SafetensorError):
            self._metadata.write_config(self._staged.path)
            self._shards.finish(like=self._staged.path / CONFIG_FILE)
            for file in self._copy_files:
                shutil.copyfile(file, self._staged.path / file.name)
            self._metadata.write_manifest(self._staged.path)
            write_checksums(self._staged.path, self._progress)
        self._staged.commit()

    def _warn(self) -> None:
        if self._flaws:
            listed = "; ".join(f"{name} {flaw}" for name, flaw in sorted(self._flaws.items()))
            message = f"{self._dst}: {len(self._flaws)} arrays are not finite: {listed}"
            warnings.warn(WeightWarning(message, sorted(self._flaws)), stacklevel=4)


def save_params(
    dst: str | Path,
    params: Mapping[str, Any],
    config: AnyConfig,
    hf_config: Mapping[str, Any],
    manifest: Manifest,
    *,
    copy_files: Sequence[Path] = (),
) -> None:
    """Writes a parameter tree ``{"params": ...}`` as a folder; arrays are fetched from their device one at a time.

    Raises:
      ConfigError, CheckpointError: see `FolderWriter`; also where ``config`` is not the model that ``hf_config`` and
        ``manifest`` describe, or ``params`` is not a tree of that model.
    """
    with FolderWriter(dst, hf_config, manifest, copy_files=copy_files) as writer:
        if config != writer.config:
            raise CheckpointError(f"{dst}: the configuration of params is not what hf_config and the manifest describe")
        for name, array in stored_arrays(params, config, str(dst)).items():
            writer.add(name, np.asarray(array))


def _checked_copies(files: Sequence[Path]) -> tuple[Path, ...]:
    """Raises CheckpointError for a file that is not there, or whose name is taken."""
    taken = {CONFIG_FILE, MANIFEST_FILE, INDEX_FILE, WEIGHTS_FILE}
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} cannot be copied: there is no such file")
        if file.name in taken:
            raise CheckpointError(f"{file} cannot be copied: the folder has another file of that name")
        taken.add(file.name)
    return tuple(files)
