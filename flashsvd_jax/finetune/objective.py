"""The loss that training lowers: of each next token, in float32, a layer's activations computed again on the way back."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.finetune.trained import Arrays, merged
from flashsvd_jax.models.decoder import head_logits, through_layer, token_losses
from flashsvd_jax.models.embedding import embed
from flashsvd_jax.models.packing import Packer
from flashsvd_jax.models.weights import build_weights, layer_weights
from pallas_kernels import prefer


def mean_loss(config: ModelConfig, trained: Arrays, frozen: Arrays, tokens: jax.Array, dtype: Any) -> jax.Array:
    """Mean next-token loss in nats, float32.

    Args:
      config: the compressed model.
      trained: what `trained.initial` made, changed since.
      frozen: every other stored array, and below adapters the factors, by flat name.
      tokens: int32 [batch, length + 1].
      dtype: to compute in.
    """
    # The kernels have no gradients; XLA's operations have.
    with prefer("xla"):
        get = _get(config, trained, frozen)
        outer = build_weights(dataclasses.replace(config, num_layers=0), get, dtype=dtype)
        given = tokens[:, :-1]
        positions = jnp.broadcast_to(jnp.arange(given.shape[1], dtype=jnp.int32), given.shape)
        x = embed(config, outer.embedding, outer.positions, given, positions)
        for index in range(config.num_layers):
            x = jax.checkpoint(partial(_layer, config, index, dtype))(trained, frozen, x)
        logits = head_logits(config, outer, x)
    return token_losses(logits, tokens[:, 1:]).mean()


def _layer(config: ModelConfig, index: int, dtype: Any, trained: Arrays, frozen: Arrays, x: jax.Array) -> jax.Array:
    packer = Packer(config, _get(config, trained, frozen), lambda rank: rank, lambda array: array, (), dtype)
    return through_layer(config, layer_weights(config, packer, index), config.windows[index], x)


def _get(config: ModelConfig, trained: Arrays, frozen: Arrays) -> Callable[[str], jax.Array]:
    """Flat name -> array; one that is shared is the same object each time, as packing wants it."""
    owners, made = config.factorization.owner_by_name, {}

    def get(name: str) -> jax.Array:
        name = owners.get(name, name)
        if name not in made:
            is_trained = name in trained or f"{name}.lora_a" in trained
            made[name] = merged(name, frozen.get(name), trained) if is_trained else frozen[name]
        return made[name]

    return get
