"""Token ids as users give them."""

import contextlib
import operator
from collections.abc import Iterable

import numpy as np

from flashsvd_jax.errors import RequestError


def as_token_ids(given: object, otherwise: str) -> list[int]:
    """Whole numbers from a list, an array of NumPy's or JAX's, or what else can be gone through.

    Raises:
      RequestError: it is something else, such as a text, bytes or numbers that are not whole; says ``otherwise``.
    """
    if isinstance(given, Iterable) and not isinstance(given, str | bytes | bytearray):
        with contextlib.suppress(TypeError):
            # An array at once: JAX would fetch number after number from its device.
            tokens = np.asarray(given).tolist() if hasattr(given, "__array__") else list(given)
            if not any(isinstance(token, bool) for token in tokens):
                return [operator.index(token) for token in tokens]
    raise RequestError(otherwise)
