"""Reading a factorized model's folder tensor by tensor."""

from pathlib import Path
from typing import Any, Self
from weakref import WeakValueDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.checkpoint.layout import MANIFEST_FILE
from flashsvd_jax.checkpoint.manifest import Manifest
from flashsvd_jax.checkpoint.metadata import Metadata
from flashsvd_jax.checkpoint.params_tree import full_tree
from flashsvd_jax.checkpoint.shards import Header, Shards
from flashsvd_jax.errors import CheckpointError, RequestError
from flashsvd_jax.progress import progress_bar
from flashsvd_jax.schema import check_shapes, schema

_SAFETENSORS_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class ModelFolder:
    """An open folder, made by `open_folder`; use it as a context manager, or call `close`.

    Attributes:
      path: the folder.
      hf_config: the base model's configuration, as its file has it.
      config: the model, its factorization included.
      manifest: what the folder holds.
    """

    def __init__(self, path: Path, metadata: Metadata, shards: Shards):
        self.path = path
        self.hf_config: dict[str, Any] = metadata.hf_config
        self.config: AnyConfig = metadata.config
        self.manifest: Manifest = metadata.manifest
        self._shards = shards
        self._owners = metadata.config.factorization.owner_by_name
        self._in_use: WeakValueDictionary[str, np.ndarray] = WeakValueDictionary()

    def stored_names(self) -> list[str]:
        """Names of the arrays that are stored, aliases left out."""
        return list(self._shards.headers)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Flat name -> shape of every array, aliases included."""
        return {name: spec.shape for name, spec in schema(self.config).items()}

    def dtypes(self) -> dict[str, np.dtype]:
        """Flat name -> dtype of every array, aliases included."""
        return dict.fromkeys(schema(self.config), jnp.dtype(self.manifest.dtype))

    def get(self, name: str) -> np.ndarray:
        """Reads one array into memory of its own, read-only; it stays valid after `close`.

        An alias gives its owner's array, and a name asked for while its array is in use gives the same object again.

        Raises:
          CheckpointError: no such array, the folder is closed, or the file has changed since it was opened.
        """
        owner = self._owners.get(name, name)
        if owner not in self._shards.headers:
            raise CheckpointError(f"{self.path} has no array {name}")
        array = self._in_use.get(owner)
        if array is None:
            array = self._in_use[owner] = self._shards.read(owner)
            array.flags.writeable = False  # others may have it too
        return array

    def close(self) -> None:
        """Lets go of the files; a second call does nothing."""
        self._shards.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def open_folder(path: str | Path) -> ModelFolder:
    """Opens a factorized model's folder and checks all that its small files and headers tell; reads no weights.

    Raises:
      ConfigError: the configuration is not one that this package runs.
      CheckpointError: not a factorized model, or a file is missing, damaged, or contradicts another.
    """
    path = Path(path)
    metadata = Metadata.read(path)
    shards = Shards.open(path)
    try:
        _check_headers(path, metadata, shards.headers)
    except CheckpointError:
        shards.close()
        raise
    return ModelFolder(path, metadata, shards)


def _check_headers(path: Path, metadata: Metadata, headers: dict[str, Header]) -> None:
    shapes = {name: header.shape for name, header in headers.items()}
    for name, owner in metadata.config.factorization.shared:
        if name in shapes:
            raise CheckpointError(f"{path}: {name} is stored, though {MANIFEST_FILE} says that it is {owner}")
        if owner in shapes:
            shapes[name] = shapes[owner]
    check_shapes(metadata.config, shapes, str(path))
    dtype = metadata.manifest.dtype
    wrong = [f"{h.file}: {name} is {h.dtype}" for name, h in headers.items() if h.dtype != _SAFETENSORS_DTYPES[dtype]]
    if wrong:
        raise CheckpointError(f"{path}: {MANIFEST_FILE} says that all arrays are {dtype}, but\n  " + "\n  ".join(wrong))


def load_params(path: str | Path, dtype: DTypeLike | None = None) -> dict[str, Any]:
    """Loads the parameter tree ``{"params": ...}`` onto the default device, one tensor in host memory at a time.

    Args:
      path: the folder.
      dtype: of the arrays, cast on the device; None keeps the stored one.

    Returns:
      The tree; a shared array is one and the same object in all its places.

    Raises:
      ConfigError, CheckpointError: see `open_folder`.
      RequestError: no such dtype.
    """
    try:
        dtype = None if dtype is None else jnp.dtype(dtype)
    except TypeError as error:
        raise RequestError(f"there is no dtype {dtype!r}") from error
    arrays = {}
    with open_folder(path) as folder:
        itemsize = jnp.dtype(folder.manifest.dtype).itemsize
        with progress_bar("loading", folder.manifest.params * itemsize, "B") as bar:
            for name in folder.stored_names():
                arrays[name] = _to_device(folder.get(name), dtype)
                bar.update(arrays[name].size * itemsize)
    return full_tree(arrays, folder.config)


def _to_device(array: np.ndarray, dtype: DTypeLike | None) -> jax.Array:
    on_device = jax.device_put(array)
    # Without waiting, arrays would gather in host memory faster than a device takes them.
    return (on_device if dtype is None else on_device.astype(dtype)).block_until_ready()
