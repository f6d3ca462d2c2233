"""Measures one case of the benchmark of prompts with flashsvd_jax: the process that `prefill.py` starts. Prints a JSON row."""

import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from prefill_cases import PrefillCase
from prompt_timing import timed_row

from flashsvd_jax.compile_cache import enable_persistent_cache
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.kv_cache import empty_cache
from flashsvd_jax.models import decoder
from flashsvd_jax.models.weights import DecoderWeights
from flashsvd_jax.random_weights import random_weights
from pallas_kernels import prefer, record
from pallas_kernels.registry import Record


def lower_prompt(
    config: ModelConfig, batch: int, length: int
) -> tuple[jax.stages.Lowered, Callable[[], tuple[Any, ...]]]:
    """The pass of such prompts, lowered, and what draws its arguments, random weights among them."""

    def prompt(weights: DecoderWeights, tokens: jax.Array, lengths: jax.Array) -> Any:
        empty = empty_cache(config, batch, length, weights.embedding.dtype)
        cache, x = decoder.prefill(config, weights, empty, tokens, lengths)
        return cache, decoder.head_logits(config, weights, x[:, -1])

    numbers = jnp.ones((batch, length), jnp.int32), jnp.full((batch,), length, jnp.int32)
    shapes = jax.eval_shape(lambda: random_weights(config))
    return jax.jit(prompt).lower(shapes, *numbers), lambda: (random_weights(config), *numbers)


def main(case: PrefillCase) -> dict[str, Any]:
    """The row of a case; what follows "flashsvd_jax-" is the implementation to try first."""
    enable_persistent_cache()
    used = Record()
    with record(used), prefer(case.impl.removeprefix("flashsvd_jax").lstrip("-") or None):
        lowered, draw = lower_prompt(case.config, case.batch, case.length)
    return timed_row(case, lowered, draw, sorted(used["attend"]))


if __name__ == "__main__":
    print(json.dumps(main(PrefillCase.from_json(sys.argv[1]))), flush=True)
