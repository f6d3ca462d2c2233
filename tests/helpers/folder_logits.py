"""Logits of a converted folder; models of one shape compile once for all tests."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flashsvd_jax.checkpoint import load_params, open_folder
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.models.flax_module import Decoder


def folder_logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits [batch, tokens, vocab] by the decoder, computed in float32 whatever is stored."""
    with open_folder(path) as folder:
        config = folder.config
    return np.asarray(_apply(config, load_params(path, "float32"), tokens))


@functools.partial(jax.jit, static_argnums=0)
def _apply(config: ModelConfig, params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    return Decoder(config).apply(params, tokens)
