"""Palu: groups of heads have second factors of their own, each of its own rank.

Its `HeadwiseLowRankModule` computes ``z = VT(x)``, cuts z into as many shares as there are groups, and puts ``U[g](z_g)`` of all
groups side by side. As canonical factors: down [groups * rank, d_in] and up [groups, d_out / groups, rank], where a group of a
lower rank than the largest is filled up with zeros.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from converters.products import joint_dtype
from converters.sources import TensorInfo, TensorSource, WrappedSource
from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.errors import ConversionError

CONFIG_KEY = "head_wise_ranks"
_SECOND = re.compile(r"^(.*)\.U\.(\d+)\.(weight|bias)$")


class HeadGroups(WrappedSource):
    """`<module>.VT.weight` with equal shares for all groups, and `<module>.U.weight` and `.bias` of all groups together."""

    def __init__(self, source: TensorSource, claims: Mapping[str, Any], base: AnyConfig):
        """Looks at names and shapes.

        Raises:
          ConversionError: names every module whose groups are incomplete, unequal, or of other ranks than the configuration says.
        """
        super().__init__(source)
        parts: dict[str, dict[str, dict[int, TensorInfo]]] = defaultdict(lambda: {"weight": {}, "bias": {}})
        for name in source.infos():
            match = _SECOND.match(name)
            if match:
                parts[match[1]][match[3]][int(match[2])] = self._infos.pop(name)
        told = claims.get(CONFIG_KEY)
        self._told: Mapping[str, Any] = told if isinstance(told, Mapping) else {}
        problems = [self._join(module, found["weight"], found["bias"]) for module, found in parts.items()]
        problems += [
            f"{CONFIG_KEY} names {module}, which has no groups" for module in self._told if module not in parts
        ]
        listed = "".join(f"\n  {problem}" for problem in problems if problem)
        if listed:
            raise ConversionError(f"{self.path}, read as Palu's groups of heads:{listed}")

    def _join(self, module: str, weights: dict[int, TensorInfo], biases: dict[int, TensorInfo]) -> str:
        """Describes one module's factors; returns what is wrong with them."""
        first = self._infos.get(f"{module}.VT.weight")
        if (
            first is None
            or sorted(weights) != list(range(len(weights)))
            or (biases and biases.keys() != weights.keys())
        ):
            return f"{module}: VT or one of {len(weights)} U is missing"
        found = [weights[group] for group in range(len(weights))]
        rows = found[0].shape[:1]
        if any(len(info.shape) != 2 or info.shape[:1] != rows for info in found):
            return f"{module}: its U have {', '.join(str(list(info.shape)) for info in found)}"
        ranks = [info.shape[1] for info in found]
        if self._told and self._told.get(module) != ranks:
            return f"{CONFIG_KEY} gives {module} ranks {self._told.get(module)!r}, the tensors say {ranks}"
        if any(info.shape != rows for info in biases.values()):
            return f"{module}: its biases have {', '.join(str(list(info.shape)) for info in biases.values())}"
        if len(first.shape) != 2 or first.shape[0] != sum(ranks) or min(ranks) == 0:
            return f"{first.name} is {list(first.shape)}, its U need {sum(ranks)} rows"
        rank = max(ranks)
        self._outputs[first.name] = partial(self._computed, first.name, found)
        if min(ranks) < rank:
            down = partial(self._filled, first.name, ranks)
            self._make(first.name, (len(ranks) * rank, first.shape[1]), down, first, joint_dtype([first]))
        # One group is no group: a factor of the whole.
        shape = (len(ranks), *rows, rank) if len(ranks) > 1 else (*rows, rank)
        dtype = joint_dtype(found)
        self._make(f"{module}.U.weight", shape, partial(self._stacked, found, shape, dtype), found[0], dtype)
        if biases:
            dtype = joint_dtype([*biases.values()])
            bias = partial(self._concatenated, [biases[group].name for group in range(len(ranks))], dtype)
            self._make(f"{module}.U.bias", (len(ranks) * rows[0],), bias, biases[0], dtype)
        return ""

    def _filled(self, name: str, ranks: list[int]) -> np.ndarray:
        """The first factor, rows of zeros behind each share that has fewer than the largest."""
        stored = self._source.get(name)
        whole = np.zeros((len(ranks), max(ranks), stored.shape[1]), stored.dtype)
        for group, share in enumerate(np.split(stored, np.cumsum(ranks)[:-1])):
            whole[group, : len(share)] = share
        return whole.reshape(-1, stored.shape[1])

    def _stacked(self, found: list[TensorInfo], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The second factors of all groups, filled up likewise."""
        whole = np.zeros((len(found), *shape[-2:]), dtype)
        for group, info in enumerate(found):
            whole[group, :, : info.shape[1]] = self._source.get(info.name)
        return whole.reshape(shape)

    def _concatenated(self, names: list[str], dtype: np.dtype) -> np.ndarray:
        return np.concatenate([self._source.get(name).astype(dtype) for name in names])

    def _computed(self, first: str, found: list[TensorInfo], x: np.ndarray) -> np.ndarray:
        """As the module computes it."""
        latent = x @ self._float64(first).T
        ends = np.cumsum([0, *(info.shape[1] for info in found)])
        shares = [latent[:, start:end] for start, end in pairwise(ends)]
        return np.concatenate([z @ self._float64(info.name).T for z, info in zip(shares, found, strict=True)], axis=1)
