"""A model ready to generate: configuration, weights on the device, tokenizer, and one engine for each batch size used."""

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

from flashsvd_jax.checkpoint import open_folder
from flashsvd_jax.compile_cache import compile_count, enable_persistent_cache
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.config_fields import token_ids
from flashsvd_jax.engine import DECODE_CHUNK, Engine, check_kernels
from flashsvd_jax.errors import CheckpointError, RequestError
from flashsvd_jax.hub import resolve_model
from flashsvd_jax.loading import check_dtype, load_weights, place_params
from flashsvd_jax.models.weights import DecoderWeights, build_weights
from flashsvd_jax.tokenizer import Tokenizer
from pallas_kernels import power_of_two

DEFAULT_MAX_LENGTH = 4096


class Model:
    """What `load` returns.

    Attributes:
      config: the model's shape.
      weights: as the forward pass reads them, on the device.
      tokenizer: None for a model that was made without one.
      max_length: longest prompt plus completion; the cache is sized for it.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        tokenizer: Tokenizer | None = None,
        max_length: int | None = None,
        decode_chunk: int = DECODE_CHUNK,
        kernels: str = "auto",
    ):
        check_kernels(kernels)
        limit = config.max_position
        if max_length is not None and not (isinstance(max_length, Integral) and 2 <= max_length <= limit):
            raise RequestError(
                f"max_length must be from 2 to the {limit} positions that the model knows, not {max_length!r}"
            )
        if not (isinstance(decode_chunk, Integral) and decode_chunk >= 1):
            raise RequestError(f"decode_chunk must be a whole number of at least 1, not {decode_chunk!r}")
        self.config, self.weights, self.tokenizer = config, weights, tokenizer
        self.max_length = min(limit, DEFAULT_MAX_LENGTH) if max_length is None else int(max_length)
        self.decode_chunk, self.kernels = int(decode_chunk), kernels
        self._engines: dict[int, Engine] = {}

    @classmethod
    def from_params(
        cls, config: ModelConfig, params: Mapping[str, Any], *, materialize: str = "auto", **options: Any
    ) -> "Model":
        """A model from a canonical parameter tree ``{"params": ...}``.

        Args:
          config: its configuration.
          params: the tree, as `load_params` or `load_orbax` gives it.
          materialize: as for `load`.
          options: as for the constructor.
        """
        return cls(config, place_params(config, params, partial(build_weights, config), materialize), **options)

    def engine(self, prompts: int) -> Engine:
        """The engine for so many prompts at once: batch sizes are powers of two, so that few are ever compiled."""
        batch = power_of_two(prompts)
        if batch not in self._engines:
            engine = Engine(
                self.config, self.weights, batch=batch, max_length=self.max_length, decode_chunk=self.decode_chunk,
                kernels=self.kernels,
            )  # fmt: skip
            self._engines.setdefault(batch, engine)  # two threads get the same one
        return self._engines[batch]

    def warm_up(self, prompts: int = 1, longest: int | None = None, *, greedy: bool | None = None) -> int:
        """Compiles all that calls with so many prompts need, so that none waits for that; what an earlier process kept is read.

        Args:
          prompts: given together.
          longest: of a prompt, in tokens; all that fit if None.
          greedy: for greedy calls alone, or for all others alone; for both if None.

        Returns:
          The number of executables that were built or read.

        Raises:
          RequestError: a prompt cannot be so long.
        """
        before = compile_count()
        for kind in (True, False) if greedy is None else (greedy,):
            self.engine(prompts).prepare(longest, greedy=kind)
        return compile_count() - before


def load(
    path_or_hub_id: str | Path,
    *,
    dtype: str | None = None,
    materialize: str = "auto",
    max_length: int | None = None,
    decode_chunk: int = DECODE_CHUNK,
    kernels: str = "auto",
    progress: bool = True,
) -> Model:
    """Loads a converted model's folder onto the default device.

    Args:
      path_or_hub_id: a folder that `convert` wrote, or the hub id of one.
      dtype: "bfloat16", "float16" or "float32" to compute in; by default as stored.
      materialize: which low-rank sites become dense weights: "auto" those whose factors hold more than the weight (see
        `flashsvd_jax.models.expansion`), "never" none, "always" all.
      max_length: longest prompt plus completion in tokens; by default the model's own limit, at most 4096.
      decode_chunk: tokens per dispatch while generating.
      kernels: "auto", or the name of an implementation that every op tries first, such as "xla"; see `flashsvd env`.
      progress: show a bar when it takes more than two seconds.

    Raises:
      FlashSVDError: the folder is missing, damaged, or not a converted model.
    """
    check_dtype(dtype)
    check_kernels(kernels)
    enable_persistent_cache()
    path = resolve_model(path_or_hub_id)
    with open_folder(path) as folder:
        config = folder.config
        if not isinstance(config, ModelConfig):
            raise RequestError(
                f"{path} is an encoder, a {config.model_type}: use load_encoder and encode, or `flashsvd encode`"
            )
        weights = load_weights(folder, partial(build_weights, config), materialize, dtype, progress)
    tokenizer = Tokenizer(path)
    config = dataclasses.replace(config, eos_token_ids=_end_ids(path, config, tokenizer))
    return Model(config, weights, tokenizer, max_length, decode_chunk, kernels)


def _end_ids(path: Path, config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """End tokens: those for generation where the folder gives them (chat models have several), else the model's own."""
    file = path / "generation_config.json"
    if file.exists():
        try:
            given = json.loads(file.read_text()).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{file} is not JSON of the form that transformers writes: {error}") from error
        if given is not None:
            return token_ids(given, f"{file}: eos_token_id")
    return config.eos_token_ids or tokenizer.end_ids
