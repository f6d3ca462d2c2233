"""Basis Sharing: one first factor for a group of layers, stored under every name that those layers have for it."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from converters.sources import TensorInfo, TensorSource, WrappedSource
from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.errors import ConversionError

_BLOCKS = dict.fromkeys("qkvo", "self_attn") | dict.fromkeys(("gate", "up", "down"), "mlp")

# What its classes add to the base model's configuration.
CONFIG_KEYS = tuple(key for stem in (*_BLOCKS, "attn") for key in (f"num_basis_{stem}", f"{stem}_groups"))


class SharedBases(WrappedSource):
    """A checkpoint in which every layer has its basis under one name, `model.q_basis.3.weight`.

    The layers of a group get the same tensor, whether the file ties it, repeats it or leaves all but one name out.
    """

    def __init__(self, source: TensorSource, config: Mapping[str, Any], base: AnyConfig):
        """Looks at the names; copies are compared.

        Args:
          source: the checkpoint; closing this closes it.
          config: the configuration that came with it; without one, only tied tensors are known to be shared.
          base: the base model.

        Raises:
          ConversionError: the tensors contradict the groups or the ranks of the configuration.
        """
        super().__init__(source)
        for stem in _BLOCKS:
            for layers in self._groups(stem, config):
                self._join(stem, layers, config.get(f"num_basis_{stem}"))

    def _groups(self, stem: str, config: Mapping[str, Any]) -> Iterator[list[int]]:
        """The configuration's groups of layers, then each remaining layer that has this projection by itself."""
        key, grouped = f"{stem}_groups", set()
        groups = config.get(key) or []
        if not (isinstance(groups, list) and all(_is_group(group) for group in groups)):
            raise ConversionError(f"{self.path}: {key} in config.json is not a list of lists of layers")
        for group in groups:
            grouped.update(group)
            yield group
        layer = 0
        while _coefficients(stem, layer) in self._infos:
            if layer not in grouped:
                yield [layer]
            layer += 1

    def _join(self, stem: str, layers: list[int], rank: object) -> None:
        """Gives all layers of a group the one tensor that is stored for them."""
        names = {name: layer for layer in layers for name in (_basis(stem, layer), _in_block(stem, layer))}
        stored = {name: self._infos.pop(name) for name in names if name in self._infos}
        users = {names[name] for name in stored} | {x for x in layers if _coefficients(stem, x) in self._infos}
        if not stored:
            self._refuse_coefficients_alone(stem, users, rank)
            return
        kept, *others = stored.values()
        if rank is not None and kept.shape[:1] != (rank,):
            raise ConversionError(
                f"{self.path}: num_basis_{stem} in config.json is {rank!r}, {kept.name} is {list(kept.shape)}"
            )
        for other in others:
            if other.identity != kept.identity and not self._equal(other, kept):
                raise ConversionError(
                    f"{self.path}: {other.name} differs from {kept.name}, but they stand for one basis, that of layers "
                    f"{layers} ({stem}_groups in config.json)"
                )
        self._infos |= {_basis(stem, layer): kept for layer in users}

    def _equal(self, one: TensorInfo, other: TensorInfo) -> bool:
        return one.shape == other.shape and np.array_equal(self._source.get(one.name), self._source.get(other.name))

    def _refuse_coefficients_alone(self, stem: str, layers: set[int], rank: object) -> None:
        # Of full rank they have the shape of a dense weight; those of layers that were merged back are dense weights.
        for name in (_coefficients(stem, layer) for layer in sorted(layers)):
            if self._infos[name].shape[1:] == (rank,):
                raise ConversionError(
                    f"{self.path}: {name} {list(self._infos[name].shape)} holds coefficients (num_basis_{stem} in "
                    f"config.json is {rank}), but no basis of layers {sorted(layers)} is there"
                )


def _is_group(group: object) -> bool:
    return isinstance(group, list) and all(type(layer) is int and layer >= 0 for layer in group)


def _basis(stem: str, layer: int) -> str:
    return f"model.{stem}_basis.{layer}.weight"


def _in_block(stem: str, layer: int) -> str:
    """The second name that Llama's classes give it."""
    return f"model.layers.{layer}.{_BLOCKS[stem]}.{stem}_basis.weight"


def _coefficients(stem: str, layer: int) -> str:
    return f"model.layers.{layer}.{_BLOCKS[stem]}.{stem}_proj.weight"
