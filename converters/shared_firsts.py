"""QSVD: query, key and value have one first factor, stored three times."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from converters.sources import TensorInfo, TensorSource, WrappedSource
from flashsvd_jax.any_config import AnyConfig

_JOINT = ("q_proj", "k_proj", "v_proj")


class SharedFirsts(WrappedSource):
    """Factors of one layer's query, key and value that are equal to the bit are one tensor here.

    QSVD decomposes the three weights together (its `SVDLinear.from_linearqkv`), and copies what they have in common.
    """

    def __init__(self, source: TensorSource, claims: Mapping[str, Any], base: AnyConfig):
        super().__init__(source)
        for name, kept in source.infos().items():
            parent, _, factor = name.partition(f".{_JOINT[0]}.")
            for leaf in _JOINT[1:] if factor.endswith("Linear.weight") else ():
                other = self._infos.get(f"{parent}.{leaf}.{factor}")
                if other is not None and self._equal(kept, other):
                    self._infos[f"{parent}.{leaf}.{factor}"] = kept

    def _equal(self, one: TensorInfo, other: TensorInfo) -> bool:
        if one.shape != other.shape or one.dtype != other.dtype or not one.shape:
            return False
        first, second = self._source.get(one.name), self._source.get(other.name)
        return np.array_equal(first[:1], second[:1]) and np.array_equal(first, second)
