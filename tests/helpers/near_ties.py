"""Whether tokens that a model said are those of float32, or as likely as these within what rounding changes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.models.decoder import full_logits
from flashsvd_jax.models.weights import DecoderWeights


def shortfalls(
    config: ModelConfig, weights: DecoderWeights, prompt: Sequence[int], said: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Of each token, given those before it: by how much the best logit is above its own in float32, and by how much the difference
    of two logits may change where plain XLA computes with the weights' own dtype."""
    tokens = jnp.asarray([[*prompt, *said[:-1]]], jnp.int32)
    logits = jax.jit(lambda weights: full_logits(config, weights, tokens)[0, len(prompt) - 1 :])
    with jax.default_matmul_precision("highest"):
        exact = np.asarray(logits(jax.tree.map(lambda a: a.astype(jnp.float32), weights)), np.float64)
    rounded = np.asarray(logits(weights), np.float64)
    return exact.max(1) - exact[np.arange(len(said)), said], 2 * np.abs(exact - rounded).max(1)
