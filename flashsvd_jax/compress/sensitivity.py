"""What truncating one projection alone does to a model's loss, as ASVD measures it."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.length_batches import batch_within_workspace
from flashsvd_jax.models.decoder import head_logits, through_layer, token_losses
from flashsvd_jax.models.embedding import embed
from flashsvd_jax.models.packing import Packer
from flashsvd_jax.models.weights import DecoderWeights, LayerWeights, build_weights, layer_weights

SENSITIVITY_WINDOWS = 8
"""Of the calibration text; every projection is measured at nine ratios, so all windows would take long."""


class Sensitivity:
    """Mean next-token losses of a dense decoder with one weight changed; all of the model is on the device in float32.

    Layers are visited in order: what goes into the one at hand is kept, so that only those from there on are computed again.

    Args:
      config: the dense model.
      get: flat name -> array.
      tokens: int32 [windows, length].
    """

    def __init__(self, config: ModelConfig, get: Callable[[str], np.ndarray], tokens: np.ndarray):
        self._config, self._get, self._tokens = config, get, tokens
        self._weights = build_weights(config, get, place=jax.device_put, dtype=jnp.float32)
        largest = max(config.vocab_size, config.num_heads * tokens.shape[1], config.intermediate_size)
        batch = batch_within_workspace(4 * tokens.shape[1] * largest, len(tokens))
        self._batches = [tokens[start : start + batch] for start in range(0, len(tokens), batch)]
        weights, positions = self._weights, np.arange(tokens.shape[1])
        self._streams = [
            embed(config, weights.embedding, weights.positions, batch, positions) for batch in self._batches
        ]

    def loss(self, index: int, changed: Mapping[str, np.ndarray]) -> float:
        """The loss with some of layer ``index``'s arrays changed, given by their flat names."""

        def get(name: str) -> np.ndarray:
            return changed[name] if name in changed else self._get(name)

        packer = Packer(self._config, get, lambda rank: rank, jax.device_put, (), jnp.float32)
        layers = [layer_weights(self._config, packer, index), *self._weights.layers[index + 1 :]]
        total = 0.0
        for x, tokens in zip(self._streams, self._batches, strict=True):
            for number, layer in enumerate(layers, index):
                x = _layer(self._config, self._config.windows[number], layer, x)
            total += float(_summed_loss(self._config, self._weights, x, tokens))
        return total / (self._tokens.size - len(self._tokens))

    def advance(self, index: int) -> None:
        """Goes on to the next layer."""
        layer, window = self._weights.layers[index], self._config.windows[index]
        self._streams = [_layer(self._config, window, layer, x) for x in self._streams]


@partial(jax.jit, static_argnums=(0, 1))
def _layer(config: ModelConfig, window: int | None, weights: LayerWeights, x: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return through_layer(config, weights, window, x)


@partial(jax.jit, static_argnums=0)
def _summed_loss(config: ModelConfig, weights: DecoderWeights, x: jax.Array, tokens: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        logits = head_logits(config, weights, x[:, :-1])
    return token_losses(logits, tokens[:, 1:]).sum()
