"""An encoder ready to encode: configuration, weights on the device, tokenizer, and its compiled forward pass."""

import functools
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flashsvd_jax.background_compile import BackgroundStep, BackgroundSteps
from flashsvd_jax.checkpoint import open_folder
from flashsvd_jax.compile_cache import enable_persistent_cache
from flashsvd_jax.encoder_config import EncoderConfig
from flashsvd_jax.engine import check_kernels
from flashsvd_jax.errors import RequestError, first_line
from flashsvd_jax.hub import resolve_model
from flashsvd_jax.loading import check_dtype, load_weights, place_params
from flashsvd_jax.models.encoder import hidden_states, pooled, real_tokens
from flashsvd_jax.models.encoder_weights import EncoderWeights, build_encoder_weights
from flashsvd_jax.models.pass_options import encoder_options, spares_workspace
from flashsvd_jax.models.sequence_blocks import in_blocks, tokens_together
from flashsvd_jax.tokenizer import Tokenizer
from pallas_kernels.registry import Record

_log = logging.getLogger(__name__)
_TINY = 1e-12  # what the length of a vector is taken for where it is less, as PyTorch's normalize does


class EncoderModel:
    """What `load_encoder` returns.

    Attributes:
      config: the model's shape.
      weights: as the forward pass reads them, on the device.
      tokenizer: None for a model that was made without one.
      block_tokens: tokens that a pass computes together, so many at the most; None for all.
      kernels_used: implementations that the passes compiled so far use, and why others refused.
    """

    def __init__(
        self,
        config: EncoderConfig,
        weights: EncoderWeights,
        tokenizer: Tokenizer | None = None,
        kernels: str = "auto",
        block_tokens: int | None = None,
    ):
        check_kernels(kernels)
        _check_block_tokens(block_tokens)
        self.config, self.weights, self.tokenizer, self.kernels = config, weights, tokenizer, kernels
        self.block_tokens = block_tokens
        self.kernels_used: Record = {}
        self._passes: dict[tuple[str, bool, bool], BackgroundSteps] = {}
        # For each number of tokens once: it looks at all weights.
        self._spares: Callable[[int | None], bool] = functools.cache(partial(spares_workspace, weights.layers))

    @classmethod
    def from_params(
        cls, config: EncoderConfig, params: Mapping[str, Any], *, materialize: str = "auto", **options: Any
    ) -> "EncoderModel":
        """A model from a canonical parameter tree ``{"params": ...}``.

        Args:
          config: its configuration.
          params: the tree, as `load_params` or `load_orbax` gives it.
          materialize: as for `load`.
          options: as for the constructor.
        """
        weights = place_params(config, params, partial(build_encoder_weights, config), materialize)
        return cls(config, weights, **options)

    def vectors(self, tokens: np.ndarray, lengths: np.ndarray, *, pooling: str, normalize: bool) -> jax.Array:
        """One vector a sequence.

        Args:
          tokens: int32 [batch, tokens], padded on the right.
          lengths: int32 [batch], tokens of each sequence before the padding.
          pooling: see `flashsvd_jax.models.encoder.pooled`.
          normalize: scale each to length 1.

        Returns:
          float32 [batch, embed].
        """
        batch, length = tokens.shape
        together = tokens_together(batch, length, self.block_tokens)
        step, arguments = self._step(tokens.shape, pooling, normalize, together), (self.weights, tokens, lengths)
        if self._spares(together):
            try:
                step.begin(*arguments)
                step.wait()
            except jax.errors.JaxRuntimeError as error:  # the XLA of today has no kernel of its own for a product
                _log.warning("passes in small blocks set memory aside for cuBLAS: %s", first_line(error))
                self._spares = lambda together: False
                step = self._step(tokens.shape, pooling, normalize, None)
        return step(*arguments)

    def _step(self, shape: tuple[int, ...], pooling: str, normalize: bool, together: int | None) -> BackgroundStep:
        spares = self._spares(together)
        key = pooling, normalize, spares
        if key not in self._passes:
            options = encoder_options(self.weights.layers, together if spares else None)
            self._passes[key] = BackgroundSteps.of(
                _vectors, self.config, self.block_tokens, pooling, normalize, kernels=self.kernels, used=self.kernels_used,
                compiler_options=options,
            )  # fmt: skip
        return self._passes[key][shape]


def _check_block_tokens(block_tokens: int | None) -> None:
    if block_tokens is not None and block_tokens < 1:
        raise RequestError(f"block_tokens must be at least 1, not {block_tokens}")


def _vectors(
    config: EncoderConfig,
    block_tokens: int | None,
    pooling: str,
    normalize: bool,
    weights: EncoderWeights,
    tokens: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    def of_sequences(tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        return pooled(hidden_states(config, weights, tokens, lengths), real_tokens(tokens, lengths), pooling)

    found = in_blocks(of_sequences, block_tokens, tokens, lengths)
    return found / jnp.maximum(jnp.linalg.norm(found, axis=-1, keepdims=True), _TINY) if normalize else found


def load_encoder(
    path_or_hub_id: str | Path,
    *,
    dtype: str | None = None,
    materialize: str = "auto",
    kernels: str = "auto",
    block_tokens: int | None = None,
    progress: bool = True,
) -> EncoderModel:
    """Loads a converted encoder's folder onto the default device.

    Args:
      path_or_hub_id: a folder that `convert` wrote, or the hub id of one.
      dtype, materialize, kernels, progress: as for `load`.
      block_tokens: of a batch, at most so many tokens, padding included, are computed together, though one text at least; all if
        None. A pass takes memory for those alone: with 8192 a quarter of what it takes for 64 texts of 512 tokens. With 512 to
        4096 products take no memory to work in either, and up to a fifth longer.

    Raises:
      FlashSVDError: the folder is missing, damaged, not a converted model, or a decoder; or an option cannot be used.
    """
    check_dtype(dtype)
    check_kernels(kernels)
    _check_block_tokens(block_tokens)
    enable_persistent_cache()
    path = resolve_model(path_or_hub_id)
    with open_folder(path) as folder:
        config = folder.config
        if not isinstance(config, EncoderConfig):
            raise RequestError(
                f"{path} is a decoder, a {config.model_type}: use load and generate, or `flashsvd generate`"
            )
        weights = load_weights(folder, partial(build_encoder_weights, config), materialize, dtype, progress)
    return EncoderModel(config, weights, Tokenizer(path), kernels, block_tokens)
