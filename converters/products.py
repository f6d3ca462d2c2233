"""Exact arithmetic on weights that a converter puts together: in float64, rounded once."""

from collections.abc import Callable, Iterable, Sequence

import jax.numpy as jnp
import numpy as np

from converters.sources import TensorInfo
from flashsvd_jax.errors import ConversionError

_ROWS = 1024  # that are widened to float64 together


def made_dtype(parts: Iterable[TensorInfo]) -> np.dtype:
    """The dtype of a weight that is computed: float64 if one of its parts is, else float32, as 16 bits would round twice.

    Raises:
      ConversionError: a part is not floating point.
    """
    dtypes = [_float_dtype(part) for part in parts]
    return np.dtype(np.float64 if np.float64 in dtypes else np.float32)


def joint_dtype(parts: Sequence[TensorInfo]) -> np.dtype:
    """The dtype of a weight that is put together of others: theirs, or if these differ, one that holds them all; see above."""
    dtypes = {_float_dtype(part) for part in parts}
    return dtypes.pop() if len(dtypes) == 1 else made_dtype(parts)


def _float_dtype(part: TensorInfo) -> np.dtype:
    if not jnp.issubdtype(part.dtype, jnp.floating):
        raise ConversionError(f"{part.file}: {part.name} is {part.dtype}, not floating point")
    return part.dtype


def plus_product(
    weight: Callable[[], np.ndarray], up: Callable[[], np.ndarray], down: Callable[[], np.ndarray], dtype: np.dtype
) -> np.ndarray:
    """``weight + up @ down`` of [d_out, d_in], [d_out, rank] and [rank, d_in], some rows at a time."""
    base, left, right = weight(), up(), down().astype(np.float64)
    found = np.empty(base.shape, dtype)
    for start in range(0, len(base), _ROWS):
        rows = slice(start, start + _ROWS)
        found[rows] = base[rows].astype(np.float64) + left[rows].astype(np.float64) @ right
    return found
