"""Thin Flax modules over the models: the canonical parameter tree goes into ``.apply`` as it is."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.encoder_config import EncoderConfig
from flashsvd_jax.models.decoder import full_logits
from flashsvd_jax.models.encoder import outputs
from flashsvd_jax.models.encoder_weights import encoder_weights_from_params
from flashsvd_jax.models.weights import weights_from_params
from flashsvd_jax.schema import nest, schema


class Decoder(nn.Module):
    """``Decoder(config).apply({"params": tree}, tokens)`` gives float32 logits [batch, tokens, vocab].

    Computes in the parameters' own dtype. ``init`` draws weights as transformers does (normal, 0.02).
    """

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        weights = weights_from_params(self.config, _params(self, self.config, self.dtype))
        return full_logits(self.config, weights, tokens, attention_mask)


class Encoder(nn.Module):
    """``Encoder(config).apply({"params": tree}, tokens)`` gives the head's logits in float32, or hidden states without a head.

    Computes in the parameters' own dtype. ``init`` draws weights as `Decoder` does.
    """

    config: EncoderConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: jax.Array, attention_mask: jax.Array | None = None, token_types: jax.Array | None = None
    ) -> jax.Array:
        weights = encoder_weights_from_params(self.config, _params(self, self.config, self.dtype))
        return outputs(self.config, weights, tokens, attention_mask, token_types)


def _params(module: nn.Module, config: AnyConfig, dtype: Any) -> dict[str, Any]:
    """The module's parameter tree, drawn first where there is none yet."""
    if module.is_initializing():
        for name, value in initial_params(config, module.make_rng("params"), dtype)["params"].items():
            module.put_variable("params", name, value)
    return {"params": module.variables["params"]}


def initial_params(config: AnyConfig, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, Any]:
    """A random parameter tree: norms that multiply with one, biases at zero, everything else normal with deviation 0.02."""
    offset = config.norm_offset if isinstance(config, ModelConfig) else 0.0

    def draw(name: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        if name.endswith(".scale"):
            return jnp.full(shape, 1 - offset, dtype)
        if name.endswith(".bias"):
            return jnp.zeros(shape, dtype)
        return (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    specs = schema(config)
    keys = jax.random.split(key, len(specs))
    return nest({name: draw(name, spec.shape, k) for (name, spec), k in zip(specs.items(), keys, strict=True)})
