"""Where numbers of double precision are computed: on a GPU if there is one, by numpy if not."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = np.ndarray | jax.Array


@contextlib.contextmanager
def float64_module() -> Iterator[Any]:
    """The module to compute with inside the block: `numpy`, or `jax.numpy`, which knows float64 there and nowhere else.

    What a block makes on a GPU stays there; only other such blocks may compute with it, and `np.asarray` fetches it.
    """
    if jax.default_backend() != "gpu":
        yield np
        return
    with jax.enable_x64(True):
        yield jnp
