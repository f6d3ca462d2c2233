"""MoDeGPT: modules of fewer heads' columns and fewer neurons, without any second factor."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from converters.reduced_widths import ATTENTION, ReducedWidths, placing
from converters.sources import TensorSource, folder_of, open_source
from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.errors import ConversionError

MODEGPT_KEYS = ("k_ranks", "v_ranks", "o_ranks", "gate_ranks", "ffn_dim")


class ReducedModules(ReducedWidths):
    """MoDeGPT's Llama: all of a layer's heads narrower, positions rotated as those columns of full heads that were kept.

    `rotary_masks.pt` tells these columns, [kv_heads, width] for every layer. Scores are divided by the root of the narrow width.
    """

    description = "MoDeGPT"

    def __init__(self, source: TensorSource, claims: Mapping[str, Any], base: AnyConfig):
        """Looks at names, shapes, and the columns that were kept.

        Raises:
          ConversionError: a layer's weights do not fit each other or the configuration, or its columns are no pairs that rotate
            together.
        """
        super().__init__(source, claims, base)
        self._masks = self._read_masks(claims.get("mask_path"))
        self._claims = claims
        widths = [self._feed_forward_width(layer) for layer in range(self._base.num_layers)]
        self.hf = {"intermediate_size": max(widths)}
        for layer, width in enumerate(widths):
            self._attention(layer)
            self._feed_forward(layer, width, max(widths))

    def _read_masks(self, named: object) -> list[np.ndarray] | None:
        if named is None:
            return None
        # The path is that of the machine that compressed the model; the file is beside the weights.
        path = folder_of(self.path) / PurePosixPath(PureWindowsPath(str(named)).as_posix()).name
        if not path.is_file():
            raise ConversionError(
                f"{self.path}: mask_path in config.json names {path.name}, which is not beside the weights"
            )
        with open_source(path) as masks:
            found = {int(name): np.array(masks.get(name)) for name in masks.infos() if re.fullmatch(r"\d+", name)}
        if sorted(found) != list(range(self._base.num_layers)):
            raise ConversionError(f"{path} does not hold the kept columns of {self._base.num_layers} layers")
        return [found[layer] for layer in range(len(found))]

    def _attention(self, layer: int) -> None:
        prefix, heads, kv_heads = ATTENTION.format(layer=layer), self._base.num_heads, self._base.num_kv_heads
        full = self._base.head_dim
        (q, width), (k, _), (v, _), (o, _) = found = [
            self._matrix(f"{prefix}{name}_proj.weight", number, axis)
            for name, number, axis in (("q", heads, 0), ("k", kv_heads, 0), ("v", kv_heads, 0), ("o", heads, 1))
        ]
        if any(other != width for _, other in found):
            told = ", ".join(f"{info.name} {other}" for info, other in found)
            raise ConversionError(f"{self.path}: the heads of a layer must have one width: {told}")
        self._check_ranks(layer, {"q": q.shape[0], "k": k.shape[0], "v": v.shape[0], "o": o.shape[1]})
        places = self._columns(layer, width)
        first = np.tile(np.arange(width), (kv_heads, 1))
        # Scores are multiplied with full ** -0.5 here, and with width ** -0.5 there.
        scaled = {"q": (q, np.repeat(places, heads // kv_heads, 0), (full / width) ** 0.5)}
        for name, (info, at, scale) in (scaled | {"k": (k, places, 1.0), "v": (v, first, 1.0)}).items():
            module = f"{prefix}{name}_proj"
            bias = self._infos.pop(f"{module}.bias", None)
            self._place_rows(module, info, at, scale)
            if bias is not None:
                self._place_bias(module, bias, placing(at, full, scale))
        self._place_columns(f"{prefix}o_proj", o, heads, width, full)

    def _columns(self, layer: int, width: int) -> np.ndarray:
        """Where the columns of narrow heads stand in full ones, [kv_heads, width], so that they are rotated as they were."""
        full, shape = self._base.head_dim, (self._base.num_kv_heads, width)
        if self._masks is None:
            if width != full:
                raise ConversionError(
                    f"{self.path}: layer {layer} has heads of {width}, but mask_path names no kept columns"
                )
            return np.tile(np.arange(full), (shape[0], 1))
        mask = self._masks[layer]
        half = width // 2
        pairs = (
            mask.shape == shape
            and mask.dtype.kind in "iu"
            and np.array_equal(mask[:, :half] + full // 2, mask[:, half:])
        )
        if not pairs or mask.min() < 0 or mask.max() >= full or any(len(set(row)) != width for row in mask.tolist()):
            raise ConversionError(
                f"{self.path}: the kept columns of layer {layer}, {list(mask.shape)}, are not {shape[0]} heads of {half} pairs of "
                f"columns i and i + {full // 2}, which alone are rotated as in the base model"
            )
        return mask

    def _feed_forward_width(self, layer: int) -> int:
        name = f"model.layers.{layer}.mlp.gate_proj.weight"
        if name not in self._infos or len(self._infos[name].shape) != 2:
            raise ConversionError(f"{self.path}: {name} is missing, or no matrix")
        width = self._infos[name].shape[0]
        self._check_ranks(layer, {"gate": width})
        return width

    def _feed_forward(self, layer: int, width: int, full: int) -> None:
        for name in ("gate", "up"):
            for part in ("weight", "bias"):
                self._fill_rows(f"model.layers.{layer}.mlp.{name}_proj.{part}", width, full)
        module = f"model.layers.{layer}.mlp.down_proj"
        down = self._infos.pop(f"{module}.weight", None)
        if down is None or len(down.shape) != 2 or down.shape[1] != width:
            found = "missing" if down is None else f"{list(down.shape)}, not {width} columns"
            raise ConversionError(f"{self.path}: {module}.weight is {found}")
        self._place_columns(module, down, 1, width, full)

    def _fill_rows(self, name: str, width: int, full: int) -> None:
        info = self._infos.get(name)
        if info is None or width == full:
            return
        if info.shape[:1] != (width,):
            raise ConversionError(f"{self.path}: {name} is {list(info.shape)}, not {width} rows")

        def filled() -> np.ndarray:
            return np.pad(self._source.get(name), ((0, full - width), *((0, 0),) * (len(info.shape) - 1)))

        self._make(name, (full, *info.shape[1:]), filled, info, info.dtype)

    def _check_ranks(self, layer: int, found: Mapping[str, int]) -> None:
        for name, width in found.items():
            told = self._claims.get(f"{name}_ranks")
            if isinstance(told, list) and (len(told) <= layer or told[layer] != width):
                raise ConversionError(
                    f"{self.path}: {name}_ranks in config.json does not say {width} for layer {layer}, as its tensors do"
                )
