"""Measures one case of the benchmark of prompts with flashsvd_jax: the process that `prefill.py` starts. Prints a JSON row."""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
from prefill_cases import PrefillCase
from prompt_timing import timed_row

from flashsvd_jax.benchmark import random_weights
from flashsvd_jax.compile_cache import enable_persistent_cache
from flashsvd_jax.kv_cache import empty_cache
from flashsvd_jax.models import decoder
from pallas_kernels import prefer, record
from pallas_kernels.registry import Record


def main(case: PrefillCase) -> dict[str, Any]:
    """The row of a case; what follows "flashsvd_jax-" is the implementation to try first."""
    enable_persistent_cache()
    config, used = case.config, Record()

    def prompt(weights: Any, tokens: jax.Array, lengths: jax.Array) -> Any:
        empty = empty_cache(config, case.batch, case.length, weights.embedding.dtype)
        cache, x = decoder.prefill(config, weights, empty, tokens, lengths)
        return cache, decoder.head_logits(config, weights, x[:, -1])

    tokens = jnp.ones((case.batch, case.length), jnp.int32)
    lengths = jnp.full((case.batch,), case.length, jnp.int32)
    with record(used), prefer(case.impl.removeprefix("flashsvd_jax").lstrip("-") or None):
        shapes = jax.eval_shape(lambda: random_weights(config))
        lowered = jax.jit(prompt).lower(shapes, tokens, lengths)
    return timed_row(case, lowered, lambda: (random_weights(config), tokens, lengths), sorted(used["attend"]))


if __name__ == "__main__":
    print(json.dumps(main(PrefillCase.from_json(sys.argv[1]))), flush=True)
