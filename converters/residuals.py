"""Low-rank terms beside a residual, as one weight or one pair of factors: CorDA, and Fisher-SVD's dense blocks.

CorDA's layer computes ``ALinear(BLinear(x)) + x @ weight_residual.T``. Its residual is as large as the weight it came from, so the
sum of both is stored, a dense weight.

Fisher-SVD's `SVDLinearWithDenseBlocks` computes ``u_proj(v_proj(x))``, and for every group g adds ``x[:, col : col + b] @
g_blocks_T`` to the outputs ``g_row_index``. A group is a product of rank b: a first factor that picks b inputs, and a second one
that holds the blocks. So both together are one wider pair, with not a number changed; where that is larger than the weight, the sum
is stored.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from converters.products import made_dtype, plus_product
from converters.sources import TensorInfo, TensorSource, WrappedSource
from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.errors import ConversionError

_RESIDUAL = ".weight_residual"
_BLOCKS = re.compile(r"^(.*)\.g(\d+)_(col|row_index|blocks_T)$")
_PARTS = ("col", "row_index", "blocks_T")


class DenseResiduals(WrappedSource):
    """CorDA: `<module>.weight` in place of two factors and a residual."""

    def __init__(self, source: TensorSource, claims: Mapping[str, Any], base: AnyConfig):
        """Looks at names and shapes.

        Raises:
          ConversionError: a residual lacks a factor, or they do not form one weight.
        """
        super().__init__(source)
        modules = [name.removesuffix(_RESIDUAL) for name in source.infos() if name.endswith(_RESIDUAL)]
        for module in modules:
            self._merge(module)
        self.notes = (f"{len(modules)} projections are dense: each has a residual of full size beside its factors",)

    def _merge(self, module: str) -> None:
        first, second, whole = f"{module}.BLinear.weight", f"{module}.ALinear.weight", module + _RESIDUAL
        missing = [name for name in (first, second) if name not in self._infos]
        if missing:
            raise ConversionError(f"{self.path}: {whole} stands beside no {missing[0]}")
        down, up, residual = (self._infos.pop(name) for name in (first, second, whole))
        if len(down.shape) != 2 or up.shape[1:] != down.shape[:1] or up.shape[:1] + down.shape[1:] != residual.shape:
            shapes = ", ".join(f"{part.name} {list(part.shape)}" for part in (up, down, residual))
            raise ConversionError(f"{self.path}: these do not form one weight: {shapes}")
        bias = self._infos.pop(f"{module}.ALinear.bias", None)
        if bias is not None:
            self._infos[f"{module}.bias"] = bias
        get = self._source.get
        dtype, name = made_dtype((down, up, residual)), f"{module}.weight"
        parts = (partial(get, part.name) for part in (residual, up, down))
        self._make(name, residual.shape, partial(plus_product, *parts, dtype), residual, dtype)
        self._outputs[name] = lambda x: (
            x @ self._float64(first).T @ self._float64(second).T + x @ self._float64(whole).T
        )


class BlockResiduals(WrappedSource):
    """Fisher-SVD: wider `<module>.v_proj.weight` and `<module>.u_proj.weight`, or `<module>.weight`."""

    def __init__(self, source: TensorSource, claims: Mapping[str, Any], base: AnyConfig):
        """Looks at names and shapes, and where blocks stand.

        Raises:
          ConversionError: blocks lack a part or their factors, or reach beyond the weight.
        """
        super().__init__(source)
        groups: dict[str, dict[int, dict[str, TensorInfo]]] = defaultdict(lambda: defaultdict(dict))
        for name in source.infos():
            match = _BLOCKS.match(name)
            if match:
                groups[match[1]][int(match[2])][match[3]] = self._infos.pop(name)
        wider = sum(self._widen(module, groups[module]) for module in groups)
        kept = f"{wider} of them as a wider pair, {len(groups) - wider} dense, as that is smaller"
        self.notes = (f"{len(groups)} projections have blocks beside their factors: {kept}",)

    def _widen(self, module: str, groups: Mapping[int, Mapping[str, TensorInfo]]) -> bool:
        """Puts one projection together; returns whether it is still a pair."""
        first, second = f"{module}.v_proj.weight", f"{module}.u_proj.weight"
        down, up = self._infos.get(first), self._infos.get(second)
        if down is None or up is None or len(down.shape) != 2 or len(up.shape) != 2:
            raise ConversionError(
                f"{self.path}: {module} has blocks (g0_blocks_T), but no two factors u_proj and v_proj"
            )
        d_out, d_in = up.shape[0], down.shape[1]
        if up.shape[1] != down.shape[0]:
            shapes = f"{up.name} {list(up.shape)}, {down.name} {list(down.shape)}"
            raise ConversionError(f"{self.path}: these are no two factors: {shapes}")
        blocks = [self._checked(f"{module}.g{number}", groups[number], d_out, d_in) for number in sorted(groups)]
        if len({width for _, width in blocks}) > 1:
            raise ConversionError(f"{self.path}: the blocks of {module} are of different sizes")
        rank = down.shape[0] + sum(width for _, width in blocks)
        dtype = made_dtype((down, up, *(parts["blocks_T"] for parts in groups.values())))
        self._outputs[first] = self._outputs[f"{module}.weight"] = partial(
            self._computed, first, second, module, groups
        )
        wide_down, wide_up = (partial(self._wide, side, module, groups, blocks, dtype) for side in ("down", "up"))
        if rank * (d_out + d_in) < d_out * d_in:
            self._make(first, (rank, d_in), wide_down, down, dtype)
            self._make(second, (d_out, rank), wide_up, up, dtype)
            return True
        del self._infos[first], self._infos[second]
        bias = self._infos.pop(f"{module}.u_proj.bias", None)
        if bias is not None:
            self._infos[f"{module}.bias"] = bias
        zeros = partial(np.broadcast_to, np.zeros((), dtype), (d_out, d_in))
        self._make(
            f"{module}.weight", (d_out, d_in), partial(plus_product, zeros, wide_up, wide_down, dtype), up, dtype
        )
        return False

    def _checked(self, group: str, parts: Mapping[str, TensorInfo], d_out: int, d_in: int) -> tuple[int, int]:
        """A group's first input, and their number."""
        for part in _PARTS:
            if part not in parts:
                raise ConversionError(f"{self.path}: {group}_{part} is missing")
        shape, rows = parts["blocks_T"].shape, parts["row_index"]
        if len(shape) != 2 or rows.shape != shape[1:] or parts["col"].shape not in ((), (1,)):
            shapes = ", ".join(f"{part.name} {list(part.shape)}" for part in parts.values())
            raise ConversionError(f"{self.path}: these do not form blocks: {shapes}")
        whole = all(np.issubdtype(parts[part].dtype, np.integer) for part in ("col", "row_index"))
        column = int(self._source.get(parts["col"].name).reshape(())) if whole else -1
        index = self._source.get(rows.name)
        if (
            not whole
            or column < 0
            or column + shape[0] > d_in
            or (index.size and not 0 <= index.min() <= index.max() < d_out)
        ):
            raise ConversionError(f"{self.path}: the blocks of {group} reach beyond the weight [{d_out}, {d_in}]")
        return column, shape[0]

    def _wide(
        self, side: str, module: str, groups: Mapping[int, Any], blocks: list[tuple[int, int]], dtype: np.dtype
    ) -> np.ndarray:
        """A factor with a column or row for every input that a group picks."""
        own = self._source.get(f"{module}.{'v' if side == 'down' else 'u'}_proj.weight").astype(dtype)
        own = own if side == "down" else own.T
        added = np.zeros((sum(width for _, width in blocks), own.shape[1]), dtype)
        start = 0
        for number, (column, width) in zip(sorted(groups), blocks, strict=True):
            rows = added[start : start + width]
            if side == "down":
                rows[np.arange(width), column + np.arange(width)] = 1
            else:
                values = self._source.get(f"{module}.g{number}_blocks_T").astype(dtype)
                np.add.at(rows.T, self._source.get(f"{module}.g{number}_row_index"), values.T)
            start += width
        whole = np.concatenate((own, added))
        return whole if side == "down" else whole.T

    def _computed(self, first: str, second: str, module: str, groups: Mapping[int, Any], x: np.ndarray) -> np.ndarray:
        """As the layer computes it."""
        y = x @ self._float64(first).T @ self._float64(second).T
        for number in groups:
            column = int(self._source.get(f"{module}.g{number}_col").reshape(()))
            blocks = self._float64(f"{module}.g{number}_blocks_T")
            rows = self._source.get(f"{module}.g{number}_row_index")
            np.add.at(y.T, rows, (x[:, column : column + len(blocks)] @ blocks).T)
        return y
