"""Measures one case of the encoder benchmark with flashsvd_jax: the process that `encoder.py` starts. Prints a JSON row."""

import json
import sys
from functools import partial
from typing import Any

import jax
import numpy as np
from encoder_cases import EncoderCase
from prompt_timing import timed_row

from flashsvd_jax.compile_cache import enable_persistent_cache
from flashsvd_jax.models.encoder import hidden_states
from flashsvd_jax.models.encoder_weights import EncoderWeights, build_encoder_weights
from flashsvd_jax.models.pass_options import encoder_options
from flashsvd_jax.models.sequence_blocks import in_blocks, tokens_together
from flashsvd_jax.random_weights import arrays_of_the_host
from pallas_kernels import hardware_rank, prefer, record
from pallas_kernels.registry import Record


def main(case: EncoderCase) -> dict[str, Any]:
    """The row of a case."""
    enable_persistent_cache()
    config, used = case.config, Record()
    weights = build_encoder_weights(config, arrays_of_the_host(config), hardware_rank)
    tokens = np.ones((case.batch, case.length), np.int32)
    lengths = np.full(case.batch, case.length, np.int32)

    def states(weights: EncoderWeights, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        return in_blocks(partial(hidden_states, config, weights), case.block_tokens, tokens, lengths)

    options = encoder_options(weights.layers, tokens_together(case.batch, case.length, case.block_tokens))
    with record(used), prefer(case.preferred):
        lowered = jax.jit(states, compiler_options=options).lower(weights, tokens, lengths)
    attention = sorted({*used["attend_padded"], *used.get("attend", ())})
    row = timed_row(case, lowered, partial(jax.device_put, (weights, tokens, lengths)), attention)
    return row | {"feed_forward": sorted(used["feed_forward"]), "block_tokens": case.block_tokens}


if __name__ == "__main__":
    print(json.dumps(main(EncoderCase.from_json(sys.argv[1]))), flush=True)
