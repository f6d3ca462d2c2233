"""The layers of a dense model, decoder or encoder, one at a time and behind one interface."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.encoder_config import EncoderConfig
from flashsvd_jax.models import decoder, encoder
from flashsvd_jax.models.embedding import embed
from flashsvd_jax.models.encoder_weights import build_encoder_weights, encoder_layer_weights
from flashsvd_jax.models.packing import Packer
from flashsvd_jax.models.weights import layer_weights

Get = Callable[[str], np.ndarray]
Product = Callable[..., tuple[jax.Array, ...]]


class ModelLayers(Protocol):
    """What both have; hashable, so that a compiled function may depend on it."""

    def embedding(self, get: Get) -> Callable[[np.ndarray], Any]:
        """Token ids [batch, tokens] -> what goes into the first layer, [batch, tokens, embed]; ``get``: flat name -> array."""
        ...

    def weights(self, index: int, get: Get) -> Any:
        """A layer's weights on the device, float32."""
        ...

    def kind(self, index: int) -> Hashable:
        """What tells layers apart beside their weights."""
        ...

    def through(self, kind: Any, weights: Any, x: jax.Array, product: Product) -> jax.Array:
        """The residual stream of whole sequences after a layer; ``product`` as for the models' own ``through_layer``."""
        ...


def model_layers(config: AnyConfig) -> ModelLayers:
    """The layers of a model."""
    return _EncoderLayers(config) if isinstance(config, EncoderConfig) else _DecoderLayers(config)


@dataclasses.dataclass(frozen=True)
class _DecoderLayers:
    config: ModelConfig

    def embedding(self, get: Get) -> Callable[[np.ndarray], Any]:
        weight = get("embed_tokens.weight")
        table = get("embed_positions.weight") if self.config.learned_positions else None
        return lambda tokens: embed(self.config, weight, table, tokens, np.arange(tokens.shape[1]))

    def weights(self, index: int, get: Get) -> Any:
        return layer_weights(self.config, _packer(self.config, get), index)

    def kind(self, index: int) -> Hashable:
        return self.config.windows[index]

    def through(self, kind: Any, weights: Any, x: jax.Array, product: Product) -> jax.Array:
        return decoder.through_layer(self.config, weights, kind, x, product)


@dataclasses.dataclass(frozen=True)
class _EncoderLayers:
    config: EncoderConfig

    def embedding(self, get: Get) -> Callable[[np.ndarray], Any]:
        # What an encoder without layers gives: positions, types of tokens and the norm are there and nothing else.
        bare = dataclasses.replace(self.config, num_layers=0, windows=(), ropes=(), final_norm=False, head=None)
        weights = build_encoder_weights(bare, get, place=jax.device_put, dtype=jnp.float32)
        return lambda tokens: encoder.hidden_states(bare, weights, jnp.asarray(tokens))

    def weights(self, index: int, get: Get) -> Any:
        return encoder_layer_weights(self.config, _packer(self.config, get), index)

    def kind(self, index: int) -> Hashable:
        return self.config.windows[index], self.config.ropes[index]

    def through(self, kind: Any, weights: Any, x: jax.Array, product: Product) -> jax.Array:
        window, rope = kind
        return encoder.through_layer(self.config, weights, window, rope, x, product)


def _packer(config: AnyConfig, get: Get) -> Packer:
    return Packer(config, get, lambda rank: rank, jax.device_put, (), jnp.float32)
