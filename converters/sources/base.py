"""What every checkpoint reader offers: the tensors of one checkpoint by name, without loading all of them at once."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from flashsvd_jax.errors import CheckpointError

_MAX_DIMENSIONS = 32


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its file describes it.

    Attributes:
        name: key in the flat state dict, e.g. `model.layers.0.self_attn.q_u_proj.weight`.
        shape: as PyTorch stores it; () for a scalar.
        dtype: a NumPy dtype; `ml_dtypes.bfloat16` for bf16.
        file: the file that holds the tensor.
        identity: equal for tied tensors, i.e. for the same elements of the same storage of the same file. Compare it
            only within one open source.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    identity: Hashable

    def __post_init__(self):
        """Raises CheckpointError for a shape that no array can have, which a header may claim at no cost."""
        addressed = math.prod(max(size, 1) for size in self.shape) * self.dtype.itemsize
        if len(self.shape) > _MAX_DIMENSIONS or addressed > sys.maxsize:
            raise CheckpointError(f"{self.file}: tensor {self.name} has the impossible shape {self.shape}")

    @property
    def nbytes(self) -> int:
        """Size in bytes of the tensor laid out contiguously."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(ABC):
    """The tensors of one checkpoint; use it as a context manager, or call `close`.

    Attributes:
        path: the file or folder the user named.
        files: all weight files that are read.
        embedded_config: the plain entries of the model configuration found inside a pickle, else None.
        unknown_globals: sorted dotted names that a pickle asked for and that were replaced by inert stand-ins.
    """

    path: Path
    files: tuple[Path, ...]
    embedded_config: dict[str, Any] | None = None
    unknown_globals: tuple[str, ...] = ()

    @abstractmethod
    def infos(self) -> Mapping[str, TensorInfo]:
        """All tensors by name, in file order; reads no tensor data."""

    @abstractmethod
    def get(self, name: str) -> np.ndarray:
        """The tensor `name` as a read-only array: a view of the mapped file wherever the file allows it.

        Arrays stay valid after `close`. Raises CheckpointError for a name that is not in the checkpoint.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the files; a second call does nothing. `get` raises CheckpointError afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def folder_of(path: Path) -> Path:
    """The folder itself, or that of a file."""
    return path if path.is_dir() else path.parent
