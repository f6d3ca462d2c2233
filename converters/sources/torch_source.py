"""A checkpoint file of `torch.save` as a TensorSource."""

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from converters.sources.base import TensorInfo, TensorSource
from converters.sources.pickled_config import embedded_config
from converters.sources.pickled_tensors import TensorRef
from converters.sources.state_dict import flatten
from converters.sources.torch_zip import TorchArchive
from converters.sources.unpickle import load_inert
from flashsvd_jax.errors import CheckpointError

_NUMPY_NAMES = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
_DTYPES = {name: np.dtype(name) for name in _NUMPY_NAMES} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


class TorchSource(TensorSource):
    """A `.pt`, `.pth` or `.bin` file: a state dict or a pickled module. PyTorch is not needed and no code is run.

    Arrays are views of the mapped file, except for archives that were compressed after `torch.save`.
    """

    def __init__(self, path: Path):
        """Read the structure of the file and check that all tensor data is there.

        Raises CheckpointError for a file that is damaged, of another format, or holds no tensors.
        """
        self.path = path
        self.files = (path,)
        self._archive = TorchArchive(path)
        pickle_bytes = self._archive.pickle_bytes()
        try:
            root, self.unknown_globals = load_inert(pickle_bytes)
            self._refs = flatten(root)
            self.embedded_config = embedded_config(root)
            self._infos = {name: self._info(name, ref) for name, ref in self._refs.items()}
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except (RecursionError, MemoryError) as error:
            raise CheckpointError(f"{path}: the pickled objects nest too deep or contain themselves") from error
        if not self._infos:
            others = ", ".join(self.unknown_globals[:5])
            within = (
                f" but in objects of classes that are not read ({others}): save their state_dict()" if others else ""
            )
            raise CheckpointError(f"{path} holds no model: there are no tensors in it{within}")

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def get(self, name: str) -> np.ndarray:
        if name not in self._infos:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        ref, info = self._refs[name], self._infos[name]
        # The constructor checks the extent against the buffer once more.
        return np.ndarray(
            info.shape,
            info.dtype,
            buffer=self._archive.storage(ref.storage.key),
            offset=ref.offset * info.dtype.itemsize,
            strides=tuple(step * info.dtype.itemsize for step in ref.stride),
        )

    def close(self) -> None:
        self._archive.close()

    def _info(self, name: str, ref: TensorRef) -> TensorInfo:
        """Describe a tensor after checking that it lies in its storage, and the storage in the file."""
        dtype, storage_dtype = _DTYPES.get(ref.dtype), _DTYPES.get(ref.storage.dtype)
        if dtype is None or storage_dtype is None:
            raise CheckpointError(f"tensor {name} has dtype {ref.dtype}, which is not supported")
        extent = 0 if 0 in ref.shape else 1 + sum((n - 1) * step for n, step in zip(ref.shape, ref.stride, strict=True))
        storage_bytes = ref.storage.numel * storage_dtype.itemsize
        if (ref.offset + extent) * dtype.itemsize > storage_bytes:
            raise CheckpointError(f"tensor {name} reaches beyond the end of its storage")
        if storage_bytes > self._archive.storage_size(ref.storage.key):
            raise CheckpointError(f"storage {ref.storage.key!r} of tensor {name} is cut short: download the file again")
        identity = (str(self.path), ref.storage.key, ref.dtype, ref.offset, ref.shape, ref.stride)
        return TensorInfo(name, ref.shape, dtype, self.path, identity)
