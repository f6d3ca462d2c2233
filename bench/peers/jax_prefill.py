"""Measures one case of the benchmark of prompts in plain JAX: the process that `prefill.py` starts. Prints a JSON row."""

import json
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from prefill_cases import PrefillCase
from prompt_timing import timed_row

from flashsvd_jax.compile_cache import enable_persistent_cache
from flashsvd_jax.shapes import layer_sites, uniform_rank
from pallas_kernels import hardware_rank
from peers.jax_models import decoder_weights, prefill


def main(case: PrefillCase) -> dict[str, Any]:
    """The row of a case."""
    enable_persistent_cache()
    config = case.config.dense()
    sites = {site.name.rpartition(".")[2].removesuffix("_proj"): site for site in layer_sites(config)}

    def rank(name: str) -> int | None:
        return None if case.ratio == 1 else hardware_rank(uniform_rank(sites[name], case.ratio))

    sizes = {
        "width": config.hidden_size, "inner": config.intermediate_size, "heads": config.num_heads,
        "kv_heads": config.num_kv_heads, "layers": config.num_layers, "vocab": config.vocab_size,
    }  # fmt: skip
    tokens = jnp.ones((case.batch, case.length), jnp.int32)
    lowered = jax.jit(partial(prefill, sizes)).lower(jax.eval_shape(partial(decoder_weights, sizes, rank)), tokens)
    return timed_row(case, lowered, lambda: (decoder_weights(sizes, rank), tokens), ["cudnn"])


if __name__ == "__main__":
    print(json.dumps(main(PrefillCase.from_json(sys.argv[1]))), flush=True)
