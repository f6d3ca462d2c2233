"""A safetensors file as a TensorSource."""

import math
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from converters.sources.base import TensorInfo, TensorSource
from converters.sources.mapped_file import map_file
from flashsvd_jax.errors import CheckpointError

_HEADER_LENGTH_BYTES = 8
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class SafetensorsSource(TensorSource):
    """A `.safetensors` file. The library checks it; arrays are views of the mapped file, where it would copy them."""

    def __init__(self, path: Path):
        """Read the header. Raises CheckpointError for a damaged file or a dtype that is not supported."""
        self.path = path
        self.files = (path,)
        mapped = map_file(path)
        try:
            with safe_open(path, framework="numpy") as file:
                self._infos = {name: self._info(name, file.get_slice(name)) for name in file.offset_keys()}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or not completely downloaded: {error}") from error
        self._data: memoryview | None = memoryview(mapped)
        # The library has made sure that the tensors follow the header and each other without gaps, in this order.
        start = _HEADER_LENGTH_BYTES + int.from_bytes(mapped[:_HEADER_LENGTH_BYTES], "little")
        self._starts: dict[str, int] = {}
        for name, info in self._infos.items():
            self._starts[name] = start
            start += info.nbytes

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def get(self, name: str) -> np.ndarray:
        if self._data is None:
            raise CheckpointError(f"{self.path} is closed")
        if name not in self._infos:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        info = self._infos[name]
        flat = np.frombuffer(self._data, info.dtype, math.prod(info.shape), self._starts[name])
        return flat.reshape(info.shape)

    def close(self) -> None:
        self._data = None

    def _info(self, name: str, header) -> TensorInfo:
        dtype = _DTYPES.get(header.get_dtype())
        if dtype is None:
            raise CheckpointError(f"{self.path}: tensor {name} has dtype {header.get_dtype()}, which is not supported")
        return TensorInfo(name, tuple(header.get_shape()), dtype, self.path, (str(self.path), name))
