"""Bringing weights onto the device, from an open folder or a tree of parameters."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.checkpoint import ModelFolder
from flashsvd_jax.checkpoint.manifest import DTYPES
from flashsvd_jax.compile_cache import enable_persistent_cache
from flashsvd_jax.errors import RequestError
from flashsvd_jax.models.expansion import expanded_sites
from flashsvd_jax.progress import progress_bar
from flashsvd_jax.schema import count_params, flatten
from pallas_kernels import hardware_rank


def check_dtype(dtype: str | None) -> None:
    """Raises RequestError for the name of a dtype that weights are not loaded in; None stands for that of the folder."""
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")


def place_params[W](config: AnyConfig, params: Mapping[str, Any], build: Callable[..., W], materialize: str) -> W:
    """Weights from a canonical parameter tree on the default device, ranks padded for it; the rest as `load_weights`."""
    expand = expanded_sites(config, materialize, hardware_rank)
    enable_persistent_cache()
    return build(flatten(params).__getitem__, hardware_rank, jax.device_put, expand)


def load_weights[W](
    folder: ModelFolder, build: Callable[..., W], materialize: str, dtype: str | None, progress: bool
) -> W:
    """Weights of an open folder on the default device, ranks padded for it.

    Args:
      folder: the model.
      build: `build_weights` or `build_encoder_weights` with its configuration given.
      materialize, dtype, progress: as for `flashsvd_jax.load`.
    """
    config = folder.config
    aliases = config.factorization.owner_by_name
    expand = expanded_sites(config, materialize, hardware_rank)
    with progress_bar("loading", total=count_params(config), unit="parameter", enabled=progress) as bar:

        def get(name: str) -> np.ndarray:
            array = folder.get(name)
            bar.update(0 if name in aliases else array.size)
            return array

        def place(array: Any) -> jax.Array:
            # Waiting for each array keeps one of them in host memory, not as many as the device lags behind.
            return jax.block_until_ready(jax.device_put(array))

        return build(get, hardware_rank, place, expand, dtype)
