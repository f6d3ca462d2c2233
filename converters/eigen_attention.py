"""Eigen Attention: keys and values in fewer columns, which the cache of its own code holds."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from converters.reduced_widths import ATTENTION, FIRST, SECOND, ReducedWidths
from converters.sources import TensorSource
from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.errors import ConversionError


class EigenAttention(ReducedWidths):
    """Eigen Attention's Llama: keys through a factor that all heads share, values and outputs of narrow heads."""

    description = "Eigen Attention"

    def __init__(self, source: TensorSource, claims: Mapping[str, Any], base: AnyConfig):
        """Looks at names and shapes.

        Raises:
          ConversionError: a factor is missing or of another shape than the base model needs, or that is no Llama.
        """
        super().__init__(source, claims, base)
        for layer in range(self._base.num_layers):
            prefix = ATTENTION.format(layer=layer)
            self._keys(prefix)
            self._values(prefix)

    def _keys(self, prefix: str) -> None:
        heads, full = self._base.num_kv_heads, self._base.head_dim
        low, width = self._matrix(f"{prefix}k_proj_low.weight", heads, 0)
        up = self._infos.pop(f"{prefix}k_proj_up.weight", None)
        if up is None or up.shape != (full, width):
            found = "missing" if up is None else f"{list(up.shape)}, not {[full, width]}"
            raise ConversionError(f"{self.path}: {prefix}k_proj_up.weight is {found}")
        module = f"{prefix}k_proj"
        self._infos[FIRST.format(module=module)] = low
        shape = (heads, full, width) if heads > 1 else (full, width)

        def repeated() -> np.ndarray:
            return np.broadcast_to(self._source.get(up.name), shape)

        def computed(x: np.ndarray) -> np.ndarray:
            latent = (x @ self._float64(low.name).T).reshape(len(x), heads, width)
            return (latent @ self._float64(up.name).T).reshape(len(x), -1)

        self._make(SECOND.format(module=module), shape, repeated, up, up.dtype)
        self._outputs[FIRST.format(module=module)] = computed
        bias = self._infos.pop(f"{module}_low.bias", None)
        if bias is not None:
            self._place_bias(module, bias, np.broadcast_to(self._float64(up.name), (heads, full, width)))

    def _values(self, prefix: str) -> None:
        heads, full = self._base.num_kv_heads, self._base.head_dim
        low, width = self._matrix(f"{prefix}v_proj_low.weight", heads, 0)
        out, of_out = self._matrix(f"{prefix}o_proj_up.weight", self._base.num_heads, 1)
        if width != of_out:
            raise ConversionError(f"{self.path}: {low.name} has heads of {width}, {out.name} of {of_out}")
        self._place_rows(f"{prefix}v_proj", low, np.tile(np.arange(width), (heads, 1)))
        self._place_columns(f"{prefix}o_proj", out, self._base.num_heads, width, full)
        bias, of_output = (self._infos.pop(f"{prefix}{name}.bias", None) for name in ("v_proj_low", "o_proj_up"))
        if bias is not None:
            self._place_bias(f"{prefix}v_proj", bias, np.broadcast_to(np.eye(full, width), (heads, full, width)))
        if of_output is not None:
            self._infos[f"{prefix}o_proj.bias"] = of_output
