"""GPT-2's layers: transformers' class holds their weights as [d_in, d_out], other code as everywhere else."""

from dataclasses import replace

import numpy as np

from converters.encoder_naming import naming_of
from converters.sources import TensorSource, WrappedSource
from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.errors import ConversionError
from flashsvd_jax.schema import sites


class TransposedWeights(WrappedSource):
    """A checkpoint with the layers' dense weights as [d_out, d_in], whichever way it stores them.

    The shapes tell the way; of square weights, those of the others.

    Args:
      source: the checkpoint.
      config: the base model, whose class in transformers holds them transposed.

    Raises:
      ConversionError: some weights are stored one way and some the other, which leaves open how square ones are.
    """

    def __init__(self, source: TensorSource, config: AnyConfig):
        super().__init__(source)
        naming = naming_of(config)
        layers = [site for site in sites(config) if site.name.startswith("layers_")]
        by_weight = {f"{naming.module(site.name)}.weight": (site.d_out, site.d_in) for site in layers}
        found = {name: shape for name in self._infos if (shape := by_weight.get(naming.bare(name)))}
        uneven = {name for name, shape in found.items() if shape[0] != shape[1]}
        turned = {name for name in uneven if self._infos[name].shape == found[name][::-1]}
        plain = {name for name in uneven if self._infos[name].shape == found[name]}
        square = found.keys() - uneven
        if turned and plain and square:
            raise ConversionError(
                f"{self.path} holds {min(turned)} as [inputs, outputs] and {min(plain)} as [outputs, inputs], which leaves open "
                f"how {min(square)} is meant"
            )
        self._turned = turned | (set() if plain else square)
        for name in self._turned:
            self._infos[name] = replace(self._infos[name], shape=self._infos[name].shape[::-1])

    def get(self, name: str) -> np.ndarray:
        array = super().get(name)
        return array.T if name in self._turned else array
