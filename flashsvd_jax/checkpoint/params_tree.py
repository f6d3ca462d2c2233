"""From a parameter tree to the arrays that are stored of it, and back: a shared array is stored once."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.errors import CheckpointError
from flashsvd_jax.schema import check_shapes, flatten, nest


def stored_arrays(params: Mapping[str, Any], config: AnyConfig, where: str) -> dict[str, Any]:
    """The arrays of a tree ``{"params": ...}`` by flat name, those left out that are another one.

    Raises:
      CheckpointError: the tree is not one of this model, or an array that should be another one has other values.
    """
    flat = flatten(params)
    check_shapes(config, {name: array.shape for name, array in flat.items()}, f"{where}: the parameter tree")
    for name, owner in config.factorization.shared:
        array = flat.pop(name)
        if array is not flat[owner] and not np.array_equal(np.asarray(array), np.asarray(flat[owner]), equal_nan=True):
            raise CheckpointError(f"{where}: {name} should share the array of {owner}, but has other values")
    return flat


def full_tree(stored: Mapping[str, Any], config: AnyConfig) -> dict[str, Any]:
    """The tree ``{"params": ...}`` with every shared array in all its places, as the same object."""
    shared = {name: stored[owner] for name, owner in config.factorization.shared}
    return nest({**stored, **shared})
