"""Measures one case of the encoder benchmark with flashsvd_jax: the process that `encoder.py` starts. Prints a JSON row."""

import json
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from encoder_cases import EncoderCase
from prompt_timing import timed_row

from flashsvd_jax.benchmark import random_arrays
from flashsvd_jax.compile_cache import enable_persistent_cache
from flashsvd_jax.models.encoder import hidden_states
from flashsvd_jax.models.encoder_weights import build_encoder_weights
from pallas_kernels import hardware_rank, prefer, record
from pallas_kernels.registry import Record


def main(case: EncoderCase) -> dict[str, Any]:
    """The row of a case; what follows "flashsvd_jax-" is the implementation to try first."""
    enable_persistent_cache()
    weights, used = build_encoder_weights(case.config, random_arrays(case.config), hardware_rank), Record()
    tokens = jnp.ones((case.batch, case.length), jnp.int32)
    lengths = jnp.full((case.batch,), case.length, jnp.int32)
    with record(used), prefer(case.impl.removeprefix("flashsvd_jax").lstrip("-") or None):
        compiled = jax.jit(partial(hidden_states, case.config)).lower(weights, tokens, lengths).compile()
    attention = sorted({*used["attend_padded"], *used.get("attend", ())})
    row = timed_row(case, compiled, (weights, tokens, lengths), attention)
    return row | {"feed_forward": sorted(used["feed_forward"])}


if __name__ == "__main__":
    print(json.dumps(main(EncoderCase.from_json(sys.argv[1]))), flush=True)
