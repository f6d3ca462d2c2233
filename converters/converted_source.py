"""A converted model as a checkpoint again, for what is added to one: an adapter."""

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from converters.detect import Detection
from converters.export_formats import EXPORT_FORMATS
from converters.sources import TensorInfo, TensorSource
from flashsvd_jax.checkpoint import open_folder
from flashsvd_jax.checkpoint.layout import MANIFEST_FILE
from flashsvd_jax.errors import CheckpointError


class ConvertedSource(TensorSource):
    """The arrays of a folder under the names of the first form that models are exported in; shared ones are the same tensor.

    Attributes:
      detection: the family of that form, whatever the folder was converted from.
    """

    def __init__(self, path: Path):
        """Opens the folder. Raises CheckpointError or ConfigError for a damaged one."""
        self.path, self.files = path, tuple(sorted(path.glob("*.safetensors")))
        self._folder, form = open_folder(path), EXPORT_FORMATS[0]
        config, dtype = self._folder.config, jnp.dtype(self._folder.manifest.dtype)
        owners, shapes = config.factorization.owner_by_name, self._folder.shapes()
        self._stored = {published: name for name, published in form.names(config)}
        self._infos = {
            published: TensorInfo(published, shapes[name], dtype, path, owners.get(name, name))
            for published, name in self._stored.items()
        }
        self.detection = Detection(
            form.family, (f"file {MANIFEST_FILE} of a model read as {self._folder.manifest.family}",)
        )

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def get(self, name: str) -> np.ndarray:
        if name not in self._stored:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        return self._folder.get(self._stored[name])

    def close(self) -> None:
        self._folder.close()
