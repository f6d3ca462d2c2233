"""Heads and feed-forward layers narrower than the base model's, each layer by its own measure: Eigen Attention, MoDeGPT.

A decoder's configuration has one head width and one feed-forward width. So narrow heads are put in their places within full ones,
and zeros in the others, which changes no result:

- rows of queries, keys and values stay as they are, the first factor; the second one, of single heads, puts them in their places
  (zeros and ones, or one number for all where scores are scaled otherwise). Where that is no smaller, the weight is dense;
- columns of the output projection are dense, as wide as the base model's;
- feed-forward layers are as wide as the widest of them.

Weights so keep nearly all of what was saved, but the cache is as wide as the base model's.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from converters.products import made_dtype
from converters.rules import bias_of
from converters.sources import TensorInfo, TensorSource, WrappedSource
from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.errors import ConversionError

FIRST, SECOND = "{module}.weight", "{module}.places.weight"  # what the factors are called here
ATTENTION = "model.layers.{layer}.self_attn."


class ReducedWidths(WrappedSource):
    """What both families have in common: putting rows and columns of heads in their places."""

    description = ""

    def __init__(self, source: TensorSource, claims: Mapping[str, Any], base: AnyConfig):
        super().__init__(source)
        if not isinstance(base, ModelConfig) or base.model_type not in ("llama", "mistral") or base.qk_norm:
            raise ConversionError(
                f"{self.path} is {self.description}, of which only Llama's form is read, not {base.model_type}'s"
            )
        self._base = base
        self.notes = (
            "narrow heads are put in their places within heads of the base model's width, and so is the cache",
        )

    def _matrix(self, name: str, heads: int, axis: int) -> tuple[TensorInfo, int]:
        """Takes a stored weight; also the width of its heads, along an axis."""
        info = self._infos.pop(name, None)
        if info is None:
            raise ConversionError(f"{self.path}: {name} is missing")
        width = info.shape[axis] // heads if len(info.shape) == 2 else 0
        if len(info.shape) != 2 or info.shape[axis] != heads * width or not 0 < width <= self._base.head_dim:
            raise ConversionError(
                f"{self.path}: {name} is {list(info.shape)}, which is not {heads} heads of at most {self._base.head_dim}"
            )
        return info, width

    def _place_rows(self, module: str, info: TensorInfo, places: np.ndarray, scale: float = 1.0) -> None:
        """Describes a projection to full heads, from rows that stand at ``places`` [heads, width]."""
        full, d_in = self._base.head_dim, info.shape[1]
        second = placing(places, full, scale)
        heads, _, width = second.shape
        if width * (full + d_in) < full * d_in:
            self._infos[FIRST.format(module=module)] = info
            shape = second.shape if heads > 1 else second.shape[1:]
            self._make(SECOND.format(module=module), shape, lambda: second.reshape(shape), info, second.dtype)
        else:
            shape, dtype = (heads * full, d_in), made_dtype([info])
            self._make(FIRST.format(module=module), shape, partial(self._rows, info.name, second, dtype), info, dtype)
        computed = partial(self._placed_output, info.name, places, scale)
        self._outputs[FIRST.format(module=module)] = computed

    def _place_bias(self, module: str, info: TensorInfo, second: np.ndarray) -> None:
        """The bias of a projection to full heads, from that of its rows; ``second`` [heads, full, width] takes these there."""
        if info.shape != (second.shape[0] * second.shape[2],):
            raise ConversionError(
                f"{self.path}: {info.name} is {list(info.shape)}, not [{second.shape[0] * second.shape[2]}]"
            )
        heads, full, width = second.shape
        dtype = made_dtype([info])

        def bias() -> np.ndarray:
            return (second @ self._float64(info.name).reshape(heads, width, 1)).reshape(-1).astype(dtype)

        second_factor = SECOND.format(module=module)
        name = bias_of(second_factor) if second_factor in self._infos else f"{module}.bias"
        self._make(name, (heads * full,), bias, info, dtype)

    def _place_columns(self, module: str, info: TensorInfo, heads: int, width: int, full: int) -> None:
        """A projection from full heads, or from one wider layer; its columns are the first of each."""

        def whole() -> np.ndarray:
            stored = self._source.get(info.name).reshape(-1, heads, width)
            return np.pad(stored, ((0, 0), (0, 0), (0, full - width))).reshape(len(stored), heads * full)

        name = f"{module}.weight"
        if full == width:
            self._infos[name] = info
        else:
            self._make(name, (info.shape[0], heads * full), whole, info, info.dtype)
            self._outputs[name] = lambda x: (
                x.reshape(len(x), heads, full)[..., :width].reshape(len(x), -1) @ self._float64(info.name).T
            )

    def _rows(self, name: str, second: np.ndarray, dtype: np.dtype) -> np.ndarray:
        stored = self._float64(name)
        return (second @ stored.reshape(len(second), -1, stored.shape[1])).reshape(-1, stored.shape[1]).astype(dtype)

    def _placed_output(self, name: str, places: np.ndarray, scale: float, x: np.ndarray) -> np.ndarray:
        narrow = (x @ self._float64(name).T).reshape(len(x), *places.shape)
        whole = np.zeros((len(x), len(places), self._base.head_dim))
        for head, columns in enumerate(places):
            whole[:, head, columns] = scale * narrow[:, head]
        return whole.reshape(len(x), -1)


def placing(places: np.ndarray, full: int, scale: float = 1.0) -> np.ndarray:
    """What puts columns of narrow heads at ``places`` [heads, width] of full ones, times a number: float32 [heads, full, width]."""
    heads, width = places.shape
    second = np.zeros((heads, full, width), np.float32)
    second[np.arange(heads)[:, None], places, np.arange(width)] = scale
    return second
