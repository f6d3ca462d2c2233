"""Measures one case of the encoder benchmark in plain JAX: the process that `encoder.py` starts. Prints a JSON row.

Low rank is plain SVD, each projection as two products.
"""

import json
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from encoder_cases import EncoderCase
from prompt_timing import timed_row

from flashsvd_jax.compile_cache import enable_persistent_cache
from flashsvd_jax.shapes import layer_sites, uniform_rank
from peers.jax_models import encode, encoder_weights
from peers.jax_modernbert import modernbert, modernbert_weights


def main(case: EncoderCase) -> dict[str, Any]:
    """The row of a case."""
    enable_persistent_cache()
    config = case.config.dense()
    sites = {site.name.rpartition(".")[2].removesuffix("_proj"): site for site in layer_sites(config)}

    def rank(name: str) -> int | None:
        return None if case.ratio == 1 else max(16, -(-uniform_rank(sites[name], case.ratio) // 16) * 16)

    scores = case.impl == "jax-scores"
    if config.model_type == "modernbert":
        new_layers, run = partial(modernbert_weights, config, rank), partial(modernbert, config, scores)
    else:
        sizes = {
            "width": config.hidden_size, "inner": config.intermediate_size, "heads": config.num_heads,
            "layers": config.num_layers,
        }  # fmt: skip
        new_layers, run = partial(encoder_weights, sizes, rank), partial(encode, sizes, scores)
    with jax.default_device(jax.devices("cpu")[0]):  # what drawing takes is no part of the peak that is measured
        layers = new_layers()
        x = jax.random.normal(jax.random.key(1), (case.batch, case.length, config.hidden_size), jnp.bfloat16)
    lowered = jax.jit(run).lower(*jax.eval_shape(lambda: (layers, x)))
    draw = partial(jax.device_put, (layers, x), jax.devices()[0])
    return timed_row(case, lowered, draw, ["scores" if scores else "cudnn"])


if __name__ == "__main__":
    print(json.dumps(main(EncoderCase.from_json(sys.argv[1]))), flush=True)
